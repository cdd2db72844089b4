"""Settings of a training: ranges, recipe files, what the data fills in."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kdcache.errors import RecipeError
from kdcache.run_folder import write_local
from kdcache.settings import entries
from kdcache.settings.training import TRAINING
from kdcache.store.format.teacher_models import Processor
from kdcache.training import TrainConfig, make_config, read_config
from kdcache.training.checks import check_flip, check_processes, warmup_notes

BASE: dict[str, Any] = {"verb": "train-student", "model": "kdcache:tiny", "cache": "x.zarr", "val": "x"}
NAN, INFINITY = float("nan"), float("inf")

WRONG = {
    "verb": ["train", None],
    "model": [None, 3],
    "method": ["", "kll", "kl+kl", "none+kl", "kl,at"],
    "term": [
        ["focal"],
        ["at,weight=-1"],
        ["at,temperature=2"],
        ["pseudo,threshold=1.5"],
        ["consistency,threshold=0"],
        [{"weight": 1}],
        3,
    ],
    "distill_on": ["void"],
    "distill_schedule": ["linear", "warmup", "warmup:0", "warmup:x", "warmup:-1"],
    "gate": ["wrong", "confidence", "confidence:1", "confidence:nan", "correct:0.5"],
    "class_balance": ["mean"],
    "mix": ["mixup", "cutmix:0", "classmix:2", "cutmix:x"],
    "limit_samples": [0, -1, NAN],
    "limit_labels": [0, -0.5, INFINITY],
    "labelled_share": [0, 1, -0.5, INFINITY],
    "val_share": [0, 1, -0.5, INFINITY],
    "limit_views": [0, 1.5],
    "sampling": ["common", "rare:", "rare:0", "rare:-1", "rare:x", "rare:nan", "rare:inf", None],
    "fold": ["1", "2/2", "-1/2", "a/b"],
    "val_fold": ["0/1", "3/2"],
    "folds_by": ["("],
    "size": ["32", "0x48", "32x", "32x48x3", "axb", (32,), (-1, 4)],
    "fit": ["stretch", "", 3, None],
    "ce_weight": [-0.1, NAN, INFINITY, "much"],
    "kl_weight": [-1, NAN, INFINITY],
    "label_smoothing": [-0.1, 1.0, NAN],
    "focal_gamma": [-0.1, NAN, INFINITY],
    "teacher": ["label", "model", None],
    "temperature": [0, -1, NAN, INFINITY],
    "balance": ["gradnorm", None],
    "task_weight": ["depth", "depth=-1", "height=1", "depth=nan", ["depth=1", "depth=2"], [3], 3],
    "distill_void": ["perhaps"],
    "class_weights": ["mean"],
    "iterations": [0, -5, 1.5],
    "epochs": [0, -1],
    "batch_size": [0, -1, 2.5],
    "accumulate": [0, -2, 1.5],
    "optimizer": ["lion"],
    "lr": [0, -1e-3, NAN, INFINITY],
    "weight_decay": [-1, NAN],
    "schedule": ["cosine"],
    "warmup": [-1],
    "clip_grad": [-1, NAN, INFINITY],
    "amp": ["fp16"],
    "step": ["fused", None],
    "impl": ["cuda", None],
    "augment": ["mixup"],
    "depth_zoom": ["yes", None],
    "labels": ["some", "", "all+depth", "depth+depth", 3],
    "scale": ["2:1", "0:1", "1", "1:2:3", (0.5,), (2.0, 0.5), (1.0, INFINITY)],
    "flip": ["sideways"],
    "lr_scale": ["encoder", "=2", "a=0", "a=nan", "a=inf", ["a=1", "a=2"], [3], 3],
    "ema": [0, 1, -0.1, 1.5, NAN, True, "much"],
    "jitter": [-0.1, 1.1, NAN, True, "much", "randaugment", "randaugment:0,9", "randaugment:2,31"],
    "shuffle": ["epoch", None],
    "resident": ["disk", None],
    "cache_bytes": [0, -1, 1.5],
    "seed": [-1, 2**63],
    "workers": [-1, 257],
    "threads": [-1],
    "val_every": [0],
    "log_every": [0],
    "gradients_every": [-1],
    "keep_every": [0, -1, 1.5, True, "e", "0e", "5 epochs", "1.5e"],
    "log": ["tensorbord", "tensorboard,", ["wandb", "mlflow"], 3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_out_of_range_names_its_flag(name: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        make_config(**{**BASE, name: value})
    flag = "--" + name.replace("_", "-")
    rule = {
        "term": "term" if "=" not in str(value) else "of ",
        "gate": "gate",
        "val_fold": "--fold",
    }.get(name, flag)
    assert flag in str(caught.value) or rule in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("batch_size", 0, "a whole number from 1 on"),
        ("lr", -1.0, "a number above 0"),
        ("ce_weight", "much", "a number from 0 on"),
        ("workers", 300, "a whole number from 0 to 256"),
        ("labelled_share", 2, "a number from 0.001 to 0.999"),
        ("optimizer", "lion", "one of adamw, adam, sgd"),
        ("scale", "1:2:3", "MIN:MAX, two numbers above 0"),
        ("size", "14x", "HEIGHTxWIDTH in pixels, two whole numbers from 1"),
        ("keep_every", "5 epochs", "a number of iterations such as 500, or of epochs such as 5e"),
        ("flip", "sideways", "true or false"),
        ("ema", 1.5, "a decay above 0 and below 1"),
    ],
)
def test_a_refusal_says_the_whole_range_and_what_was_given(name: str, value: object, rule: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_config(**{**BASE, name: value})
    assert caught.value.problem == f"Invalid value of --{name.replace('_', '-')}: {value!r}"
    assert caught.value.fix.startswith(f"Give {rule}, ")


def test_no_refusal_has_the_words_of_a_validator() -> None:
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(RecipeError) as caught:
                make_config(**{**BASE, name: value})
            for foreign in ("Input should", "Value error", "--help"):
                assert foreign not in str(caught.value), (name, value)


def test_the_value_of_a_remedy_is_taken() -> None:
    taken = 0
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(RecipeError) as caught:
                make_config(**{**BASE, name: value})
            flag, _, instance = caught.value.fix.partition("for example ")[2].partition(" or --")[0].partition(" ")
            if flag == "--" + name.replace("_", "-"):
                method = {"task_weight": "kl+depth-silog", "verb": "none"}.get(name, "kl")
                several = name in ("log", "lr_scale", "task_weight")
                made = make_config(**{**BASE, "method": method, name: [instance] if several else instance})
                assert made.settings[name] is not None
                taken += 1
    assert taken > 60


def test_every_field_with_a_range_is_in_the_table() -> None:
    free = {"data", "split", "val", "val_split", "cache", "cache_dir", "init", "device", "class_trust", "trust_against"}
    free |= {"name", "stream", "labels_from"}
    assert set(WRONG) == set(entries(*TRAINING)) - free


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="--learning-rate"):
        make_config(**BASE, learning_rate=1)
    with pytest.raises(RecipeError, match="Did you mean --batch-size"):
        make_config(**BASE, batchsize=1)
    with pytest.raises(RecipeError, match="Missing --model"):
        make_config(verb="train-teacher", data="scenes")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"iterations": 5, "epochs": 2}, "--iterations 5 or --epochs 2, not both"),
        ({"ce_weight": 0, "method": "none"}, "every loss weight is 0"),
        ({"ce_weight": 0, "kl_weight": 0, "method": "kl"}, "every loss weight is 0"),
        ({"cache": None, "data": "x", "method": "kl"}, "cache"),
        ({"cache": None}, "data"),
        ({"schedule": "plateau", "val": None}, "--val"),
        ({"val_fold": "0/5", "val": None}, "--val-fold 0/5 without --val"),
        ({"folds_by": "^(.+)_"}, "--folds-by '^(.+)_' without folds"),
        ({"method": "kl", "class_trust": "auto"}, "--trust-against left out"),
        ({"method": "kl", "trust_against": "runs/plain"}, "--class-trust is left out, and --trust-against runs/plain"),
        ({"method": "dist", "accumulate": 2}, "--accumulate 2 with dist"),
        ({"method": "kl+at", "mix": "cutmix"}, "--mix cutmix with at"),
        ({"scale": (2.0, 0.5)}, "2.0:0.5"),
        ({"term": ["consistency,by=ema"]}, "consistency,by=ema without --ema"),
        ({"term": ["consistency"], "jitter": 0}, "without jitter"),
        ({"term": ["consistency"], "augment": "none"}, "without jitter"),
        ({"term": ["consistency,by=store"], "jitter": 0}, "without jitter"),
        ({"term": ["consistency,by=store"], "mix": "cutmix", "method": "kl"}, "--mix cutmix with consistency"),
        (
            {"cache": None, "data": "x", "term": ["consistency,by=store"], "method": "none"},
            "Cannot learn consistency without --cache",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_config(**(BASE | changes))
    error = caught.value
    assert named in str(error)
    assert "Value error" not in str(error)
    assert "--help" not in error.fix


@pytest.mark.parametrize("kind", ["at", "sp", "hint", "cosine"])
def test_warp_mirrors_stored_features_only_when_it_is_asked_to(kind: str) -> None:
    config = make_config(**BASE, method=kind, augment="warp")
    with pytest.raises(RecipeError, match="--no-flip"):
        check_flip(config)
    for flip in (True, False):
        check_flip(config.changed(flip=flip))
    positions, none = Processor(positions=True), Processor(multiple=14)
    for flip in (True, None):
        with pytest.raises(RecipeError, match="position embeddings"):
            check_flip(config.changed(flip=flip), positions)
    check_flip(config.changed(flip=False), positions)
    check_flip(config.changed(flip=True), none)
    for free in ({"augment": "replay"}, {"augment": "none"}, {"method": "kl"}, {"method": "dist+dkd+pseudo"}):
        check_flip(config.changed(**free))


def test_what_one_process_alone_can_compute() -> None:
    for term in ("pseudo", "consistency,by=student"):
        config = make_config(**BASE, term=[f"{term},quantile=0.5"])
        check_processes(config, 1)
        check_processes(make_config(**BASE, term=[f"{term},threshold=0.5"]), 2)
        with pytest.raises(RecipeError, match="2 processes"):
            check_processes(config, 2)


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, []),
        ({"warmup": 40, "distill_schedule": "warmup:40"}, []),
        (
            {"warmup": 160},
            ["--warmup 160 is longer than the training of 40 iterations: the learning rate gets to 25 %"],
        ),
        (
            {"warmup": 41, "distill_schedule": "warmup:50"},
            ["the learning rate gets to 98 %", "--distill-schedule warmup:50 is longer than the training of 40"],
        ),
        ({"warmup": 160, "schedule": "plateau", "val": "scenes"}, []),
    ],
)
def test_a_warm_up_that_the_training_ends_before_is_noted(changes: dict[str, Any], notes: list[str]) -> None:
    texts = list(warmup_notes(make_config(**BASE | {"iterations": 40} | changes)))
    assert len(texts) == len(notes)
    assert all(note in text for note, text in zip(notes, texts, strict=True))


floats = st.floats(1e-9, 1e6)
names = st.text("abcXYZ019 äß/\\\"'#=:.-_\n", min_size=1, max_size=12)
VALID = {
    "verb": st.sampled_from(["train-teacher", "train-student"]),
    "model": names,
    "split": names,
    "sampling": st.sampled_from(["even", "rare"]) | floats.map("rare:{}".format),
    "val": names,
    "val_split": names,
    "cache": names,
    "data": st.none() | names,
    "method": st.sampled_from(["none", "kl"]),
    "size": st.none() | st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    "init": st.none() | names,
    "ce_weight": floats,
    "kl_weight": st.just(0.0) | floats,
    "temperature": floats,
    "distill_void": st.booleans(),
    "class_weights": st.sampled_from(["none", "median", "sqrt"]),
    "batch_size": st.integers(1, 512),
    "optimizer": st.sampled_from(["adamw", "adam", "sgd"]),
    "lr": floats,
    "weight_decay": st.just(0.0) | floats,
    "schedule": st.sampled_from(["poly", "plateau", "constant"]),
    "warmup": st.integers(0, 1000),
    "clip_grad": st.just(0.0) | floats,
    "amp": st.sampled_from(["auto", "off", "bf16"]),
    "step": st.sampled_from(["auto", "eager", "compiled", "graphed"]),
    "impl": st.sampled_from(["auto", "triton", "numba", "reference"]),
    "augment": st.sampled_from(["warp", "replay", "none"]),
    "scale": st.tuples(floats, floats).map(sorted).map(tuple),
    "flip": st.booleans(),
    "jitter": st.floats(0, 1) | st.sampled_from(["randaugment:2,9", "randaugment:16,30"]),
    "seed": st.integers(0, 2**63 - 1),
    "workers": st.integers(0, 256),
    "threads": st.integers(0, 64),
    "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
    "val_every": st.none() | st.integers(1, 1000),
    "log_every": st.integers(1, 1000),
    "gradients_every": st.integers(0, 1000),
}
length = st.one_of(
    st.fixed_dictionaries({"iterations": st.integers(1, 10**6)}),
    st.fixed_dictionaries({"epochs": st.integers(1, 1000)}),
    st.just({}),
)
CONSISTENT: list[dict[str, Any]] = [
    {},
    {"term": ["consistency,by=ema,threshold=0.5"], "ema": 0.99, "augment": "warp", "jitter": "randaugment:2,9"},
    {"term": ["consistency,normalise=share"], "augment": "replay", "jitter": 0.2},
]


@hypothesis_settings(max_examples=60, deadline=None)
@given(values=st.fixed_dictionaries({}, optional=VALID), extra=length, term=st.sampled_from(CONSISTENT))
def test_a_recipe_file_reads_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], extra: dict[str, int], term: dict[str, Any]
) -> None:
    run = tmp_path_factory.mktemp("run")
    of_teacher = {"method": "none"} if values.get("verb") == "train-teacher" else {}
    config = make_config(**(BASE | values | extra | term | of_teacher))
    (run / "recipe.toml").write_text(config.to_toml(), encoding="utf-8")
    write_local(run, config.run.model, config.recipe)  # the folders that the recipe leaves out
    assert read_config(run) == config
    assert not any("_" in key for key in tomllib.loads(config.to_toml()))


@pytest.mark.parametrize(
    ("typed", "idle"),
    [
        ({"temperature": 9.0, "kl_weight": 5.0}, ["--temperature 9.0", "--kl-weight 5.0", "a --method that has kl"]),
        ({"method": "none", "gate": "correct"}, ["--gate correct", "terms that learn from a teacher"]),
        ({"method": "dice", "distill_void": False}, ["--no-distill-void"]),
        ({"method": "none", "distill_schedule": "fade"}, ["--distill-schedule fade"]),
        ({"method": "none", "temperature": 2.0}, ["--temperature 2.0"]),
        ({"method": "kl", "ce_weight": 0.0, "label_smoothing": 0.1}, ["--label-smoothing 0.1", "ce"]),
        ({"method": "dist+kl", "kl_weight": 0.0, "temperature": 3.0}, ["--temperature 3.0"]),
        ({"method": "none", "term": ["depth-ssi"], "gate": "correct"}, ["--gate correct"]),
    ],
)
def test_a_setting_that_no_term_takes_is_refused(typed: dict[str, Any], idle: list[str]) -> None:
    make_config(**(BASE | typed))  # what nobody typed is no error
    with pytest.raises(RecipeError, match="would have no effect") as caught:
        make_config(given=typed, **(BASE | typed))
    assert all(words in str(caught.value) for words in idle)


@pytest.mark.parametrize(
    "typed",
    [
        {"method": "none", "kl_weight": 0.0},
        {"method": "kl+at", "temperature": 3.0, "gate": "correct"},
        {"method": "consistency", "distill_schedule": "fade"},
        {"mix": "cutmix", "temperature": 3.0},
    ],
)
def test_a_setting_that_a_term_takes_passes(typed: dict[str, Any]) -> None:
    make_config(given=typed, **(BASE | typed))


def test_recipes_hold_what_one_types(config: Callable[..., TrainConfig]) -> None:
    recipe = tomllib.loads(config(size="144x192", scale="0.5:2").to_toml())
    assert recipe["size"] == "144x192"
    assert recipe["scale"] == "0.5:2.0"
    assert make_config(**BASE, size="144X192").data.size == (144, 192)


def test_the_data_fills_in_size_and_iterations() -> None:
    plain = make_config(**BASE).resolved(50, (32, 48))
    assert (plain.data.size, plain.optimizer.iterations, plain.run.val_every) == ((32, 48), 4000, 400)
    given_size = make_config(**BASE, size="16x24", iterations=7).resolved(50, (32, 48))
    assert (given_size.data.size, given_size.optimizer.iterations, given_size.run.val_every) == ((16, 24), 7, 1)
    assert make_config(**BASE, val_every=3).resolved(50, (32, 48)).run.val_every == 3


def test_a_run_keeps_the_order_that_auto_meant() -> None:
    far = make_config(**BASE).resolved(50, (32, 48), "window")
    assert far.data.shuffle == far.resolved(50, (32, 48), "full").data.shuffle == "window"
    assert make_config(**BASE, shuffle="full").resolved(50, (32, 48), "window").data.shuffle == "full"


@pytest.mark.parametrize(
    ("epochs", "samples", "batch_size", "iterations"), [(3, 10, 4, 8), (1, 8, 8, 1), (1, 3, 8, 1), (10, 7, 7, 10)]
)
def test_epochs_round_up_to_whole_steps(epochs: int, samples: int, batch_size: int, iterations: int) -> None:
    resolved = make_config(**BASE, epochs=epochs, batch_size=batch_size).resolved(samples, (8, 8))
    assert resolved.optimizer.iterations == iterations
    assert resolved.optimizer.epochs is None
    assert resolved.resolved(samples, (8, 8)) == resolved


@pytest.mark.parametrize(
    ("given", "steps"), [(500, 500), ("500", 500), ("5e", 23), ("1e", 5), (None, None)]
)  # 18 samples in batches of 4
def test_what_is_kept_is_counted_in_iterations(given: Any, steps: int | None) -> None:
    resolved = make_config(**BASE, keep_every=given, batch_size=4).resolved(18, (32, 48))
    assert resolved.run.keep_every == steps
    assert tomllib.loads(resolved.to_toml()).get("keep-every") == steps


@pytest.mark.parametrize("given", ["wandb,tensorboard", ["wandb", "tensorboard"], [" wandb , tensorboard", "wandb"]])
def test_loggers_are_listed_or_repeated(given: Any) -> None:
    config = make_config(**BASE, log=given)
    assert config.run.log == ("wandb", "tensorboard")
    assert tomllib.loads(config.to_toml())["log"] == ["wandb", "tensorboard"]
    assert make_config(**BASE).run.log == ()


def test_a_logger_s_nearest_name_is_said() -> None:
    with pytest.raises(RecipeError, match="Did you mean tensorboard"):
        make_config(**BASE, log="tensorbord")


@pytest.mark.parametrize("text", [None, "", "model = ", 'model = "x"', 'verb = "train-teacher"\nmodel = "m"\nlr = -1'])
def test_a_broken_recipe_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        read_config(tmp_path)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({}, 6e-3),
        ({"lr": None}, 6e-3),
        ({"lr": 1e-4}, 1e-4),
        ({"optimizer": "adam"}, 6e-3),
        ({"optimizer": "sgd"}, 1e-3),
        ({"model": "kdcache:base"}, 2e-3),
        ({"model": "torchvision:fcn_resnet50"}, 1e-3),
        ({"model": "my_models:build"}, 1e-3),
    ],
)
def test_a_rate_that_is_not_given_is_the_models_own(changes: dict[str, Any], lr: float, tmp_path: Path) -> None:
    config = make_config(**(BASE | changes))
    assert config.optimizer.lr == lr
    (tmp_path / "recipe.toml").write_text(config.resolved(50, (32, 48)).to_toml())
    assert read_config(tmp_path).optimizer.lr == lr


@pytest.mark.parametrize(
    ("changes", "method"),
    [({}, "dist"), ({"mix": "cutmix"}, "kl"), ({"accumulate": 2}, "kl"), ({"accumulate": 1, "mix": None}, "dist")],
)
def test_auto_is_what_the_batch_allows(changes: dict[str, Any], method: str, tmp_path: Path) -> None:
    config = make_config(**(BASE | {"method": "auto"} | changes))
    assert config.loss.method == method
    assert config.teaches
    (tmp_path / "recipe.toml").write_text(config.resolved(50, (32, 48)).to_toml())
    assert read_config(tmp_path).loss.method == method
