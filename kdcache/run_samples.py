"""The samples that a run learnt from and was validated on, as digests in samples.json of the run's folder.

With them a resumed training notices changed data, and a score on training images is reported as such.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdcache.data import Changes, Contents, Split, read_contents
from kdcache.data.changes import class_changes, digest_changes
from kdcache.files import MOST_CONTENTS, read_object, write_whole

SAMPLES = "samples.json"


@dataclass(frozen=True)
class RunSamples:
    """Digests of all samples that a run was trained and validated on, as in its samples.json.

    Attributes:
        class_names: the class names of the labels.
        streams: the training samples of each stream. None for a cache that does not record them.
        validation: the samples of the validation split. None without validation.
    """

    class_names: tuple[str, ...]
    streams: tuple[Contents | None, ...]
    validation: Contents | None = None

    def write(self, run: Path) -> None:
        """Write samples.json into a run folder. An interruption leaves either the old or the new file."""
        streams = [None if stream is None else stream.to_json() for stream in self.streams]
        validation = None if self.validation is None else self.validation.to_json()
        content = {"class_names": self.class_names, "streams": streams, "validation": validation}
        write_whole(run / SAMPLES, json.dumps(content) + "\n")

    @classmethod
    def read(cls, run: Path) -> "RunSamples | None":
        """Return the content of a run's samples.json, or None if the file is missing or damaged."""
        content = read_object(run / SAMPLES, MOST_CONTENTS)
        try:
            streams = tuple(None if stream is None else Contents.from_json(stream) for stream in content["streams"])
            validation = None if content["validation"] is None else Contents.from_json(content["validation"])
            return cls(tuple(map(str, content["class_names"])), streams, validation)
        except (ValueError, TypeError, KeyError):
            return None

    def changes(self, now: "RunSamples") -> Changes:
        """Return the changes of the first data set that changed since this run, or a false `Changes` if none did.

        The training data are compared first, stream by stream, then the validation data. A changed class list is also a
        change. `now` has the digests of today's data.
        """
        classes = class_changes(self.class_names, now.class_names)
        pairs = [*zip(self.streams, now.streams, strict=False), (self.validation, now.validation)]
        for before, after in pairs:
            if before is not None and after is not None and (changes := digest_changes(before, after, classes)):
                return changes
        return Changes(classes=classes)

    def trained_on(self, judged: Contents) -> tuple[str, ...]:
        """Return the ids of those samples in `judged` whose images the run was trained on."""
        trained = {row.tobytes() for stream in self.streams if stream is not None for row in stream.image}
        return tuple(name for name, row in zip(judged.ids, judged.image, strict=True) if row.tobytes() in trained)


def judging_notes(run: Path, split: Split, contents: Callable[[Split], Contents] = read_contents) -> tuple[str, ...]:
    """Return warnings about a run's score on a split: it was trained on some of these images, or the split has changed.

    Args:
        run: the run folder.
        split: the split on which the run is evaluated.
        contents: returns the digests of the split. A comparison passes a function that reads them once for all runs.

    Raises:
        DataError: a file of the split cannot be read.
    """
    samples = RunSamples.read(run)
    if samples is None:
        return ()
    judged, notes = contents(split), []
    where = f"{split.data}, split {split.split!r}"
    if trained := samples.trained_on(judged):
        notes.append(
            f"{len(trained)} of {len(judged.ids)} images of {where} were trained on, such as {trained[0]!r}: the "
            "score says little about other images. Judge on images that the run has not seen"
        )
    before = samples.validation
    if before is not None and len(set(before.ids) & set(judged.ids)) > len(judged.ids) // 2:
        changes = digest_changes(before, judged)
        if changes.images or changes.labels or changes.depths:
            notes.append(f"{where} has changed since the training was validated on it: {changes.describe()}")
    return tuple(notes)
