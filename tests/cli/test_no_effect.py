"""Settings that would change nothing fail, or are named in a note where that is harmless."""

from __future__ import annotations

import pytest

BASE = "train-student --cache {w}/store.zarr --model kdcache:tiny --iterations 2 --batch-size 4 --gradients-every 0"
REFUSED = [
    "--temperature 9 --kl-weight 5",
    "--method none --temperature 9",
    "--method none --gate correct",
    "--method none --class-balance sqrt",
    "--method none --no-distill-void",
    "--method none --distill-schedule fade",
    "--method none --teacher labels",
    "--method dice --gate confidence:0.7",
    "--ce-weight 0 --label-smoothing 0.1",
    "--ce-weight 0 --focal-gamma 2",
    "--ce-weight 0 --class-weights median",
    "--trust-against nowhere",
    "--balance uncertainty",
    "--task-weight depth=0.7",
    "--folds-by ^(.+)_",
    "--limit-views 9",
    "--val-fold 0/2",
]
NOTED = [
    "--val-split test",
    "--split train",
    "--depth-zoom divide",
    "--augment replay --scale 0.5:2",
    "--augment none --flip",
    "--augment none --jitter 0.5",
    "--method none --distill-on labelled",
    "--cache-dir copies",
    "--cache-bytes 5GB",
    "--labels none --class-weights sqrt",
    "--labels none --label-smoothing 0.1",
]


@pytest.mark.parametrize("flags", REFUSED)
def test_it_is_refused(world, cli, flags: str) -> None:
    ended = cli(*f"{BASE.format(w=world)} {flags} --out {world}/refused".split())
    assert ended.code == 2
    assert flags.split("--")[-1].split()[0] in ended.err
    assert "defect" not in ended.err
    assert not (world / "refused").exists()


@pytest.mark.parametrize("flags", NOTED)
def test_it_is_noted(world, cli, flags: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli(*f"{BASE.format(w=world)} {flags} --out {tmp_path}/run".split())
    assert ended.code == 0, ended.err
    idle = "--" + flags.split("--")[-1].split()[0]
    assert f"{idle} has no effect" in " ".join((ended.out + ended.err).split())


def test_defaults_are_not_noted(world, cli, tmp_path) -> None:
    ended = cli(*f"{BASE.format(w=world)} --out {tmp_path}/run".split())
    assert ended.code == 0, ended.err
    assert "has no effect" not in ended.out + ended.err
    again = cli(*f"train-student --recipe {tmp_path}/run/recipe.toml --out {tmp_path}/again".split())
    assert again.code == 0, again.err
    assert "has no effect" not in again.out + again.err


def test_a_weight_of_zero_is_always_taken(world, cli, tmp_path) -> None:
    ended = cli(*f"{BASE.format(w=world)} --method none --kl-weight 0 --out {tmp_path}/run".split())
    assert ended.code == 0, ended.err
