"""A hook of the documentation site: a picture in place of a mermaid block, which no script is fetched to draw.

GitHub draws the blocks of Markdown files. The site shows docs/assets/pipeline.svg instead, which has the same words;
tests/docs/test_site.py compares them.
"""

import html
import re
from typing import Any

PICTURES = {"flowchart LR\n  data": "assets/pipeline.svg"}
"""The beginning of a block -> its picture."""


def on_config(config: Any) -> Any:
    """Give mermaid blocks a formatter of their own."""
    fence = {"name": "mermaid", "class": "drawing", "format": picture}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def picture(source: str, *_: Any, **__: Any) -> str:
    """The picture of a block, with its words for those who do not see it. Raises: KeyError for a block without one."""
    file = next((file for start, file in PICTURES.items() if source.startswith(start)), None)
    if file is None:
        raise KeyError(f"scripts/mermaid.py has no picture of {source[:40]!r}")
    return f'<p><img class="drawing" src="{file}" alt="{html.escape(", ".join(words(source)), quote=True)}"></p>'


def words(source: str) -> list[str]:
    """What the boxes and arrows of a block say, line by line."""
    texts = re.findall(r'"([^"]+)"|\|([^|]+)\|', source)
    return [line for box, arrow in texts for line in (box or arrow).split("<br>")]
