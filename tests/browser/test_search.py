"""The site's own search, in a browser without a network: common questions find the page that answers them first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
QUERIES = {
    "offline": "environments.html",
    "resume": "troubleshooting.html",
    "learning rate": "settings.html",
    "out of memory": "troubleshooting.html",
    "DINOv3": "models.html",
    "YOLO": "yolo.html" if (ROOT / "docs" / "yolo.md").is_file() else "data.html",
}


@pytest.fixture(scope="module")
def search(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The first page of the site, built for this test."""
    where = Path(sys.executable).parent
    if shutil.which("mkdocs", path=str(where)) is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    site = tmp_path_factory.mktemp("search") / "site"
    environment = os.environ | {"PATH": f"{where}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        ["bash", ROOT / "scripts" / "docs", "--site-dir", site], env=environment, check=True, capture_output=True
    )
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto((site / "index.html").as_uri())
    yield page
    context.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("query", QUERIES)
def test_the_first_page_found_is_the_one_that_answers(search: Any, query: str) -> None:
    box = search.locator("input.md-search__input")
    box.fill("")
    box.click()
    search.keyboard.type(query)
    links = ".md-search-result__item > a"
    term = query.split()[0].lower()
    search.locator(f'{links}[href*="h={term}"]').first.wait_for(state="attached", timeout=120_000)
    found = search.locator(links).first.get_attribute("href") or ""
    assert found.split("?")[0].split("/")[-1] == QUERIES[query]
