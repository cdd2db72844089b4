"""Map a teacher's classes to the data's: several teacher classes may become one, some may be dropped."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError, suggest
from kdcache.heads import CategoricalHead
from kdcache.models.native import Outputs, SegmentationModel
from kdcache.tasks import SEGMENTATION

DROPPED = -1
_VOID = "void"


def read_class_map(
    path: str | Path, teacher_classes: int, class_names: Sequence[str], *, all_hit: bool = True
) -> Tensor:
    """Read a class map, a file that says which class of the data each class of the teacher becomes.

    A text file has a line `<teacher id> <data class>` for each teacher class, and `#` starts a comment. A JSON file
    holds `{"0": "Sky", "1": "void", ...}`. A data class is a name, an id, or `void` to drop the teacher class. Names
    come first: a data class that is called `3` or `void` is found by this name.

    Args:
        path: the file.
        teacher_classes: the number of teacher classes. The file must list each of them once.
        class_names: the names of the data's classes, in the order of their ids.
        all_hit: True if each data class must have at least one teacher class.
    Returns: int64 (teacher_classes,): the data class id, or -1 for a dropped class.
    Raises: ModelError, which names the wrong line, class or name.
    """
    path = Path(path)
    table: dict[int, int] = {}
    for where, teacher, target in _entries(path):
        index = int(teacher) if teacher.isdecimal() else -1
        if not 0 <= index < teacher_classes:
            _refuse(f"Unknown teacher id {teacher!r} in {where}", f"Correct it: ids are 0 to {teacher_classes - 1}.")
        if index in table:
            _refuse(f"Teacher class {index} is listed again in {where}", "Delete one of the lines.")
        table[index] = _target(target, where, class_names)
    absent = [str(i) for i in range(teacher_classes) if i not in table]
    if absent:
        _refuse(f"Missing teacher classes in {path}: {_some(absent)}", "Add them, with void to drop one.")
    unhit = [name for i, name in enumerate(class_names) if i not in table.values()]
    if unhit and all_hit:
        _refuse(
            f"No teacher class becomes {_some(unhit)} in {path}",
            "Map one to it. Otherwise the teacher can never teach it.",
        )
    return torch.tensor([table[i] for i in range(teacher_classes)], dtype=torch.int64)


def count_sources(path: str | Path) -> int:
    """Return the number of teacher classes in a class map: its largest id plus one.

    Raises: ModelError if the file cannot be read or lists no class.
    """
    ids = [int(teacher) for _, teacher, _ in _entries(Path(path)) if teacher.isdecimal()]
    if not ids:
        _refuse(f"No teacher class in {path}", "Write a line `<id> <name>` for each.")
    return max(ids) + 1


class ClassMerge(nn.Module):
    """A layer that merges logits of several classes into one, so that their probabilities are summed.

    Args:
        class_map: for each input class the output class, or -1 to drop it. Every output class needs an input class.

    Attributes:
        sources: (output classes, most) the input classes of each output class. `most` is the largest number of them.
        absent: bool, of the same shape, True for unused entries of `sources`.
    """

    sources: Tensor
    absent: Tensor

    def __init__(self, class_map: Sequence[int]) -> None:
        super().__init__()
        sources, absent = _merge_tables(class_map)
        self.register_buffer("sources", sources, persistent=False)
        self.register_buffer("absent", absent, persistent=False)

    def forward(self, logits_BChw: Tensor) -> Tensor:
        """Return the merged logits (B, output classes, h, w), in the dtype of the input (B, input classes, h, w)."""
        return _merge(logits_BChw, self.sources, self.absent)


class ClassMapped(SegmentationModel):
    """A teacher whose classes are mapped to the data's classes. Probabilities of merged classes are summed.

    If classes are dropped, the others' probabilities are rescaled to a sum of 1. The map is applied at the native
    stride. A bilinear resize of the result differs slightly from mapping after the resize.

    Args:
        model: the teacher. Its taps, stride, mean and std are kept.
        class_map: int64 (model.num_classes,): the data class id, or -1 for a dropped class (see `read_class_map`).
    Raises: ModelError if the map does not fit the model, or if a data class has no teacher class.
    """

    sources: Tensor
    absent: Tensor

    def __init__(self, model: SegmentationModel, class_map: Tensor) -> None:
        targets = [int(c) for c in class_map.tolist()]
        count = max(targets, default=-1) + 1
        if len(targets) != model.num_classes or count < 1 or set(targets) - {DROPPED} != set(range(count)):
            _refuse(
                f"Invalid class map {targets} for {model.spec}",
                f"Make it with read_class_map: {model.num_classes} teacher classes become 0..n-1, each hit, or -1.",
            )
        super().__init__(
            spec=model.spec,
            num_classes=count,
            stride=model.stride,
            taps=model.taps,
            align_corners=model.align_corners,
            head_kinds={**model.head_kinds, SEGMENTATION: CategoricalHead(count)},
        )
        self.model = model
        self.untrained = model.untrained
        self.mean, self.std = model.mean, model.std
        self.see_as(model)
        sources, absent = _merge_tables(targets)
        # In the state dict, so that another map is another digest.
        self.register_buffer("sources", sources)
        self.register_buffer("absent", absent)

    def forward(self, x_B3HW: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """Return the teacher's outputs, with its logits mapped to the data's classes.

        `x_B3HW` is normalised float RGB. `taps` are names of features to return.
        """
        outputs = self.model(x_B3HW, taps)
        return Outputs({**outputs.heads, SEGMENTATION: self.map_logits(outputs.logits)}, outputs.features)

    def map_logits(self, logits_BChw: Tensor) -> Tensor:
        """Map the teacher's logits (B, teacher classes, h, w) to logits (B, data classes, h, w) of the same dtype.

        The probabilities of merged classes are summed.
        """
        return _merge(logits_BChw, self.sources, self.absent)

    def check_taps(self, taps: Iterable[str]) -> None:
        """Check that the teacher has these taps. Raises: ModelError for an unknown one."""
        self.model.check_taps(taps)


def _merge_tables(targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return two tables (classes, most): the input classes of each output class, and True for the unused entries.

    `most` is the largest number of merged classes. With tables of a fixed size, merging is one gather for any map.
    """
    groups = [[i for i, c in enumerate(targets) if c == target] for target in range(max(targets) + 1)]
    most = max(len(g) for g in groups)
    sources = torch.tensor([g + [0] * (most - len(g)) for g in groups])
    return sources, torch.tensor([[j >= len(g) for j in range(most)] for g in groups])


def _merge(logits_BChw: Tensor, sources: Tensor, absent: Tensor) -> Tensor:
    """Return the merged logits (B, output classes, h, w), in the dtype of the input."""
    wide = logits_BChw if logits_BChw.dtype == torch.float64 else logits_BChw.float()
    gathered = wide[:, sources]  # (B, classes, most, h, w)
    gathered = gathered.masked_fill(absent[:, :, None, None], -torch.inf)
    return gathered.logsumexp(2).to(logits_BChw.dtype)


def _entries(path: Path) -> list[tuple[str, str, str]]:
    """Return (line or file, teacher id, data class) for each entry of a class map."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"Cannot read the class map {path}: {error}", fix="Check the path. A class map is a text file."
        ) from error
    return _json_entries(path, text) if text.lstrip().startswith("{") else _text_entries(path, text)


def _text_entries(path: Path, text: str) -> list[tuple[str, str, str]]:
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if content:
            teacher, _, target = content.partition(" ") if "\t" not in content else content.partition("\t")
            entries.append((f"line {number} of {path}", teacher.strip(), target.strip()))
    return entries


def _json_entries(path: Path, text: str) -> list[tuple[str, str, str]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a list keeps an id that is there twice
    except json.JSONDecodeError as error:
        raise ModelError(
            f"Cannot read the class map {path} as JSON: {error}",
            fix='Write {"<teacher id>": "<data class>", ...}, or one `<id> <name>` per line.',
        ) from error
    for key, value in pairs:
        if isinstance(value, bool) or not isinstance(value, str | int):
            _refuse(f"Invalid data class {value!r} for {key} in {path}", "Write a name, an id or void.")
    return [(str(path), key, str(value)) for key, value in pairs]


def _target(target: str, where: str, class_names: Sequence[str]) -> int:
    names = list(class_names)
    if target in names:
        return names.index(target)
    lowered = [name.lower() for name in names]
    if lowered.count(target.lower()) == 1:
        return lowered.index(target.lower())
    if target.lower() == _VOID:
        return DROPPED
    if target.isdecimal() and int(target) < len(names):
        return int(target)
    hint = suggest(target, names, f"Use one of {', '.join(names)}, or void.")
    raise ModelError(f"Unknown data class {target!r} in {where}", fix=hint)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _refuse(problem: str, fix: str) -> NoReturn:
    raise ModelError(problem, fix=fix)
