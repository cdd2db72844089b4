"""Damages of a cache, a run and a sweep against the commands that meet them: the table, and what does a row.

A row is a damage to one file, and a command. It ends in one of two ways:

    harmless    the command succeeds, and everything is what it is without the damage
    remedied    the command fails and prints a remedy. What is executed is parsed out of that text: its shell commands,
                the files that it says to delete, the command that it says to repeat. After it the command succeeds,
                and everything is what it is without the damage

As a script it does every row and writes the table: `python tests/trust/remedies.py benchmarks/results/remedies.md`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import matrix
import pytest
from matrix import BUILD, DATA, MACHINE, STUDENT, TEACHER, Ended, kdcache

HARMLESS, REMEDIED = "harmless", "remedied"
CACHE, RUN, HALF, SWEEP = "P.zarr", "r", "r-half", "sw"
OTHER = "Q.zarr"
"""A cache of another teacher, whose files get into the first."""
KINDS = {CACHE: "cache", RUN: "run", HALF: "unfinished run", SWEEP: "sweep"}
WRITTEN = {
    CACHE: f"{BUILD} --data {DATA} --out {CACHE}",
    RUN: f"{STUDENT} --cache {CACHE} --val {DATA} --out {RUN}",
    HALF: f"{STUDENT} --cache {CACHE} --val {DATA} --out {HALF}",
}
"""The commands that wrote what is damaged."""


def _sweep(name: str) -> Callable[[], Ended]:
    return lambda: matrix.sweep(DATA) if name == "jobs" else kdcache(f"sweep sweep.toml --data {DATA} --out {SWEEP}")


@dataclass(frozen=True)
class Command:
    """A column.

    Attributes:
        run: does it, in the folder of the world.
        needs: what it reads, and what its remedies need.
        makes: files whose bytes are the same whenever it succeeds.
    """

    run: Callable[[], Ended]
    needs: tuple[str, ...]
    makes: tuple[str, ...] = ()


COMMANDS: Mapping[str, Command] = {
    "verify": Command(lambda: kdcache(f"verify {CACHE}"), (CACHE, "t")),
    "train-student": Command(
        lambda: kdcache(f"{STUDENT} --cache {CACHE} --val {DATA} --out new"), (CACHE, "t"), ("new/last.safetensors",)
    ),
    "copy": Command(lambda: kdcache(f"copy {CACHE} copy.zarr"), (CACHE, "t"), ("copy.zarr/ledger.jsonl",)),
    "build again": Command(lambda: kdcache(WRITTEN[CACHE]), (CACHE, "t")),
    "evaluate": Command(
        lambda: kdcache(f"evaluate {RUN} --data {DATA} --device cpu --json out.json"), (CACHE, RUN), ("out.json",)
    ),
    "evaluate --weights last": Command(
        lambda: kdcache(f"evaluate {RUN} --data {DATA} --device cpu --weights last --json out.json"),
        (CACHE, RUN),
        ("out.json",),
    ),
    "report": Command(lambda: kdcache(f"report {RUN} --data {DATA} --repeats 0 --num 1 --out page.html"), (CACHE, RUN)),
    "--resume": Command(lambda: kdcache(f"{WRITTEN[RUN]} --resume"), (CACHE, RUN)),
    "--resume, unfinished": Command(lambda: kdcache(f"{WRITTEN[HALF]} --resume"), (CACHE, HALF)),
    "sweep, its jobs": Command(_sweep("jobs"), (SWEEP, "sweep.toml")),
    "sweep": Command(_sweep("all"), (SWEEP, "sweep.toml")),
}


def deleted(path: Path) -> None:
    path.unlink()


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another(path: Path) -> None:
    shutil.copy(Path(OTHER) / path.relative_to(CACHE), path)


def left_over(path: Path) -> None:
    """Leave what a kill leaves of a file that was being replaced."""
    path.with_name(f".{path.name}.partial").write_bytes(path.read_bytes()[:10])


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "deleted": deleted,
    "flipped": flipped,
    "truncated": truncated,
    "emptied": emptied,
    "another cache's": of_another,
    "left over": left_over,
}
LOSSES = ("deleted", "flipped", "truncated", "emptied")

OF_CACHES = {
    "zarr.json": "zarr.json",
    "spare": "manifest.json",
    "seal": "complete.json",
    "ledger": "ledger.jsonl",
    "ledger record": "ledger/00000001.json",
    "group": "targets/zarr.json",
    "array": "targets/segmentation/values/zarr.json",
    "ids": "samples/id_bytes/c/0",
    "targets": "targets/segmentation/values/c/1/0/0/0",
    "pixels": "pixels/image/c/1/0/0/0",
    "labels": "labels/segmentation/c/1/0/0",
    "windows": "records/window/c/1/0",
    "digests": "records/label_digest/c/1/0",
}
TOGETHER = (
    "complete.json ledger.jsonl",
    "zarr.json manifest.json",
    "zarr.json complete.json",
    "zarr.json manifest.json complete.json",
    "zarr.json manifest.json complete.json ledger.jsonl",
    "ledger.jsonl ledger/00000000.json ledger/00000001.json ledger/00000002.json",
)
"""Files that are lost at once."""


@dataclass(frozen=True)
class Row:
    """A damage and a command; `files` are those below the folder `of`, separated by spaces."""

    of: str
    files: str
    how: str
    command: str

    def __str__(self) -> str:
        return f"{KINDS[self.of]}-{self.files}-{self.how}-{self.command}".replace(" ", "_")


def _rows() -> Iterator[Row]:
    for file in OF_CACHES.values():
        for how in (*LOSSES, "another cache's", "left over"):
            yield from (Row(CACHE, file, how, command) for command in ("verify", "train-student", "copy"))
    yield from (Row(CACHE, files, "deleted", command) for files in TOGETHER for command in ("verify", "build again"))
    readers = {
        "best.safetensors": ("evaluate",),
        "last.safetensors": ("evaluate --weights last",),
        "model.json": ("evaluate", "--resume"),
        "recipe.toml": ("--resume",),
        "metrics.jsonl": ("report", "--resume"),
        "result.json": ("evaluate", "--resume"),
        "samples.json": ("evaluate", "--resume"),
        "checkpoint.pt": ("--resume",),
    }
    for file, commands in readers.items():
        yield from (Row(RUN, file, how, command) for how in LOSSES for command in commands)
    for file in ("recipe.toml", "model.json", "metrics.jsonl", "samples.json", "checkpoint.pt"):
        yield from (Row(HALF, file, how, "--resume, unfinished") for how in LOSSES)
    store, run, teacher = "stores/store.zarr/", "runs/kl/", "teachers/teacher/"
    of_jobs = [
        *("inputs.json", "sweep.toml", f"{run}result.json", f"{teacher}result.json", f"{teacher}best.safetensors"),
        *(f"{store}{file}" for file in ("zarr.json", "complete.json", "targets/segmentation/values/c/0/0/0/0")),
    ]
    yield from (Row(SWEEP, file, how, "sweep, its jobs") for file in of_jobs for how in LOSSES)
    of_tables = (f"{run}best.safetensors", f"{run}model.json", f"{run}recipe.toml", "pictures/visualise.json")
    yield from (Row(SWEEP, file, how, "sweep") for file in of_tables for how in ("deleted", "truncated"))


ROWS = tuple(_rows())


def in_tests(row: Row) -> bool:
    """Return whether a test does a row. The page has every row.

    File and damage decide what a command says of a cache, as the page shows. So the tests do each pair of a file and a
    damage once, each pair of a file and a command, and each pair of a damage and a command.
    """
    if row.of != CACHE or row.files in TOGETHER:
        return True
    damage, command = list(DAMAGES).index(row.how), ("verify", "train-student", "copy").index(row.command)
    return (list(OF_CACHES.values()).index(row.files) + damage + command) % 3 == 0


def make_world() -> None:
    """Make everything once, in the working folder, which holds nothing else."""
    matrix.make_data()
    for command in (
        f"{TEACHER} --data {DATA} --val {DATA} --out t",
        f"{TEACHER} --data {DATA} --val {DATA} --seed 1 --out t-other",
        WRITTEN[CACHE],
        f"build-teacher-cache --teacher t-other --views 1 --shard-records 3 {MACHINE} --data {DATA} --out {OTHER}",
        WRITTEN[RUN],
        f"sweep sweep.toml --data {DATA} --out {SWEEP}",
    ):
        ended = kdcache(command)
        assert ended.code == 0, ended.text
    matrix.half_trained(HALF, verb="train-student", cache=CACHE, method="kl")


class World:
    """An undisturbed world, and copies of it to damage.

    Args:
        base: its folder.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._whole: dict[str, dict[str, bytes]] = {}

    def copied(self, command: str, folder: Path) -> Path:
        """Copy what a command and its remedies read into a new folder."""
        folder.mkdir(parents=True)
        for name in dict.fromkeys((str(DATA), OTHER, "t", *COMMANDS[command].needs)):
            copy = shutil.copytree if (self._base / name).is_dir() else shutil.copy2
            copy(self._base / name, folder / name)
        return folder

    def whole(self, row: Row, folder: Path) -> dict[str, bytes]:
        """Return what a row must end with: what its command leaves without the damage."""
        if row.command not in self._whole:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.copied(row.command, folder))
                ended = COMMANDS[row.command].run()
                assert ended.code == 0, ended.text
                self._whole[row.command] = contents(row.command)
        return self._whole[row.command]


def contents(command: str) -> dict[str, bytes]:
    """Return what must be equal: every byte of caches, the weights and settings of runs, what the command makes."""
    names = {"best.safetensors", "last.safetensors", "model.json"}
    found = dict[str, bytes]()
    for top in (name for name in COMMANDS[command].needs if Path(name).is_dir()):
        for path in sorted(Path(top).rglob("*")):
            hidden = any(part.startswith(".") for part in path.parts)
            if path.is_file() and not hidden and (path.name in names or ".zarr" in str(path)):
                found[str(path)] = path.read_bytes()
    for made in COMMANDS[command].makes:
        found[made] = Path(made).read_bytes()
        if made.endswith(".json"):  # names the place of the data and the digest of a file with times in it
            known = json.loads(found[made]) | {"place": "", "images_sha256": ""}
            found[made] = json.dumps(known).encode()
    return found


def do(row: Row, world: World, folder: Path) -> tuple[str, str]:
    """Do a row in a new folder. Returns: how it ended, and the remedy that was executed. Raises: AssertionError."""
    whole = world.whole(row, folder.with_name(f"{folder.name}-whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.copied(row.command, folder))
        for file in row.files.split():
            DAMAGES[row.how](Path(row.of) / file)
        ended, remedy = COMMANDS[row.command].run(), ""
        if ended.code:
            assert "defect" not in ended.text, ended.text
            assert "Traceback" not in ended.text, ended.text
            remedy = follow(row, flat(ended.text))
            shutil.rmtree("new", ignore_errors=True)
            ended = COMMANDS[row.command].run()
        assert ended.code == 0, f"after {remedy!r}: {ended.text}"
        after = contents(row.command)
    names = {*whole, *after}
    if not remedy:  # the command does not read what is damaged
        names -= {f"{row.of}/{file}" for file in row.files.split()}
    if row.of == CACHE and (
        "delete all of" in remedy or "mv " in remedy
    ):  # another cache of the same content, with another time of its build
        names -= {f"{row.of}/{file}" for file in ("zarr.json", "manifest.json", "complete.json")}
    different = sorted(name for name in names if whole.get(name) != after.get(name))
    assert not different, f"after {remedy!r}: {different[:5]}"
    return (REMEDIED if remedy else HARMLESS), remedy


def flat(text: str) -> str:
    """Return printed text on one line, without the lines of a panel."""
    return " ".join(
        re.sub("[\N{BOX DRAWINGS LIGHT HORIZONTAL}-\N{BOX DRAWINGS LIGHT ARC UP AND RIGHT}]", " ", text).split()
    )


def follow(row: Row, text: str) -> str:
    """Execute the remedy in what a command printed. Returns: what was executed, in words. Raises: AssertionError."""
    accused, _, remedy = text.rpartition("fix: ")
    done = list[str]()
    for words in re.findall(r"\b(?:mv|rm) [^\s,;]+(?: [^\s,;]+)?(?=$|[,;]| or )", remedy):
        subprocess.run(shlex.split(words), check=True)
        done.append(words)
    for place in re.findall(r"delete all of ([^\s,;]+)", remedy):
        shutil.rmtree(place)
        done.append(f"delete all of {place}")
    if not done and (deleted := re.search(r"[Dd]elete (it|these files|(?P<path>\S+/[^\s,;]+))", remedy)):
        named = [deleted["path"]] if deleted["path"] else re.findall(rf"{re.escape(row.of)}/[^\s,;:]+", accused or text)
        for path in dict.fromkeys(named):
            Path(path).unlink()
            done.append(f"delete {path}")
    again = re.search(r"[Rr](un|epeat) the (first command|training|command( that (wrote|began|trained) it)?)", remedy)
    if again and row.of in WRITTEN and again[2] != "command":
        resumed = " --resume" in remedy and not any(words.startswith("mv") for words in done)
        line = WRITTEN[row.of] + " --resume" * resumed
        ended = kdcache(line)
        assert ended.code == 0, f"{line}, after {done}: {ended.text}"
        done.append(again[0])
    elif again:
        done.append(again[0])  # which the row does
    assert done, f"a dead end: {text}"
    return "; ".join(done)


ABOUT = (
    "Each damage was made in a copy of an undisturbed world. Each remedy was parsed out of what the command printed,",
    "and executed. Afterwards every byte of caches and weights was what it was. Only a cache that was made anew has",
    "another time of its build. Harmless: the command does not read the file, or repairs it by itself.",
)


def table(ended: Mapping[Row, tuple[str, str]]) -> str:
    """Return the page: counts, then a line for each row, rows that differ in the damage alone in one."""
    counts = Counter((KINDS[row.of], word) for row, (word, _) in ended.items())
    lines = ["# Remedies", "", *ABOUT, "", "```", "python tests/trust/remedies.py benchmarks/results/remedies.md"]
    lines += ["```", ""]
    lines += [f"| damaged | rows | {HARMLESS} | {REMEDIED} |", "| --- | ---: | ---: | ---: |"]
    for kind in KINDS.values():
        harmless, remedied = counts[kind, HARMLESS], counts[kind, REMEDIED]
        lines.append(f"| {kind} | {harmless + remedied} | {harmless} | {remedied} |")
    lines += [f"| all | {len(ended)} | {sum(word == HARMLESS for word, _ in ended.values())} | "]
    lines[-1] += f"{sum(word == REMEDIED for word, _ in ended.values())} |"
    lines += ["", "| damaged | file | how | command | what was executed |", "| --- | --- | --- | --- | --- |"]
    merged = dict[tuple[str, ...], list[str]]()
    for row, (_, remedy) in ended.items():
        files = ", ".join(f"`{row.of}/{file}`" for file in row.files.split())
        merged.setdefault((KINDS[row.of], files, row.command, remedy or "nothing: harmless"), []).append(row.how)
    lines += [
        f"| {kind} | {files} | {', '.join(hows)} | {command} | {remedy} |"
        for (kind, files, command, remedy), hows in merged.items()
    ]
    return "\n".join(lines) + "\n"


def main(out: Path) -> None:
    """Do every row and write the table. Exits with 1 after a row that fails, which it names."""
    out = out.absolute()
    ended, failed = dict[Row, tuple[str, str]](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["KDCACHE_CACHE_DIR"] = f"{scratch}/cache"
        base = Path(scratch) / "base"
        base.mkdir()
        os.chdir(base)
        make_world()
        world = World(base)
        for number, row in enumerate(ROWS):
            folder = Path(scratch) / str(number)
            try:
                ended[row] = do(row, world, folder)
            except (AssertionError, OSError, subprocess.CalledProcessError) as error:
                failed.append(f"{row}: {error}")
                print(failed[-1][:2000], flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{number + 1}/{len(ROWS)} {row}: {ended.get(row, ('FAILED', ''))}", file=sys.stderr, flush=True)
        os.chdir("/")
    if failed:
        sys.exit(f"{len(failed)} of {len(ROWS)} rows failed")
    out.write_text(table(ended), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
