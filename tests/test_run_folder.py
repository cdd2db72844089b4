"""A run folder is read once, file by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.errors import RecipeError
from kdcache.models.run import split_spec
from kdcache.run_folder import Run, RunModel, is_run

MODEL = RunModel(
    spec="kdcache:tiny",
    class_names=("road", "sky"),
    class_colours=((1, 2, 3), (4, 5, 6)),
    size=(32, 48),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    trained_on="data x",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.json").write_text(MODEL.model_dump_json())
    return tmp_path


def test_a_run_is_what_its_folder_holds(folder: Path) -> None:
    (folder / "recipe.toml").write_text('method = "kl"\n')
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 2, "loss": 1.5}\n{"kind": "tra')
    (folder / "result.json").write_text('{"best_step": 2}')
    (folder / "environment.json").write_text('{"cpus": 2}')
    (folder / "last.safetensors").write_bytes(b"")
    run = Run.open(str(folder))
    assert run.model == MODEL
    assert run.recipe == {"method": "kl"}
    assert run.metrics == [{"kind": "train", "step": 2, "loss": 1.5}]
    assert run.result == {"best_step": 2}
    assert run.environment == {"cpus": 2}
    assert run.weights("last") == folder / "last.safetensors"
    with pytest.raises(RecipeError, match=r"best\.safetensors") as caught:
        run.weights()
    assert caught.value.problem == f"{folder} has no best.safetensors, only last"
    assert "Use --weights last" in caught.value.fix
    (folder / "last.safetensors").unlink()
    with pytest.raises(RecipeError, match="has no weights\n") as caught:
        Run.open(folder).weights()
    assert caught.value.fix.startswith("Restore it from a copy, or move the run away")


def test_a_folder_that_holds_a_model_alone_is_a_run(folder: Path) -> None:
    run = Run.open(folder)
    assert is_run(folder)
    assert (run.recipe, run.metrics, run.result, run.environment) == (None, None, {}, {})
    with pytest.raises(RecipeError, match="no weights yet"):
        run.weights()


def test_weights_may_be_named_with_the_run(folder: Path) -> None:
    for which in ("best", "best-ema"):
        (folder / f"{which}.safetensors").write_bytes(b"")
    run = Run.open(f"{folder}@best-ema")
    assert (run.folder, run.which, str(run)) == (folder, "best-ema", f"{folder}@best-ema")
    assert run.weights() == run.weights("last") == folder / "best-ema.safetensors"
    assert split_spec(f"{folder}@last") is None
    (folder / "best-ema.safetensors").unlink()
    with pytest.raises(RecipeError, match="Use --weights best, or runs of a training with --ema"):
        run.weights()
    with pytest.raises(RecipeError, match="one of best, last, best-ema, last-ema"):
        Run.open(f"{folder}@newest")


def test_files_are_read_once(folder: Path) -> None:
    (folder / "recipe.toml").write_text("seed = 0\n")
    run = Run.open(folder)
    assert run.recipe == {"seed": 0}
    for path in folder.iterdir():
        path.unlink()
    assert (run.model, run.recipe) == (MODEL, {"seed": 0})


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe\x00"])
def test_a_damaged_recipe_harms_only_who_asks_for_it(folder: Path, content: bytes) -> None:
    (folder / "recipe.toml").write_bytes(content)
    run = Run.open(folder)
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        _ = run.recipe


@pytest.mark.parametrize(("content", "problem"), [(None, "has no model.json"), ("", "is empty"), ("{}", "holds")])
def test_what_is_no_run_is_refused(folder: Path, content: str | None, problem: str) -> None:
    path = folder / "model.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        Run.open(folder)
    assert problem in caught.value.problem
