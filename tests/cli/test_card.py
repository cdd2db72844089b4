"""`inspect --card`: the command builds the same store again, a run's recipe trains it again; what is refused."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

from kdcache.store import open_cache


def command(card):
    """The words of the build's command."""
    text = re.search(r"```bash\n(kdcache build-teacher-cache .*?)\n```", card, re.DOTALL)[1]
    return shlex.split(text.replace("\\\n", " "))[1:]


BUILDS = {
    "as it comes": "--views full",
    "views": "--views 3 --view-scale 0.7:1.3333333333 --view-seed 5 --no-view-flip --shard-records 4 --batch-size 3",
    "crops": "--crop 24x32 --views 2 --raw-logits --top-k 2 --pixels source --codec small",
    "features": "--views 2 --features stage1 --statistics at:stage1,at:head --teacher-size 64x96 --teacher-grid view",
    "augmented": "--views full --tta flip,scales=0.75:1.0",
}


@pytest.mark.parametrize("flags", BUILDS.values(), ids=list(BUILDS))
def test_the_command_builds_the_same_store_again(made, cli, tree, tmp_path, flags) -> None:
    """Every array file byte for byte; of the manifest all but the time."""
    inputs = ["--data", str(made / "data"), "--teacher", str(made / "teacher")]
    first = cli("build-teacher-cache", *inputs, *flags.split(), "--threads", 1, "--out", tmp_path / "first.zarr")
    assert first.code == 0, first.err
    places = {"DATA": made / "data", "TEACHER": made / "teacher", "TEACHER_1": made / "teacher"}
    words = command(cli("inspect", tmp_path / "first.zarr", "--card").out)
    words = [str({**places, "CACHE.zarr": tmp_path / "second.zarr"}.get(word, word)) for word in words]
    second = cli(*words)
    assert second.code == 0, second.err
    one, other = (open_cache(tmp_path / name).manifest for name in ("first.zarr", "second.zarr"))
    assert one.differences(other) == []
    files = [
        {key: content for key, content in tree(tmp_path / name).items() if "/c/" in key}
        for name in ("first.zarr", "second.zarr")
    ]
    assert files[0] == files[1]


def test_the_card_of_a_run(made, cli, tmp_path, monkeypatch) -> None:
    """Its recipe, taken from the card, trains the same weights again where its cache lies."""
    monkeypatch.chdir(made)
    run = tmp_path / "run"
    words = f"train-student --cache {made}/store.zarr --model kdcache:tiny --method kl --iterations 3 --batch-size 2"
    assert cli(*words.split(), "--seed", 7, "--threads", 1, "--out", run).code == 0
    ended = cli("inspect", run, "--card")
    assert ended.code == 0, ended.err
    seal = open_cache(made / "store.zarr").ledger.completion.digest
    assert f"seal sha256:{seal}" in ended.out
    assert re.search(r"versions \| kdcache [^|]*torch ", ended.out)
    (tmp_path / "recipe.toml").write_text(re.search(r"```toml\n(.*?)\n```", ended.out, re.DOTALL)[1])
    command = shlex.split(re.search(r"```bash\nkdcache (.*?)\n```", ended.out)[1])
    places = {"recipe.toml": tmp_path / "recipe.toml", "RUN": tmp_path / "again"}
    assert cli(*(places.get(word, word) for word in command)).code == 0
    weights = [(folder / "last.safetensors").read_bytes() for folder in (run, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_the_card_of_a_run_that_has_not_ended(made, cli, tmp_path) -> None:
    run = shutil.copytree(made / "teacher", tmp_path / "run")
    for name in ("result.json", "environment.json", "best.safetensors", "last.safetensors", "recipe.toml"):
        (run / name).unlink(missing_ok=True)
    ended = cli("inspect", run, "--card")
    assert ended.code == 0, ended.err
    assert "has not ended" in ended.out
    assert "no weights" in ended.out


WRONG = {
    "json": (["store.zarr", "--card", "--json"], "Cannot use --json with --card"),
    "report": (["store.zarr", "--card", "--teacher-report"], "Cannot use --teacher-report with --card"),
    "data": (["store.zarr", "--card", "--data", "data"], "Cannot use --data without --teacher-report"),
    "no store": (["data", "--card"], "Cache not found: data"),
    "nothing": (["nowhere", "--card"], "nowhere"),
    "a run without --card": (["teacher"], "--card"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_has_no_card(made, cli, monkeypatch, wrong) -> None:
    words, message = WRONG[wrong]
    monkeypatch.chdir(made)
    ended = cli("inspect", *words)
    assert ended.code == 2
    assert message in " ".join(ended.err.split())
