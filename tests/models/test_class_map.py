"""Class maps: probabilities add up; every mistake in the file is named."""

from pathlib import Path

import pytest
import torch

from kdcache.errors import ModelError
from kdcache.models import ClassMapped, build_model, read_class_map, state_digest
from kdcache.models.class_map import count_sources

NAMES = ["Sky", "Traffic light", "Road"]
TEXT = """# teacher to data
0 Sky
1 Traffic light   # the name has a space
2\tvoid
3 2
4 road
"""


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [TEXT, '{"0": "Sky", "1": "Traffic light", "2": "void", "3": 2, "4": "road"}'])
def test_reads_text_and_json(tmp_path: Path, text: str) -> None:
    table = read_class_map(_write(tmp_path / "map", text), 5, NAMES)
    assert table.dtype == torch.int64
    assert table.tolist() == [0, 1, -1, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("4 road", "4 raod"), r"'raod' in line 6[\s\S]*Did you mean Road"),
        (TEXT.replace("4 road", ""), "Missing teacher classes in .*: 4"),
        (TEXT.replace("1 Traffic light", "1 void"), "No teacher class becomes Traffic light"),
        (TEXT + "0 Sky", "0 is listed again in line 7"),
        (TEXT + "5 Sky", "'5' in line 7"),
        (TEXT + "x Sky", "'x' in line 7"),
        (TEXT.replace("3 2", "3 9"), "'9' in line 5"),
        (TEXT.replace("3 2", "3"), "'' in line 5"),
        ('{"0": "Sky"', "JSON"),
        ('{"0": "Sky", "0": "Road"}', "0 is listed again"),
        ('{"0": null}', "None for 0"),
        ("", "Missing teacher classes in .*: 0, 1, 2, 3, 4"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_class_map(_write(tmp_path / "map", text), 5, NAMES)


def test_a_map_has_a_class_more_than_its_largest_id(tmp_path: Path) -> None:
    assert count_sources(_write(tmp_path / "map.txt", TEXT)) == 5


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        read_class_map(tmp_path / "nowhere", 5, NAMES)


def test_probabilities_are_summed() -> None:
    torch.manual_seed(0)
    inner = build_model("kdcache:tiny", 5, mean=(0.1, 0.2, 0.3)).eval().double()
    mapped = ClassMapped(inner, torch.tensor([2, 0, 2, 1, 2]))
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    heads, features = mapped(x, ["stage2"])
    logits = heads["segmentation"]
    native = inner(x, ["stage2"])
    p = native.logits.softmax(1)
    expected = torch.stack([p[:, 1], p[:, 3], p[:, 0] + p[:, 2] + p[:, 4]], 1)
    torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(features["stage2"], native.features["stage2"])
    assert (mapped.num_classes, mapped.stride, mapped.taps) == (3, inner.stride, inner.taps)
    assert (mapped.mean, mapped.std) == (inner.mean, inner.std)
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in inner.parameters())


def test_dropped_classes_are_renormalised() -> None:
    torch.manual_seed(0)
    mapped = ClassMapped(build_model("kdcache:tiny", 5), torch.tensor([0, -1, 1, 1, -1]))
    logits = torch.randn(1, 5, 3, 4) * 20
    p = logits.softmax(1)
    remaining = torch.stack([p[:, 0], p[:, 2] + p[:, 3]], 1)
    torch.testing.assert_close(mapped.map_logits(logits).softmax(1), remaining / remaining.sum(1, keepdim=True))
    assert mapped.map_logits(logits.half()).dtype == torch.float16


def test_another_map_is_another_digest() -> None:
    inner = build_model("kdcache:tiny", 3)
    digests = {state_digest(ClassMapped(inner, torch.tensor(m))) for m in ([0, 1, 1], [1, 0, 1], [0, 1, -1])}
    assert len(digests) == 3


@pytest.mark.parametrize("table", [[0, 1], [0, 2, 2], [-1, -1, -1], [0, -2, 1]])
def test_map_must_fit_the_model(table: list[int]) -> None:
    with pytest.raises(ModelError, match="class map"):
        ClassMapped(build_model("kdcache:tiny", 3), torch.tensor(table))


def test_unknown_tap() -> None:
    mapped = ClassMapped(build_model("kdcache:tiny", 2), torch.tensor([0, 1]))
    with pytest.raises(ModelError, match="stage1"):
        mapped(torch.zeros(1, 3, 32, 32), ["stge1"])
