"""A hook of the documentation site: the tutorial notebook as a page, so it has the site's navigation and search."""

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

NOTEBOOK, PAGE = "tutorial.ipynb", "tutorial.md"
DOWNLOAD = f"This page is a notebook: [download it]({NOTEBOOK}) to run it.\n\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the notebook's page to the site."""
    notebook = json.loads(Path(config["docs_dir"], NOTEBOOK).read_text(encoding="utf-8"))
    files.append(File.generated(config, PAGE, content="\n\n".join(map(_block, notebook["cells"]))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links to the notebook into links to its page, and put the download below the page's title."""
    if page.file.src_uri != PAGE:
        return markdown.replace(f"]({NOTEBOOK})", f"]({PAGE})")
    title, _, text = markdown.partition("\n\n")
    return f"{title}\n\n{DOWNLOAD}{text}"


def _block(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    return source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
