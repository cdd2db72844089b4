"""The inputs of each job of a sweep. A job is done if the digest of its inputs is the recorded one.

OUT/inputs.json has the contents of the data at the first run, and the inputs of each job that was done. A data set is
identified by its position among the data sets of the jobs, because its folder may be renamed.
"""

import hashlib
import json
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kdcache.data import Contents, changed_data, open_split, read_contents
from kdcache.data.changes import class_changes, digest_changes
from kdcache.data.files import file_digest
from kdcache.errors import RecipeError
from kdcache.files import MOST_CONTENTS, read_object, write_whole
from kdcache.run_folder import MODEL
from kdcache.settings.shared import ImageSettings
from kdcache.settings.streams import parse_stream
from kdcache.settings.training import Data
from kdcache.sweep.plan import Job, Sweep

INPUTS = "inputs.json"
_REPEATED = "build-teacher-cache"
"""A verb that leaves a finished result unchanged. Its jobs always run, so that a damaged cache is repaired."""


class Inputs:
    """The digests of the inputs of a sweep's jobs, stored in the sweep's folder. They show which jobs must run again.

    A job's inputs are its command, its data sets, and the results of the jobs that it needs.

    Raises: MismatchError if a data set has changed since the sweep was first run; DataError if it cannot be opened;
        RecipeError for a damaged inputs.json.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._path, self._lock = sweep.out / INPUTS, threading.Lock()
        self._jobs = {job.name: job for job in sweep.jobs}
        recorded = read_object(self._path, MOST_CONTENTS)
        if "digest" in recorded and recorded["digest"] != _digest({**recorded, "digest": ""}):
            raise self._damaged("its digest is another one")
        try:
            self._done = {str(name): str(digest) for name, digest in recorded.get("jobs", {}).items()}
            self._data: dict[str, Any] = dict(recorded.get("data", {}))
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(str(error)) from error
        self._begun = bool(self._done)  # until then nothing was made of the data, which may still be repaired
        self._digests = dict[str, str]()
        self._numbers = dict[str, int]()
        for job in sweep.jobs:
            for data, split in _data_of(job):
                self._compare(data, split, sweep.out)
        self._write()

    def are_done(self, job: Job) -> bool:
        """Return True if the job's result exists and was computed from the current inputs."""
        return is_done(job) and job.words[0] != _REPEATED and self._done.get(job.name) == self.digest(job)

    def digest(self, job: Job) -> str:
        """Return the SHA-256 (hex) of a job's command, its data sets, and the results of the jobs that it needs."""
        data = [self._digests[self._key(*pair)] for pair in _data_of(job)]
        before = [self._left(self._jobs[name]) for name in job.needs]
        return hashlib.sha256(json.dumps([without_folders(job.words), data, before]).encode()).hexdigest()

    def record(self, job: Job, digest: str) -> None:
        """Write into the sweep's inputs.json that a job was done with the inputs that `digest` identifies."""
        with self._lock:
            self._done[job.name] = digest
            self._write()

    def _left(self, job: Job) -> str:
        return file_digest(job.done) if job.done is not None and job.done.is_file() else ""

    def _compare(self, data: str, split: str, out: Path) -> None:
        key = self._key(data, split)
        if key in self._digests:
            return
        opened = open_split(data, split)
        contents = read_contents(opened)
        self._digests[key] = contents.digest
        if not self._begun:
            self._data[key] = {"classes": list(opened.classes.names), **contents.to_json()}
            return
        try:
            known = self._data[key]
            before, classes = Contents.from_json(known), tuple(known["classes"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"the contents of {key}: {error}") from error
        if changes := digest_changes(before, contents, class_changes(classes, opened.classes.names)):
            fix = f"Restore the data set. Or give another --out: {out} keeps the results of the data as they were."
            raise changed_data(out, changes, opened, fix)

    def _damaged(self, how: str) -> RecipeError:
        return RecipeError(
            f"Cannot read {self._path}: {how}",
            fix=f"Delete it, and repeat the command, which looks at every job again: rm {shlex.quote(str(self._path))}",
        )

    def _key(self, data: str, split: str) -> str:
        return f"{split} of data set {self._numbers.setdefault(data, len(self._numbers) + 1)}"

    def _write(self) -> None:
        content = {"data": self._data, "jobs": self._done, "digest": ""}
        write_whole(self._path, json.dumps(content | {"digest": _digest(content)}, indent=1) + "\n")


def _digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of inputs.json, to detect damage."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_done(job: Job) -> bool:
    """Return True if a job's file `done` exists and holds a JSON object that is not empty.

    For a training, model.json must also exist next to it. If `done` is None, return False.
    """
    if job.done is None or not read_object(job.done):
        return False
    return not job.words[0].startswith("train-") or (job.done.parent / MODEL).is_file()


def without_folders(words: Sequence[str]) -> list[str]:
    """Return `words`, a job's command, without the folders of its data sets.

    So two commands compare as equal if only these folders have other names.
    """
    flags = ("", *words)
    return [_without_folder(flag, word) for flag, word in pairwise(flags)]


def _without_folder(flag: str, word: str) -> str:
    if flag in ("--data", "--val"):
        return ""
    return json.dumps(parse_stream(word) | {"data": ""}) if flag == "--stream" else word


def _data_of(job: Job) -> Iterator[tuple[str, str]]:
    """Yield (data set, split) for each data set that a job's command names."""
    words = job.words
    flags: dict[str, list[str]] = {}
    for flag, value in pairwise(words):
        if flag.startswith("--"):
            flags.setdefault(flag, []).append(value)
    split = flags.get("--split", [ImageSettings.split])[-1]
    if "--cache" not in flags:
        yield from ((data, split) for data in flags.get("--data", []))
    yield from ((data, flags.get("--val-split", [Data.val_split])[-1]) for data in flags.get("--val", []))
    for stream in flags.get("--stream", []):
        table = parse_stream(stream)
        if "data" in table and "cache" not in table:
            yield str(table["data"]), str(table.get("split", split))
