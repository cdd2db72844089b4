"""A report of real runs with hostile names, and a Chromium that opens it with the network cut."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<script>owned=1<script> 'kl'"
TITLE = "</script><script>window.owned = 1</script>Street scenes"


@pytest.fixture
def hostile() -> tuple[str, str]:
    """The title and the name of a run."""
    return TITLE, HOSTILE


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three rows with two seeds each, their teacher, and six images or more."""
    from kdcache.analysis.compare import CompareOptions
    from kdcache.analysis.report import ReportOptions, make_report
    from kdcache.data import write_scenes

    root = tmp_path_factory.mktemp("report")
    write_scenes(root / "data", "scenes:96x160,train=12,val=12")
    _hide_classes(root / "data" / "labels" / "val")
    for seed in (0, 1):
        _train(root, seed)
        _copy(root, f"none-{seed}", f"runs/kl-{seed}", "kl", noise=0.05)
    _copy(root, "none-0", f"runs/{HOSTILE}", "kl", noise=0.03, temperature=3.5)
    _copy(root, "none-0", "teacher", "none", noise=0.02)
    options = ReportOptions(
        CompareOptions(repeats=2, teacher=str(root / "teacher")), title=TITLE, command=f"kdcache report {HOSTILE}"
    )
    make_report([root / "runs"], None, None, root / "page.html", options)
    return root / "page.html"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser of this machine; skips without one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, report: Path) -> Callable[..., Any]:
    """`with opened(width=360) as page:` the report, offline; afterwards nothing may have gone wrong or out."""

    @contextmanager
    def open_page(width: int = 1280, height: int = 900, **about: Any) -> Iterator[Any]:
        context = chromium.new_context(viewport={"width": width, "height": height}, offline=True, **about)
        page = context.new_page()
        wrong: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        try:
            yield page
        finally:
            context.close()
        assert not wrong
        assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]

    return open_page


@pytest.fixture(scope="session")
def screenshot() -> Callable[..., bytes]:
    """`screenshot(page or element, ...)`. Chromium on a busy machine cannot always capture a page: three tries."""

    def capture(shown: Any, tries: int = 3, **options: Any) -> bytes:
        from playwright.sync_api import Error

        try:
            return bytes(shown.screenshot(**options))
        except Error:
            if tries == 1:
                raise
            return capture(shown, tries - 1, **options)

    return capture


def _hide_classes(labels: Path) -> None:
    """Poles and pedestrians of half the images become void: the scenes have every class in every image."""
    import numpy as np
    from PIL import Image

    for path in sorted(labels.iterdir())[::2]:
        label = np.array(Image.open(path))
        label[(label == 4) | (label == 6)] = 255
        Image.fromarray(label).save(path)


def _train(root: Path, seed: int) -> None:
    from kdcache.training import make_config, train

    settings: dict[str, Any] = {
        "model": "kdcache:tiny",
        "size": (96, 160),
        "iterations": 24,
        "batch_size": 4,
        "lr": 4e-3,
    }
    data = str(root / "data")
    config = make_config(
        verb="train-teacher",
        data=data,
        val=data,
        seed=seed,
        val_every=6,
        log_every=2,
        threads=1,
        device="cpu",
        **settings,
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    train(config, root / "runs" / f"none-{seed}")
    torch.use_deterministic_algorithms(deterministic)


def _copy(root: Path, of: str, name: str, method: str, noise: float, **settings: object) -> None:
    """A further run: other settings, weights that differ a little, a log with a term that hardly does anything."""
    import tomli_w
    from safetensors.torch import load_file, save_file

    run = Path(shutil.copytree(root / "runs" / of, root / name))
    recipe = tomllib.loads((run / "recipe.toml").read_text()) | {"method": method} | settings
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
    torch.manual_seed(len(name))
    weights = load_file(run / "best.safetensors")
    weights["classifier.weight"] += noise * torch.randn_like(weights["classifier.weight"])
    save_file(weights, run / "best.safetensors")
    if method == "kl":
        lines = [
            {"kind": "gradients", "step": step, "ce": 1.0, "kl": share} for step, share in ((1, 0.002), (9, 0.004))
        ]
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
