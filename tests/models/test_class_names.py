"""The class names that come with weights are those of the data, in its order, whatever file has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kdcache.errors import MismatchError, ModelError
from kdcache.models import build_model, read_class_map
from kdcache.models.class_names import class_map_text, compare_names, known_names, names_in
from kdcache.models.run import open_model
from kdcache.models.weights import read_weights

OURS = ("sky", "road", "car")
THEIRS = ("sky", "car", "road")


def state(classes: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(build_model("kdcache:tiny", classes).state_dict())


def config(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder of transformers'."""
    (folder / "config.json").write_text(json.dumps({"id2label": {str(i): name for i, name in enumerate(names)}}))
    save_file(state(len(names)), folder / "model.safetensors")
    return folder


def header(key: str, text: Callable[[tuple[str, ...]], str]) -> Callable[[Path, tuple[str, ...]], Path]:
    def write(folder: Path, names: tuple[str, ...]) -> Path:
        save_file(state(len(names)), folder / "w.safetensors", {key: text(names)})
        return folder / "w.safetensors"

    return write


def checkpoint(content: Callable[[tuple[str, ...]], dict[str, object]]) -> Callable[[Path, tuple[str, ...]], Path]:
    def write(folder: Path, names: tuple[str, ...]) -> Path:
        torch.save({**content(names), "state_dict": state(len(names))}, folder / "w.pth")
        return folder / "w.pth"

    return write


def by_id(names: tuple[str, ...]) -> dict[int, str]:
    return dict(enumerate(names))


FILES: dict[str, Callable[[Path, tuple[str, ...]], Path]] = {
    "a folder of transformers": config,
    "a file in one": lambda folder, names: config(folder, names) / "model.safetensors",
    "mmengine": checkpoint(lambda names: {"meta": {"dataset_meta": {"classes": names, "palette": [[0, 0, 0]]}}}),
    "mmcv": checkpoint(lambda names: {"meta": {"CLASSES": names, "PALETTE": None}}),
    "Lightning": checkpoint(lambda names: {"hyper_parameters": {"class_names": list(names)}}),
    "a table": checkpoint(lambda names: {"id2label": by_id(names)}),
    "a header": header("class_names", json.dumps),
    "a header of ids": header("id2label", lambda names: json.dumps(by_id(names))),
    "a header of Python": header("names", lambda names: str(by_id(names))),
    "a header of words": header("classes", ",".join),
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_names_are_found_and_compared(tmp_path: Path, write: Callable[[Path, tuple[str, ...]], Path]) -> None:
    """Another order is an error; without data the names are the file's."""
    weights = write(tmp_path, THEIRS)
    assert read_weights(weights).class_names == THEIRS
    text = f"kdcache:tiny@{weights}"
    with pytest.raises(MismatchError) as caught:
        open_model(text, data(OURS), (32, 48))
    assert "class 1 is car in" in caught.value.problem
    assert "road in the data" in caught.value.problem
    assert '{"0": "sky", "1": "car", "2": "road"}' in caught.value.fix
    model, _ = open_model(text, data(THEIRS), (32, 48))
    assert model.load_report is not None
    assert model.load_report.notes == ()
    _, description = open_model(text, lambda count: data([f"class {n}" for n in range(count)]), (32, 48))
    assert description.class_names == THEIRS


def data(names: tuple[str, ...] | list[str]) -> SimpleNamespace:
    return SimpleNamespace(names=tuple(names), colours=((0, 0, 0),) * len(names))


def test_a_proposed_class_map_is_read_and_silences(tmp_path: Path) -> None:
    weights = config(tmp_path, THEIRS)
    (tmp_path / "map.json").write_text(class_map_text(THEIRS, OURS))
    assert read_class_map(tmp_path / "map.json", 3, OURS).tolist() == [0, 2, 1]
    model, description = open_model(
        f"kdcache:tiny@{weights}", data(OURS), (32, 48), class_map=tmp_path / "map.json"
    )  # fmt: skip
    assert description.class_names == OURS
    assert model.load_report is not None
    assert model.load_report.notes == ()


@pytest.mark.parametrize("theirs", [
    ("Sky", "ROAD", "car "), ("LABEL_0", "LABEL_1", "LABEL_2"), ("class 0", "1", "Label-2"), ("sky", "LABEL_1", "car"),
    (),
])  # fmt: skip
def test_names_that_agree_or_say_nothing(theirs: tuple[str, ...]) -> None:
    assert compare_names("m@w", theirs, OURS) is None


def test_spelling_is_no_difference() -> None:
    assert compare_names("m@w", ("traffic light", "Side-Walk", "bike"), ("traffic_light", "sidewalk", "bike")) is None
    assert compare_names("m@w", ("__background__", "dog"), ("background", "dog")) is None
    with pytest.raises(MismatchError):
        compare_names("m@w", ("Side-Walk", "traffic light"), ("traffic_light", "sidewalk"))


def test_names_that_one_spelling_confuses_are_compared_as_they_are() -> None:
    assert compare_names("m@w", ("a b", "ab"), ("a b", "ab")) is None
    with pytest.raises(MismatchError):
        compare_names("m@w", ("a b", "ab"), ("ab", "a b"))


def test_other_names_are_a_warning_with_both_lists_and_the_map_that_silences() -> None:
    note = compare_names("m@w", ("Himmel", "Strasse", "Auto"), OURS)
    assert note is not None
    for part in ("Himmel, Strasse, Auto", "sky, road, car", '{"0": "sky", "1": "road", "2": "car"}'):
        assert part in note


def test_one_name_at_another_place_is_enough() -> None:
    with pytest.raises(MismatchError) as caught:
        compare_names("m@w", ("Himmel", "car", "Strasse"), OURS)
    assert '{"0": "?", "1": "car", "2": "?"}' in caught.value.fix


def test_another_number_of_names_is_said() -> None:
    note = compare_names("m@w", ("sky", "road"), OURS)
    assert note is not None
    assert "2 class names and predicts 3 classes" in note


def test_the_name_of_one_logit_is_that_of_the_second_class() -> None:
    assert compare_names("m@w", ("lesion",), ("background", "lesion")) is None
    with pytest.raises(MismatchError) as caught:
        compare_names("m@w", ("lesion",), ("lesion", "background"))
    assert '{"0": "background", "1": "lesion"}' in caught.value.fix
    assert known_names(("lesion",), ("class 0", "class 1")) == ("class 0", "lesion")


def test_many_names_are_shown_where_they_differ() -> None:
    ours = tuple(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(150))
    theirs = (*ours[:3], "Himmel", *ours[4:])
    note = compare_names("m@w", theirs, ours)
    assert note is not None
    assert "3 Himmel in the weights, 3 wordda in the data" in note
    assert ours[5] not in note.partition("in the data")[0]


@pytest.mark.parametrize(
    "value", [None, 3, "", [1, 2], {"a": "b"}, {1: "b"}, {0: 1}, ["LABEL_0", "LABEL_1"], "1,2", [], "ade20k", ["", "a"]]
)
def test_what_is_no_list_of_names_is_none(value: object) -> None:
    assert names_in({"class_names": value}) == ()
    assert names_in(value) == ()


def test_names_that_repeat_name_no_model() -> None:
    assert known_names(("a", "a"), ("class 0", "class 1")) == ("class 0", "class 1")
    assert known_names(("a", "LABEL_1"), ("class 0", "class 1")) == ("a", "class 1")


def test_a_count_that_differs_is_refused_as_before(tmp_path: Path) -> None:
    weights = config(tmp_path, THEIRS)
    with pytest.raises(ModelError, match="weights have 3 classes, and the data or their class map 2"):
        open_model(f"kdcache:tiny@{weights}", data(("sky", "road")), (32, 48))
