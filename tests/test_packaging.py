"""What a user installs: declared dependencies, and a source archive and a wheel that hold every file.

CI installs an editable tree, where nothing can be missing; so a wheel is built here, installed and run.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
EXTRAS = {
    "kdcache.data.layouts.exports.coco": "coco",
    "kdcache.data.tracing.albumentations": "test",  # whoever calls it has it
    "kdcache.models.architectures.hub": "segformer",
    "kdcache.models.architectures.hub_models": "hf,timm",
    "kdcache.models.architectures.segformer": "segformer",
    "kdcache.models.architectures.smp": "smp",
    "kdcache.models.architectures.yolo": "ultralytics",
    "kdcache.models.export": "onnx",
    "kdcache.models.foreign.image_settings": "hf",
    "kdcache.models.foreign.readings": "hf",
    "kdcache.sharing.hub": "hub",
    "kdcache.store.backend.object_store": "remote",
    "kdcache.training.run.trackers": "wandb",
}
"""Module -> the extras that bring what it imports beyond the dependencies of all."""
NOT_IN_THE_ARCHIVE = {".gitignore", ".ci/run"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(entries: list[str]) -> set[str]:
    """Distributions that requirements name, without versions, extras and markers."""
    return {canonical(re.split(r"[\s<>=!~;\[]", entry, maxsplit=1)[0]) for entry in entries}


BASE = required(PROJECT["project"]["dependencies"])
OPTIONAL = {extra: required(entries) for extra, entries in PROJECT["project"]["optional-dependencies"].items()}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def foreign_imports(path: Path) -> set[str]:
    """Top-level names that a file imports, at any depth of its code, which are neither Python's nor ours."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add((node.module or "").partition(".")[0])
    return roots - sys.stdlib_module_names - set(PACKAGES)


def distributions(roots: set[str], homes: Mapping[str, list[str]]) -> set[str]:
    """The distributions that bring these modules; one that is not installed has its module's name."""
    return {canonical(homes.get(root, [root])[0]) for root in roots}


def test_every_import_is_declared() -> None:
    homes = metadata.packages_distributions()
    undeclared, idle = {}, set(BASE)
    for module, path in modules():
        extras = set().union(*(OPTIONAL[extra] for extra in EXTRAS.get(module, "").split(",") if extra))
        taken = distributions(foreign_imports(path), homes)
        idle -= taken
        if missing := taken - BASE - extras:
            undeclared[module] = sorted(missing)
    assert undeclared == {}
    assert idle == set(), "declared, and imported by nothing"


def test_extras_are_of_modules_that_are_there() -> None:
    assert set(EXTRAS) <= {module for module, _ in modules()}
    assert {extra for names in EXTRAS.values() for extra in names.split(",")} <= set(OPTIONAL)


def test_what_the_extras_bring_is_found_by_the_walk(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os, PIL.Image\nfrom . import near\nfrom kdcache.data.rendering import view\n"
        "def late():\n    from huggingface_hub.errors import X\n"
    )
    roots = foreign_imports(file)
    assert roots == {"PIL", "huggingface_hub"}
    assert distributions(roots, {"PIL": ["pillow"]}) == {"pillow", "huggingface-hub"}
    assert required(["a_b>=1", "c[d]>2; python_version > '3'", "e"]) == {"a-b", "c", "e"}


# --------------------------------------------------------------------------- the archive and the wheel


def run(*words: object, cwd: Path) -> str:
    """Standard output of a command that works; PYTHONPATH and the working folder hide nothing that is missing."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**inherited, "PYTHONSAFEPATH": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    """Files of the project as a commit of the working tree would have them."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listed, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a checkout of git: {error}")
    return [name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_text_installs_kdcache_from_an_index_that_lacks_it(tracked: list[str]) -> None:
    kinds = (".py", ".md", ".ipynb", ".toml", ".yml", ".sh")
    texts = [ROOT / name for name in tracked if Path(name).suffix in kinds]
    told = re.compile(r"pip install (-\w+ )*['\"]?kdcache\b")
    assert [path for path in texts if told.search(path.read_text(encoding="utf-8"))] == []


@pytest.fixture(scope="session")
def archive(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of a clean copy: neither an older build nor a stray file of the tree gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("archive")
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-c", "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])", out, cwd=source)
    (made,) = out.glob("*.tar.gz")
    return made


@pytest.fixture(scope="session")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive alone, as pip does where it finds no wheel."""
    out = tmp_path_factory.mktemp("wheel")
    words = ("wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", out, archive)
    run(sys.executable, "-m", "pip", *words, cwd=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel; what it depends on comes from the one that tests run in."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    run(sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-index",
        "--no-deps", wheel, cwd=folder)  # fmt: skip
    (own,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "shared.pth").write_text("\n".join(shared) + "\n")  # its own .pth files, an editable kdcache's, are not read
    return folder / "bin"


@pytest.mark.slow
def test_the_source_archive_holds_the_whole_project(archive: Path, tracked: list[str]) -> None:
    with tarfile.open(archive) as content:
        names = {member.name.partition("/")[2] for member in content if member.isfile()}
    assert set(tracked) - names == NOT_IN_THE_ARCHIVE
    strangers = {name for name in names - set(tracked) if not name.startswith("kdcache.egg-info/")}
    assert strangers == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel: Path, tracked: list[str]) -> None:
    wanted = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in map(ROOT.joinpath, tracked)
        if path.is_relative_to(folder)
    }
    assert {"kdcache/py.typed", "kdcache/analysis/report/page.css", "kdcache/sweep/recipes/voc-compare.toml"} <= wanted
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        headers = metadata.PathDistribution(zipfile.Path(wheel, str(Path(about).parent) + "/")).metadata
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {Path(name).name for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert headers["Name"] == "kdcache"
    assert headers["License-Expression"] == PROJECT["project"]["license"]
    assert required(headers.get_all("Requires-Dist")) >= BASE


IMPORT_ALL = """
import importlib, pkgutil, sys
from numba.core.dispatcher import Dispatcher
Dispatcher.compile = Dispatcher.disable_compile = lambda *_: None  # that takes a minute, and others test the outcome
count = 0
for name in sys.argv[2:]:
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(package.__path__, name + "."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        assert module.__file__.startswith(sys.argv[1]), module.__file__
        count += 1
print(count)
"""


@pytest.mark.slow
def test_every_module_of_the_wheel_is_imported(installed: Path, tmp_path: Path) -> None:
    words = ("-W", "ignore", "-c", IMPORT_ALL, installed.parent, *PACKAGES)
    told = run(installed / "python", *words, cwd=tmp_path)
    there = [name for name, _ in modules() if name not in PACKAGES and not name.endswith("__main__")]
    assert int(told) == len(there)


EMPTY_PAGE = """
from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report import page
nothing = Comparison("streets", "val", "0" * 64, 0, False, "best", (), (), (), ())
print(page.__file__, page.page(nothing, [], title="Nothing"))
"""


@pytest.mark.slow
def test_the_command_of_the_wheel_finds_its_files(installed: Path, tmp_path: Path) -> None:
    assert "train-student" in run(installed / "kdcache", "--help", cwd=tmp_path)
    version = "import kdcache, importlib.metadata as m; print(kdcache.__version__, m.version('kdcache'))"
    assert run(installed / "python", "-c", version, cwd=tmp_path).split() == [PROJECT["project"]["version"]] * 2
    recipes = run(installed / "kdcache", "sweep", cwd=tmp_path)
    for recipe in (ROOT / "kdcache/sweep/recipes").glob("*.toml"):
        assert recipe.stem in recipes
    output = run(installed / "python", "-c", EMPTY_PAGE, cwd=tmp_path)
    assert output.startswith(str(installed.parent))
    for name in ("page.css", "page.js"):
        assert (ROOT / "kdcache/analysis/report" / name).read_text(encoding="utf-8") in output
    assert "No row has a baseline to be measured against." in output
