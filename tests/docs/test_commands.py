"""The pages' commands: each parses, and each runs as it stands, on data that stand in for a user's.

A page says in a comment what it starts from (`<!-- starts from: camvid, runs/teacher -->`); a session makes these once.
Its blocks then run in order in a folder of its own: bash as it is, python as a program, toml with a title as a file of
that name. What is changed before is in SUBSTITUTIONS and nowhere else. A block that cannot run here has a comment with
the reason before it (`<!-- not run: why -->`).
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import typer
from fork_server import ForkServer
from safetensors.torch import save_file

import kdcache
from kdcache.data import write_scenes
from kdcache_cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SCENES = "scenes:48x64,train={train},val=6"
FEW = 14
"""As many blocks may say that they are not run."""
SUBSTITUTIONS = [
    # kdcache is installed already.
    (r"python3 -m venv \.venv && \.venv/bin/pip install \. && \.venv/bin/kdcache", "kdcache"),
    # Trainings are short, and images small.
    (r"(?m)^(kdcache (?:train-\w+ (?!.*--iterations)|demo)(?:[^#\n]*[^#\s])?)", r"\1 --iterations 2"),
    (r"--iterations \d+", "--iterations 2"),
    (r"(?m)^iterations = \d+", "iterations = 2"),
    # An encoder of stride 32 takes multiples of 32.
    (r"--size 160x224", r"--size 64x96"),
    (r"(--size |size = \")(?!64x96)\d+x\d+", r"\g<1>48x64"),
    (r"--(crop|window) \d+x\d+", r"--\1 32x32"),
    (r"--stride \d+x\d+", "--stride 16x16"),
    # Scenes have no sequences: the last digit stands for one.
    (r"--folds-by '[^']*'", "--folds-by '.$'"),
    (r"--teacher-size \d+x\d+", "--teacher-size 64x96"),
    (r"--views \d+", "--views 2"),
    (r"(--limit-(?:samples|labels) |head -)\d+", r"\g<1>4"),
    # A teacher of two iterations is sure of nothing.
    (r"--threshold 0\.7", "--threshold 0.1"),
    # CamVid has 11 classes, scenes have 7.
    (r"\b(build\(|classes=)11\b", r"\g<1>7"),
    # Nothing is measured for half a minute.
    (r" --measure-disk", ""),
    # Benchmarks look at little, once.
    (r"--shapes camvid|(?<=bench-kernels) (?=--against)", " --shapes 1x3x16x16/4 --repeats 3 "),
    (r"--against eager,compile,chunked", "--against eager,chunked --no-memory"),
    (r"bench-kernels --check", "bench-kernels --check --dtype fp32"),
]
"""Pattern and what stands in its place, one after the other, in lines whose continuations are joined."""
REPEATED = "kdcache demo --iterations 2\n"
"""A block of several pages that no later block builds on. It runs on the first of them."""
GROUPS = ("data",)
"""Verbs of two words begin with one of these."""
FOREIGN_FLAGS = {
    "--head",
    "--max-restarts",
    "--help",
    "--install-completion",
    "--nproc-per-node",
    "--slow",
    "--kernels",
    "--dry",
}
_FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?$')
_NOT_RUN = re.compile(r"<!-- not run: (.*) -->")
_START = re.compile(r"<!-- starts from: (.*) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block. `not_run` is the reason that stands before it; `where` is PAGE:LINE."""

    where: str
    language: str
    title: str | None
    text: str
    not_run: str | None


def blocks_of(name: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    opened: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines):
        if opened is not None and line == "```":
            first, fence = opened
            reason, above = None, first - 1
            while above >= 0 and lines[above].startswith("<!--"):
                found = _NOT_RUN.fullmatch(lines[above])
                reason, above = found[1] if found else reason, above - 1
            text = "\n".join(lines[first + 1 : number]) + "\n"
            yield Block(f"{name}:{first + 1}", fence["language"], fence["title"], text, reason)
            opened = None
        elif opened is None and (found := _FENCE.fullmatch(line)):
            opened = number, found
    assert opened is None, f"{name}: a block without an end"


def runnable(name: str) -> list[Block]:
    """What runs of a page; what it includes from examples/, and the format's reader, have tests of their own."""
    chosen = []
    for block in blocks_of(name):
        included = block.text.startswith("--8<--") or (name == "docs/format.md" and block.language == "python")
        wanted = block.language in ("bash", "python") or block.title is not None
        if wanted and block.not_run is None and not included:
            chosen.append(block)
    return chosen


def substituted(text: str) -> str:
    text = text.replace("\\\n", " ")
    for pattern, instead in SUBSTITUTIONS:
        text = re.sub(pattern, instead, text)
    return text


def has_repeated(name: str) -> bool:
    return any(substituted(block.text) == REPEATED for block in runnable(name))


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words after `kdcache` of its commands."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            words = shlex.split(part)
            if "kdcache_cli" in words:
                yield words[words.index("kdcache_cli") + 1 :]
            elif words and Path(words[0]).name == "kdcache":
                yield words[1:]


def verbs() -> dict[str, typer.core.TyperCommand]:
    """Verb -> its command; those of a group by their two words."""
    found = dict(typer.main.get_command(app).commands)
    for group in GROUPS:
        found |= {f"{group} {name}": verb for name, verb in found.pop(group).commands.items()}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run or not, with its real values: verb, flags, required ones, types."""
    monkeypatch.chdir(tmp_path)
    known = verbs()
    for block in blocks_of(name):
        if block.language != "bash":
            continue
        for words in commands_of(block):
            verb = " ".join(words[:2]) if words[0] in GROUPS else words[0]
            assert verb in known, f"{block.where}: no verb {verb}"
            given = [word for word in words[len(verb.split()) :] if word != "--trust"]  # of every verb
            if "--recipe" in given:  # the file must be there and may give what is required
                (tmp_path / "recipe.toml").write_text("")
                given[given.index("--recipe") + 1] = "recipe.toml"
            try:
                known[verb].make_context(verb, given)
            except Exception as error:
                pytest.fail(f"{block.where}: {verb}: {error!r}")


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_and_verb_that_is_named_exists(name: str) -> None:
    known = verbs()
    flags = {flag for verb in known.values() for option in verb.params for flag in option.opts + option.secondary_opts}
    flags |= {flag for option in typer.main.get_command(app).params for flag in option.opts}  # of every verb
    text = re.sub(r"\b\w+\.py --[^`\n]*", "", (ROOT / name).read_text(encoding="utf-8"))  # they have their own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    assert named <= flags | FOREIGN_FLAGS, f"no verb has {sorted(named - flags - FOREIGN_FLAGS)}"
    for verb in re.findall(r"`kdcache ([a-z-]+(?: [a-z]+)?)", text):
        assert verb in known or verb.split()[0] in known, f"no verb {verb}"


@pytest.mark.parametrize("name", NAMES)
def test_programs_use_names_of_kdcache_that_importing_it_gives(name: str) -> None:
    """A fork has imported all modules, and would find those of which a page has not said so."""
    programs = [ast.parse(block.text) for block in runnable(name) if block.language == "python"]
    parts = [part for program in programs for part in ast.walk(program) if isinstance(part, ast.Attribute)]
    used = {part.attr for part in parts if isinstance(part.value, ast.Name) and part.value.id == "kdcache"}
    assert used <= set(kdcache.__all__), used - set(kdcache.__all__)


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    reasons = [block.not_run for name in NAMES for block in blocks_of(name) if block.not_run is not None]
    marks = sum((ROOT / name).read_text(encoding="utf-8").count("<!-- not run") for name in NAMES)
    assert len(reasons) == marks, "a mark stands right before a block, as <!-- not run: why -->"
    assert all(len(reason) > 12 for reason in reasons)
    assert 0 < len(reasons) <= FEW
    assert len([block for name in NAMES for block in runnable(name)]) > 4 * len(reasons)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages start from: data, a teacher, its store, two students, photos."""
    root = tmp_path_factory.mktemp("pages")
    commands = """
        train-teacher --data camvid --model kdcache:base --size 48x64 --iterations 2 --out runs/teacher
        build-teacher-cache --data camvid --teacher runs/teacher --out camvid.zarr
        train-student --cache camvid.zarr --model kdcache:tiny --val camvid --iterations 2 --method none --out runs/none
        train-student --cache camvid.zarr --model kdcache:tiny --val camvid --iterations 2 --method kl --out runs/kl
    """
    with contextlib.chdir(root):
        write_scenes("camvid", SCENES.format(train=12))
        write_scenes("camvid-more", SCENES.format(train=16))
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        save_file(vit.state_dict(), "vit.safetensors")
        for command in commands.strip().splitlines():
            app(command.split(), standalone_mode=False)
        Path("photos").mkdir()
        for source, letter in zip(sorted(Path("camvid/images/val").iterdir()), "ab", strict=False):
            shutil.copy(source, f"photos/{letter}.png")
    return root


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in NAMES if runnable(name)])
def test_every_command_runs(name: str, world: Path, forks: ForkServer, hub_server: Any, tmp_path: Path) -> None:
    start = _START.search((ROOT / name).read_text(encoding="utf-8"))
    for given in start[1].split(", ") if start else ():
        copy = shutil.copytree if (world / given).is_dir() else shutil.copy
        copy(world / given, tmp_path / given)
    with contextlib.ExitStack() as stack:
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        if name == "docs/sharing.md":  # the Hub's library reads its address when it is imported
            variables |= {"HF_HUB_OFFLINE": "0", **hub_server.environment(tmp_path)}
            forks = stack.enter_context(ForkServer(tmp_path / "forks", **variables))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        _run(name, tmp_path, forks.environment(os.environ | variables | {"PATH": path}))


def _run(name: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """Run a page's blocks in order, in a folder."""
    for block in runnable(name):
        text = substituted(block.text)
        if text == REPEATED and name != next(filter(has_repeated, NAMES)):
            continue
        if block.title is not None:
            (tmp_path / block.title).write_text(text, encoding="utf-8")
            continue
        command = [*(["bash", "-euxo", "pipefail"] if block.language == "bash" else ["python"]), "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (
            f"{block.where} ended with {done.returncode}\n{done.stderr[-3000:]}{done.stdout[-1500:]}"
        )
