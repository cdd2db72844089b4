"""A hook of the documentation site: a picture instead of a mermaid block, so the page needs no script.

GitHub draws the blocks of Markdown files. The site shows docs/assets/pipeline.svg instead, which has the same words;
tests/docs/test_site.py compares them.
"""

import html
import re
from typing import Any

PICTURES = {"flowchart LR\n  data": "assets/pipeline.svg"}
"""The beginning of a block -> its picture."""


def on_config(config: Any) -> Any:
    """Set the function that formats mermaid blocks."""
    fence = {"name": "mermaid", "class": "drawing", "format": picture}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def picture(source: str, *_: Any, **__: Any) -> str:
    """Return the HTML of a block's picture, with the block's words as text. Raises: KeyError for an unknown block."""
    file = next((file for start, file in PICTURES.items() if source.startswith(start)), None)
    if file is None:
        raise KeyError(f"scripts/mermaid.py has no picture of {source[:40]!r}")
    return f'<p><img class="drawing" src="{file}" alt="{html.escape(", ".join(words(source)), quote=True)}"></p>'


def words(source: str) -> list[str]:
    """Return the texts of a block's boxes and arrows, line by line."""
    texts = re.findall(r'"([^"]+)"|\|([^|]+)\|', source)
    return [line for box, arrow in texts for line in (box or arrow).split("<br>")]
