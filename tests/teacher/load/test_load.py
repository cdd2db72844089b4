"""Where a teacher may come from, and what does not fit."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from kdcache.data import ClassList
from kdcache.errors import KDCacheError, MismatchError, ModelError, RecipeError
from kdcache.models import state_digest
from kdcache.models.export import export_model
from kdcache.models.run import load_run
from kdcache.teacher import load_teacher
from kdcache.teacher.load.fingerprint import fingerprint

CPU = torch.device("cpu")


def refusal(kind: type[KDCacheError], origin: str, classes: ClassList, **options: object) -> KDCacheError:
    with pytest.raises(KDCacheError) as caught:
        load_teacher(origin, classes, **options)
    assert type(caught.value) is kind, caught.value
    assert caught.value.fix
    return caught.value


def test_a_run(run_folder, classes, model_of) -> None:
    teacher = load_teacher(str(run_folder), classes)
    assert (teacher.size, teacher.class_map, teacher.notes) == ((32, 48), None, ())
    assert teacher.model.mean == (0.4, 0.5, 0.6)
    assert not teacher.model.training
    assert state_digest(teacher.model) == state_digest(model_of(len(classes)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_elsewhere(tmp_path, classes, model_of, suffix) -> None:
    model = model_of(len(classes))
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(dict(model.state_dict()), path)
    teacher = load_teacher(f"kdcache:tiny@{path}", classes)
    assert teacher.size is None
    assert not teacher.model.training
    assert state_digest(teacher.model) == state_digest(model)


def test_weights_in_a_folder_with_an_at_sign(tmp_path, classes, model_of) -> None:
    (tmp_path / "me@work").mkdir()
    path = tmp_path / "me@work" / "w.safetensors"
    save_file(dict(model_of(len(classes)).state_dict()), path)
    assert load_teacher(f"kdcache:tiny@{path}", classes).model.spec == "kdcache:tiny"


def test_a_run_in_a_folder_with_an_at_sign(run_folder, classes) -> None:
    moved = run_folder.rename(run_folder.with_name("run@home"))
    assert load_teacher(str(moved), classes).size == (32, 48)


def test_published_weights(monkeypatch, classes) -> None:
    """`@default` asks the library; here the network is replaced by a function."""
    from torchvision.models import _api

    from kdcache.models import build_model

    torch.manual_seed(0)
    published = dict(build_model("torchvision:lraspp_mobilenet_v3_large", 21).state_dict())
    asked = []

    def from_url(url: str, **_: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return published

    monkeypatch.setattr(_api, "load_state_dict_from_url", from_url)
    voc = ClassList(tuple(f"c{index}" for index in range(21)))
    teacher = load_teacher("torchvision:lraspp_mobilenet_v3_large@default", voc)
    assert len(asked) == 1
    assert asked[0].startswith("https://")
    assert teacher.model.num_classes == 21
    assert (
        "21 classes, but the data set has 9"
        in refusal(ModelError, "torchvision:lraspp_mobilenet_v3_large@default", ClassList(tuple("abcdefghi"))).problem
    )
    assert "kdcache:tiny" in refusal(ModelError, "kdcache:tiny@default", classes).problem


def test_a_bare_spec_has_no_weights(classes) -> None:
    error = refusal(ModelError, "kdcache:tiny", classes)
    assert "kdcache:tiny@FILE" in error.fix
    assert "as @default (downloaded)" in error.fix


def test_what_is_not_there(tmp_path, classes, run_folder) -> None:
    assert "nowhere" in refusal(RecipeError, str(tmp_path / "nowhere"), classes).problem
    assert "w.pth" in refusal(ModelError, f"kdcache:tiny@{tmp_path}/w.pth", classes).problem
    (tmp_path / "w.pth").touch()
    for spec in ("kdcache:tinny", "tiny"):
        assert "kdcache:tiny" in refusal(ModelError, f"{spec}@{tmp_path}/w.pth", classes).fix
    (run_folder / "best.safetensors").unlink()
    assert "no weights yet" in refusal(RecipeError, str(run_folder), classes).problem
    assert "has no model.json" in refusal(RecipeError, str(tmp_path), classes).problem


def test_another_number_of_classes(tmp_path, classes, model_of) -> None:
    save_file(dict(model_of(5).state_dict()), tmp_path / "w.safetensors")
    error = refusal(ModelError, f"kdcache:tiny@{tmp_path}/w.safetensors", classes)
    assert f"has 5 classes, but the data set has {len(classes)}" in error.problem
    assert "--class-map" in error.fix


def test_classes_in_another_order(run_folder, classes, tmp_path) -> None:
    """Of a run, and of weights that were exported from it, whose file says which classes are theirs."""
    names = (classes.names[1], classes.names[0], *classes.names[2:])
    export_model(*load_run(run_folder), tmp_path / "exported.safetensors")
    for origin in (str(run_folder), f"kdcache:tiny@{tmp_path}/exported.safetensors"):
        assert load_teacher(origin, classes).size == (32, 48)
        error = refusal(MismatchError, origin, ClassList(names))
        assert f"{names[0]} in the data" in str(error) or ", ".join(names) in error.problem
        assert "--class-map" in error.fix
    error = refusal(ModelError, f"kdcache:hydra@{tmp_path}/exported.safetensors", classes)
    assert "that file is of kdcache:tiny" in error.problem


def test_a_class_map(tmp_path, classes, model_of) -> None:
    """14 of the teacher's classes become the data's: some merge, one is dropped; probabilities are summed."""
    count = len(classes)
    model = model_of(14)
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    table = [*range(count), *[0, 1, 2, 0, 1, 2][: 13 - count], -1]
    lines = {str(i): "void" if c < 0 else classes.names[c] for i, c in enumerate(table)}
    (tmp_path / "map.json").write_text(json.dumps(lines))
    origin = f"kdcache:tiny@{tmp_path}/w.safetensors"
    teacher = load_teacher(origin, classes, class_map=tmp_path / "map.json")
    assert teacher.class_map == tuple(table)
    pixels = torch.rand(2, 3, 32, 48)
    with torch.inference_mode():
        own = model(pixels).logits.double()[:, :13].softmax(1)
        mapped = teacher.model(pixels).logits.double().softmax(1)
    summed = torch.stack([own[:, [i for i in range(13) if table[i] == c]].sum(1) for c in range(count)], 1)
    assert (mapped - summed).abs().max() < 1e-6
    print_of = fingerprint(teacher, "float32", CPU)
    assert print_of.class_map == tuple(table)
    table[0] = table[count]
    lines["0"], lines[str(count)] = classes.names[1], classes.names[0]
    (tmp_path / "map.json").write_text(json.dumps(lines))
    other = load_teacher(origin, classes, class_map=tmp_path / "map.json")
    assert any(line.startswith("class_map") for line in print_of.differences(fingerprint(other, "float32", CPU)))


def test_a_class_map_makes_another_order_explicit(tmp_path, run_folder, classes) -> None:
    names = (classes.names[1], classes.names[0], *classes.names[2:])
    (tmp_path / "map.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes.names)))
    teacher = load_teacher(str(run_folder), ClassList(names), class_map=tmp_path / "map.txt")
    assert teacher.class_map == (1, 0, *range(2, len(names)))


def test_mean_and_std_are_part_of_the_fingerprint(run_folder, weights, classes) -> None:
    for origin in (str(run_folder), f"kdcache:tiny@{weights}"):
        own = fingerprint(load_teacher(origin, classes), "float32", CPU)
        other = fingerprint(load_teacher(origin, classes, mean=(0, 0, 0), std=(1, 1, 1)), "float32", CPU)
        assert other.mean == (0, 0, 0)
        changed = [line.partition(":")[0] for line in own.differences(other)]
        assert changed == ["mean", "std", "probe"]
        assert own.differences(fingerprint(load_teacher(origin, classes), "float32", CPU)) == []


def test_other_weights_are_another_fingerprint(teacher, classes, model_of, tmp_path) -> None:
    save_file(dict(model_of(len(classes), seed=1).state_dict()), tmp_path / "other.safetensors")
    other = load_teacher(f"kdcache:tiny@{tmp_path}/other.safetensors", classes)
    own = fingerprint(teacher, "float32", CPU)
    assert [d.partition(":")[0] for d in own.differences(fingerprint(other, "float32", CPU))] == ["weights", "probe"]
    # A change far too small for the probe is still a change of the weights.
    with torch.no_grad():
        next(teacher.model.parameters())[0, 0, 0, 0] += 1e-6
    assert [d.partition(":")[0] for d in own.differences(fingerprint(teacher, "float32", CPU))] == ["weights"]


CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3, stride=4, padding=1)

    def forward(self, x):
        return self.conv(x){change}

def build(num_classes={classes}):
    return Net(num_classes)
"""


def test_changed_code_under_the_same_weights_is_caught(tmp_path, classes) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, len(classes), 3)
    save_file({f"conv.{name}": value for name, value in conv.state_dict().items()}, tmp_path / "w.safetensors")
    origin = f"{tmp_path}/net.py:build@{tmp_path}/w.safetensors"
    prints = []
    for change in ("", "  ", " * 1.5", ".flip(1)"):
        (tmp_path / "net.py").write_text(CODE.format(change=change, classes=len(classes)))
        prints.append(fingerprint(load_teacher(origin, classes), "float32", CPU))
    assert len({p.weights for p in prints}) == 1
    differences = [[d.partition(":")[0] for d in prints[0].differences(p)] for p in prints]
    assert differences == [[], [], ["probe"], ["probe"]]


def test_a_teacher_without_finite_answers_is_another_teacher(teacher) -> None:
    """NaN compares as equal to everything: it must not pass for the same."""
    own = fingerprint(teacher, "float32", CPU)
    for value in (float("nan"), float("inf")):
        broken = own.model_copy(update={"probe": (value, *own.probe[1:])})
        assert own.differences(broken)
        assert broken.differences(own)


def test_the_names_of_weights_from_elsewhere(tmp_path, classes, model_of) -> None:
    """The same names in another order are refused with the class map; others are noted; a class map silences both."""
    names = list(classes.names)
    origin = f"kdcache:tiny@{tmp_path}"
    save_file(dict(model_of(len(names)).state_dict()), tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"id2label": dict(enumerate([names[1], names[0], *names[2:]]))}))
    error = refusal(MismatchError, origin, classes)
    assert f"class 0 is {names[1]} in {origin} and {names[0]} in the data" in error.problem
    proposed = error.fix[error.fix.index("{") : error.fix.index("}") + 1]
    (tmp_path / "map.json").write_text(proposed)
    assert load_teacher(origin, classes, class_map=tmp_path / "map.json").class_map == (1, 0, *range(2, len(names)))
    config.write_text(json.dumps({"id2label": dict(enumerate([*names[:-1], "Auto"]))}))
    (note,) = load_teacher(origin, classes).notes
    assert "Auto in the weights" in note
    assert load_teacher(origin, classes, class_map=tmp_path / "map.json").notes == ()
    assert load_teacher(origin, classes, classified=False).notes == ()
    config.write_text(json.dumps({"id2label": dict(enumerate(names))}))
    assert load_teacher(origin, classes).notes == ()
    fewer = refusal(ModelError, origin, ClassList(tuple(names[:-1])))
    assert f'"{len(names) - 2}": "{names[-2]}", "{len(names) - 1}": "?"' in fewer.fix


def test_which_of_two_kinds_of_weights_is_said_and_chosen(tmp_path, classes, model_of) -> None:
    raw, average = model_of(len(classes)), model_of(len(classes), seed=1)
    torch.save({"model": raw.state_dict(), "model_ema": average.state_dict()}, tmp_path / "w.pth")
    teacher = load_teacher(f"kdcache:tiny@{tmp_path}/w.pth", classes)
    assert "model is taken, the raw ones" in teacher.notes[0]
    assert state_digest(teacher.model) == state_digest(raw)
    chosen = load_teacher(f"kdcache:tiny@{tmp_path}/w.pth:ema", classes)
    assert chosen.notes == ()
    assert state_digest(chosen.model) == state_digest(average)


SIGMOID = """
from torch import nn
def build(num_classes=3): return nn.Sequential(nn.Conv2d(3, num_classes, 4, stride=4), nn.Sigmoid())
"""


@pytest.mark.parametrize("form", ["function", "file", "run", "module"])
def test_what_outputs_are_is_part_of_the_fingerprint(tmp_path, run_folder, classes, form) -> None:
    """Of a function's spec, after its weights, of a run and of a module: a store knows the teacher by it."""
    (tmp_path / "nets.py").write_text(SIGMOID)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, len(classes), 4, stride=4), torch.nn.Sigmoid())
    torch.save(network.state_dict(), tmp_path / "w.pth")
    function, weights = f"{tmp_path}/nets.py:build", f"{tmp_path}/w.pth"
    plain, stated = {
        "function": (f"{function}@{weights}", f"{function},outputs=sigmoid@{weights}"),
        "file": (f"{function}@{weights}", f"{function}@{weights},outputs=sigmoid"),
        "run": (str(run_folder), f"{run_folder}@best,outputs=sigmoid"),
        "module": (network, network),
    }[form]  # fmt: skip
    other = load_teacher(plain, classes)
    teacher = load_teacher(stated, classes, outputs="sigmoid" if form == "module" else None)
    assert teacher.model.spec == f"{other.model.spec},outputs=sigmoid"
    assert state_digest(teacher.model) == state_digest(other.model)
    changed = fingerprint(teacher, "float32", CPU).differences(fingerprint(other, "float32", CPU))
    assert {line.partition(":")[0] for line in changed} == {"spec", "probe"}


def test_one_logit_of_a_teacher_stands_for_the_second_class(tmp_path) -> None:
    network = torch.nn.Conv2d(3, 1, 4, stride=4)
    for origin in (network, f"{tmp_path}/nets.py:build@{tmp_path}/w.pth"):
        (tmp_path / "nets.py").write_text("from torch import nn\ndef build(): return nn.Conv2d(3, 1, 4, stride=4)\n")
        torch.save(network.state_dict(), tmp_path / "w.pth")
        teacher = load_teacher(origin, ClassList(("background", "lesion")))
        assert teacher.model.num_classes == 2
        assert "it is that of lesion, and background has 0" in teacher.notes[-1]
        refused = refusal(ModelError, origin, ClassList(("a", "b", "c")))
        assert re.search(r"\b1 (channels|classes)\b", str(refused))
        (tmp_path / "map.txt").write_text("0 lesion\n1 background\n")
        mapped = load_teacher(origin, ClassList(("background", "lesion")), class_map=tmp_path / "map.txt")
        assert mapped.class_map == (1, 0)
