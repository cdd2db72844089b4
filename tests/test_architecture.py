"""The rooms of DESIGN.md: which way imports run, what is exported, how large a file grows, what is never used."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "kdcache": ROOT / "kdcache",
    "kdcache_kernels": ROOT / "kernels" / "kdcache_kernels",
    "kdcache_cli": ROOT / "cli" / "kdcache_cli",
}
MODULES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}
MOST_LINES = 500  # with docstrings
PICKLE_ERRORS = {"UnpicklingError", "PickleError"}  # which torch raises: to name them is no use of pickle

KERNELS, CLI = "kdcache_kernels", "kdcache_cli"
ALLOWED = {
    "calls": {"errors", "settings"},
    "bounded": set[str](),
    "errors": set[str](),
    "model_table": set[str](),
    "files": {"bounded", "errors"},
    "locks": {"errors"},
    "heads": set[str](),
    "tasks": set[str](),
    "faults": {"errors", "models"},
    "progress": {"errors"},
    "display": set[str](),
    "ray_cluster": {"errors"},
    "settings": {"errors", "heads", "model_table", "tasks"},
    "data": {"errors", "files", "locks", "tasks"},
    "run_samples": {"data", "files"},
    "run_folder": {"bounded", "display", "heads", "errors", "files", "settings"},
    "models": {"bounded", "heads", "model_table", "errors", "files", "run_folder", "tasks"},
    "store": {"bounded", "display", "heads", "data", "errors", "files", "locks", "tasks"},
    "sharing": {"display", "store", "errors", "files", "locks", "run_folder", "settings"},
    "distill": {"heads", KERNELS, "errors", "settings", "tasks"},
    "metrics": {"display", "heads", "data", "models", "errors", "files", "settings", "tasks"},
    "teacher": {
        *(
            "faults",
            "ray_cluster",
            "display",
            "heads",
            "data",
            "models",
            "store",
            "metrics",
            "errors",
            "files",
            "run_folder",
            "settings",
            "tasks",
        ),
        KERNELS,
    },
    "training": {
        *("bounded", "faults", "heads", "data", "models", "store", "metrics", "distill"),
        *("errors", "files", "locks", "run_folder", "run_samples", "settings", "progress", "display", "tasks"),
    },
    "analysis": {
        *("bounded", "tasks"),
        *("display", "heads", "data", "models", "metrics", "errors", "files", "run_folder", "run_samples", "settings"),
    },
    "bench": {"data", "models", "store", "distill", "metrics", "training", "errors", "files", KERNELS},
    "verbs": {
        "calls",
        *("heads", "data", "models", "store", "metrics", "teacher", "training", "analysis"),
        *("errors", "run_folder", "run_samples", "settings", "sharing", "progress", "display", "tasks"),
    },
    "sweep": {"bounded", "data", "metrics", "analysis", "errors", "files", "run_folder", "settings", "tasks"},
}
"""Room -> rooms it may import from."""

EXPORTED = [
    "Batch",
    "BuildOptions",
    "CacheDataset",
    "DistillLoss",
    "KDCacheError",
    "LabelledDataset",
    "Records",
    "Target",
    "audit",
    "build_cache",
    "build_model",
    "card",
    "compare",
    "copy",
    "evaluate",
    "evaluate_model",
    "export",
    "export_pseudo_labels",
    "from_dataset",
    "inspect",
    "load_run",
    "load_teacher",
    "open_cache",
    "open_caches",
    "open_split",
    "plan",
    "predict",
    "report",
    "traced",
    "train",
    "verify",
]


def room_of(module: str) -> str:
    """`kdcache.data.rendering.view` is in the room `data`; the other packages are rooms themselves."""
    package, _, rest = module.partition(".")
    return (rest.partition(".")[0] or "kdcache") if package == "kdcache" else package


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


def called(node: ast.Call) -> str:
    """What is called, as far as it is written in names and dots: `torch.load`, `import_module`."""
    names, function = list[str](), node.func
    while isinstance(function, ast.Attribute):
        names.append(function.attr)
        function = function.value
    return ".".join(reversed([*names, getattr(function, "id", "")]))


@cache
def imports_of(module: str) -> tuple[str, ...]:
    """Dotted names that a module imports, at any depth of its code, by `import_module` included. All are absolute."""
    return tuple(_imports_of(module))


def _imports_of(module: str) -> Iterator[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            # `from kdcache import errors` imports a room, not a name.
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value)


def ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


def rooms_used(module: str) -> set[str]:
    return {room_of(name) for name in imports_of(module) if ours(name)} - {room_of(module)}


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_walk_finds_modules_and_imports() -> None:
    assert {"kdcache", "kdcache.errors", "kdcache.training.trainer", "kdcache_kernels.ops", "kdcache_cli.app"} <= set(
        MODULES
    )
    assert "kdcache_kernels.checks" in set(imports_of("kdcache_kernels.ops"))
    assert rooms_used("kdcache.training.api") >= {"data", "store", "models", "distill", "metrics"}


def test_every_room_is_in_the_table() -> None:
    assert {room_of(module) for module in MODULES} == {*ALLOWED, "kdcache", KERNELS, CLI}


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_run_one_way(room: str) -> None:
    wrong = {
        module: sorted(used)
        for module in MODULES
        if room_of(module) == room and (used := rooms_used(module) - ALLOWED[room])
    }
    assert not wrong


def test_rooms_form_no_circle() -> None:
    def below(room: str, path: tuple[str, ...] = ()) -> None:
        assert room not in path, path
        for other in ALLOWED.get(room, ()):
            below(other, (*path, room))

    for room in ALLOWED:
        below(room)


ORDER = [
    ("store.format", "store.backend", "store"),
    ("teacher.load", "teacher.build", "teacher.audit"),
    (
        "training.input",
        "training.config",
        "training.step",
        "training.run",
        "training.sources",
        "training.trainer",
        "training.api",
    ),
    ("bench.timing", "bench.kernels"),
    ("analysis", "analysis.report"),
]
"""Within a room: files of the left know nothing of those on the right. A room's name alone is its own floor."""


def on_floor(module: str, floor: str) -> bool:
    name = f"kdcache.{floor}"
    if floor.count(".") == 0:  # the room's own files, not those of its folders, and not its list of exports
        return module.startswith(f"{name}.") and module.count(".") == 2 and MODULES[module].name != "__init__.py"
    return module == name or module.startswith(f"{name}.")


@pytest.mark.parametrize("floors", ORDER, ids=lambda floors: floors[0].partition(".")[0])
def test_floors_of_a_room_are_in_order(floors: tuple[str, ...]) -> None:
    wrong = [
        (module, used)
        for at, floor in enumerate(floors)
        for module in MODULES
        if on_floor(module, floor)
        for used in imports_of(module)
        if used in MODULES and any(on_floor(used, higher) for higher in floors[at + 1 :])
    ]
    assert not wrong


IMPORT_BY_VALUE = {
    "kdcache": "its exported names, each from its home",
    "kdcache.bench.kernels.rivals": "kernels of other projects",
    "kdcache.distill.terms.registry": "the modules of terms",
    "kdcache.models.callables": "a network of the user",
    "kdcache_kernels.library": "a family of kernels: cpu or gpu",
    "kdcache.data.layouts.registry": "a layout, by its file",
    "kdcache_kernels.on_cells.library": "a family of kernels: cpu or gpu",
}
"""Files that import a module by a name that is a value, and what."""


def test_a_name_that_is_imported_is_written_out() -> None:
    by_value = {
        module
        for module, path in MODULES.items()
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        and called(node).endswith("import_module")
        and not isinstance(node.args[0], ast.Constant)
    }
    assert by_value == set(IMPORT_BY_VALUE)


def test_files_form_no_circle() -> None:
    """Imports for type checkers count."""
    graph = {module: {used for used in imports_of(module) if used in MODULES} - {module} for module in MODULES}
    done = set[str]()
    while len(done) < len(graph):
        free = {module for module, used in graph.items() if module not in done and used <= done}
        assert free, sorted(module for module in graph if module not in done)
        done |= free


MOST_FILES = 15
LARGER = {"cli/kdcache_cli/verbs", "kdcache/verbs"}  # a file per verb


def test_a_folder_holds_few_files() -> None:
    count = Counter(path.parent.relative_to(ROOT).as_posix() for path in MODULES.values())
    assert {folder: files for folder, files in count.items() if files > MOST_FILES and folder not in LARGER} == {}


def test_kernels_know_nothing_of_kdcache() -> None:
    assert all(not rooms_used(module) for module in MODULES if room_of(module) == KERNELS)


def test_nothing_imports_the_command_line() -> None:
    assert not [module for module in MODULES if CLI in rooms_used(module)]


def test_the_command_line_imports_the_library_alone() -> None:
    assert not [module for module in MODULES if room_of(module) == CLI and KERNELS in rooms_used(module)]


@pytest.mark.parametrize("foreign", ["torch", "torchvision", "triton"])
def test_the_store_knows_no_models(foreign: str) -> None:
    names = {name.partition(".")[0] for m in MODULES if room_of(m) == "store" for name in imports_of(m)}
    assert foreign not in names


def test_the_losses_know_tensors_alone() -> None:
    roots = {n.partition(".")[0] for m in MODULES if room_of(m) in ("distill", KERNELS) for n in imports_of(m)}
    assert not roots & {"zarr", "PIL", "torchvision", "pydantic", "typer", "safetensors"}


def test_exported_names() -> None:
    import kdcache

    assert sorted(kdcache.__all__) == EXPORTED
    for name in EXPORTED:
        assert getattr(kdcache, name).__name__ == name
        assert callable(getattr(kdcache, name))
    assert dir(kdcache) == sorted(["__doc__", "__version__", *EXPORTED])
    with pytest.raises(AttributeError, match="nothing"):
        kdcache.nothing  # noqa: B018


def test_type_checkers_see_what_is_exported() -> None:
    tree = tree_of(MODULES["kdcache"])
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    import kdcache

    assert seen == kdcache.HOMES


@pytest.mark.parametrize("module", [m for m, path in MODULES.items() if path.name == "__init__.py"])
def test_every_exported_name_is_there_with_a_docstring(module: str) -> None:
    found = importlib.import_module(module)
    names = getattr(found, "__all__", [])
    assert len(set(names)) == len(names)
    bare = []
    for name in names:
        value = getattr(found, name)
        code = inspect.isfunction(value) or inspect.isclass(value)
        # A dataclass without a docstring gets its signature as one.
        if code and (not value.__doc__ or value.__doc__.startswith(f"{name}(")):
            bare.append(name)
    assert not bare


def test_the_version_is_that_of_the_project() -> None:
    import tomllib

    import kdcache

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert kdcache.__version__ == project["version"]


def test_packages_are_all_listed_for_installation() -> None:
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(setup["packages"]) == sorted(m for m, path in MODULES.items() if path.name == "__init__.py")
    assert setup["package-dir"] == {name: str(folder.relative_to(ROOT)) for name, folder in PACKAGES.items()}


HEAVY = ("torch", "triton", "matplotlib", "torchvision", "zarr", "numba")


WITHOUT_TORCH = (
    ("import kdcache", HEAVY),
    ("import kdcache_cli.app", (*HEAVY, "pydantic")),
    ("import kdcache.data", ("torch", "triton", "matplotlib", "zarr")),
    ("import kdcache.store", ("torch", "triton", "matplotlib", "torchvision")),
    ("import kdcache.sharing.hub, kdcache_cli.verbs.copy", ("torch", "huggingface_hub")),
)
WITH_TORCH = (
    ("import kdcache.distill", ("torchvision", "matplotlib", "zarr", "kdcache.store", "kdcache.models")),
    ("import kdcache.models", ("torchvision", "matplotlib", "zarr")),
    ("import kdcache.training", ("torchvision", "matplotlib", "kdcache.teacher")),
)
IMPORTS = """
import sys
for code, absent in {cases!r}:
    exec(code)
    found = [name for name in absent if name in sys.modules]
    assert not found, (code, found)
    for name in list(sys.modules):  # the next import finds none of kdcache
        if name.partition(".")[0] in ("kdcache", "kdcache_cli"):
            del sys.modules[name]
"""


@pytest.mark.parametrize("cases", [WITHOUT_TORCH, WITH_TORCH], ids=["without torch", "with torch"])
def test_importing_is_light(cases: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    """Of each process, whose imports are ordered by what they may load."""
    done = run(IMPORTS.format(cases=cases))
    assert done.returncode == 0, done.stderr


def test_help_is_shown_without_torch() -> None:
    code = (
        "import sys\nsys.argv = ['kdcache', 'train-student', '--help']\nfrom kdcache_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\nassert not found, found"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "--temperature" in done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_described_and_not_too_long(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert (ast.get_docstring(tree_of(MODULES[module])) or "").strip()


PROJECT_ERRORS = {
    *("KDCacheError", "StoreError", "IncompleteError", "CorruptError", "MismatchError", "VersionError", "DataError"),
    *("RecipeError", "ModelError", "KernelError", "ShapeError", "ValueRangeError"),
}


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What belongs to a function's own body, and not to one inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            yield child
            yield from own_nodes(child)


def public_functions(body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions and methods without an underscore, with their docstrings; a constructor has its class's too."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, node)
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            about_class = ast.get_docstring(owner) if owner is not None and node.name == "__init__" else None
            yield node, f"{ast.get_docstring(node) or ''} {about_class or ''}"


@pytest.mark.parametrize("package", ["kdcache", KERNELS])
def test_public_functions_say_which_errors_they_raise(package: str) -> None:
    silent = []
    for module in (module for module in MODULES if module.partition(".")[0] == package):
        for function, docstring in public_functions(tree_of(MODULES[module]).body):
            raised = {node.exc for node in own_nodes(function) if isinstance(node, ast.Raise) and node.exc is not None}
            names = {getattr(error.func if isinstance(error, ast.Call) else error, "id", "") for error in raised}
            if names & PROJECT_ERRORS and not re.search(r"\b[Rr]aise", docstring):
                silent.append(f"{module}.{function.name}")
    assert silent == []


def test_nothing_is_left_to_be_filled_in() -> None:
    """A table that is promised is there: no placeholder stands in code or docs."""
    pages = [*MODULES.values(), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    left = re.compile(r"\b(XX+|TODO|FIXME|TBD)\b")
    found = [f"{page}: {line}" for page in pages for line in page.read_text("utf-8").splitlines() if left.search(line)]
    assert found == []


LISTED = [
    "analysis",
    "bench",
    "data.memory",
    "data.rendering",
    "data.scenes",
    "data.tracing",
    "distill",
    "metrics",
    "models.architectures",
    "sharing",
    "store",
    "store.backend",
    "store.format",
    "sweep",
    "teacher",
    "teacher.audit",
    "teacher.build",
    "teacher.load",
    "training",
    "training.input",
    "training.run",
    "training.sources",
    "training.step",
    "verbs",
]


@pytest.mark.parametrize("room", LISTED)
def test_a_room_says_what_is_in_its_files(room: str) -> None:
    package = importlib.import_module(f"kdcache.{room}")
    listed = re.findall(r"^ {0,4}([a-z_]+(?:\.py|/)) ", package.__doc__ or "", re.MULTILINE)
    assert package.__file__ is not None
    there = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in Path(package.__file__).parent.iterdir()
        if path.name[0] not in "_."
        and (path.suffix == ".py" or (path.is_dir() and any(child.is_file() for child in path.iterdir())))
    ]
    assert sorted(listed) == sorted(there)


def test_files_are_replaced_in_one_way() -> None:
    """By `kdcache.files`, whose leftovers are known as such; a store has files of its own kind."""
    rooms = ("store", "files")
    own = [
        m
        for m, path in MODULES.items()
        if room_of(m) not in rooms and re.search(r"\.partial\b", path.read_text("utf-8"))
    ]
    assert own == []


def test_nothing_is_loaded_with_pickle() -> None:
    wrong = []
    for module, path in MODULES.items():
        for node in nodes_of(path):
            if isinstance(node, ast.Call):
                function = called(node)
                keywords = {k.arg: getattr(k.value, "value", None) is True for k in node.keywords}
                unsafe = function.startswith(("pickle.", "dill.", "joblib.")) or keywords.get("allow_pickle", False)
                unsafe |= function == "torch.load" and not keywords.get("weights_only", False)
                wrong += [(module, node.lineno, function)] if unsafe else []
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle":
                wrong += [(module, node.lineno, node.attr)] if node.attr not in PICKLE_ERRORS else []
        wrong += [(module, name) for name in imports_of(module) if name in ("dill", "joblib", "shelve", "marshal")]
    assert not wrong


SOURCES = ("kdcache", "kernels", "cli")
NOT_OURS = (("test_numba_cache.py", "_cache"), ("test_compiles.py", "_active"))
"""Private names of numba's dispatchers and of Triton's driver, which are also names of ours."""


def nodes_below(*folders: str) -> dict[Path, tuple[ast.AST, ...]]:
    return {path: nodes_of(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


def private_names(nodes: tuple[ast.AST, ...]) -> set[str]:
    """Private names that a file defines: functions, classes, variables and attributes."""
    store = ast.Store()
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", store), ast.Store)]
    names = {str(getattr(node, field, "")) for node in stored for field in ("name", "id", "attr")}
    return {name for name in names if re.fullmatch(r"_[A-Za-z](\w*[A-Za-z0-9])?", name)}


def private_uses(nodes: tuple[ast.AST, ...]) -> Iterator[tuple[int, object]]:
    """Lines and names that a file takes from others, as code and as text. Arguments may be any constant."""
    own = private_names(nodes)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and ours(node.module or ""):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and not (getattr(node.value, "id", "") == "self" and node.attr in own):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno, name) for name in re.findall(r"(?:\w\.|import )(_[A-Za-z]\w*)", node.value))
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def test_tests_use_public_names() -> None:
    private = {name for nodes in nodes_below(*SOURCES).values() for name in private_names(nodes)}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, nodes in nodes_below("tests").items()
        for line, name in private_uses(nodes)
        if name in private and (path.name, name) not in NOT_OURS
    ]
    assert wrong == []


def names_from_rooms(nodes: tuple[ast.AST, ...], room: str) -> set[tuple[str, str]]:
    """(module, name) of each import from a file or folder within another room."""
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module in MODULES]
    far = [node for node in found if str(node.module).count(".") > 1 and room_of(str(node.module)) not in (room, CLI)]
    return {(str(node.module), alias.name) for node in far for alias in node.names}


def test_tests_of_a_room_take_from_others_what_the_product_does() -> None:
    """Or what the other room exports."""
    rooms = {path: room_of(module) for module, path in MODULES.items()}
    product = nodes_below(*SOURCES, "benchmarks", "examples")
    public = {pair for path, nodes in product.items() for pair in names_from_rooms(nodes, rooms.get(path, ""))}
    wrong = [
        f"{path.relative_to(ROOT)}: {name} of {module}"
        for path, nodes in nodes_below("tests").items()
        for module, name in names_from_rooms(nodes, path.relative_to(ROOT).parts[1].replace("kernels", KERNELS))
        - public
        if name not in getattr(importlib.import_module(module), "__all__", ())
    ]
    assert wrong == []
