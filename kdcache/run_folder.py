"""A run folder, as train-teacher and train-student write it: its file names, and `Run`, which reads each file once.

recipe.toml        the settings, resolved
model.json         what the weights belong to
best.safetensors   and last.safetensors, the weights; best-ema.safetensors and last-ema.safetensors, their averages
metrics.jsonl      the log: a line per entry, each with its kind and step
environment.json   machine and versions
result.json        written when the training has ended
local.json         the places of code and data on this machine, if they are named by paths: private
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from kdcache import display
from kdcache.bounded import parse_json, parse_toml, read_bytes, read_text
from kdcache.errors import MismatchError, ModelError, RecipeError
from kdcache.files import moved_away, read_object, write_whole
from kdcache.heads import RegressionHead
from kdcache.settings.recipe import settings_of, source_of
from kdcache.settings.shared import Weights

MODEL = "model.json"
RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
LITTLE, MUCH = 0.01, 10.0
"""The range of (gradient norm of a loss term / gradient norm of cross-entropy), outside which a note is printed."""
MOST_LOG_BYTES = 2**25
"""The most bytes of a log: 200,000 lines."""
ENVIRONMENT = "environment.json"
RESULT = "result.json"
LOCAL = "local.json"
WEIGHTS: tuple[str, ...] = get_args(Weights)
OUTPUTS = ("logits", "probabilities", "sigmoid")
"""The kinds of segmentation output that `MODEL,outputs=KIND` can name."""
_OUTPUTS = ",outputs="
VERBS = ("train-teacher", "train-student")
"""The verbs that a run's recipe may have."""


class RunStream(BaseModel):
    """One of several streams that a run was trained on.

    Attributes:
        ids_digest: a digest of its class names and sample ids, as in a cache's manifest.
        labels: which samples' labels were used: a flag for each sample, packed into a text by `pack_flags`.
        taught: True if a cache's targets were also used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    ids_digest: str
    labels: str
    taught: bool


_LEFT_OUT = ("heads", "untrained", "streams", "stores", "validated_on")
"""Fields that are left out of model.json if they are empty."""


class RunModel(BaseModel):
    """The content of a run's model.json: the model that the run's weights belong to, and what it was trained on.

    Attributes:
        spec: the model spec, such as `kdcache:tiny`.
        class_names, class_colours: the classes in the order of their ids. A colour is (red, green, blue), 0 to 255.
        size: height and width of the training images in pixels.
        fit: how images of another shape are brought to this size.
        mean, std: the normalisation of images with values from 0 to 1, for each channel.
        trained_on: a digest of the cache or the data set, or ''.
        labels: which samples' labels were used: a flag for each sample, packed into a text by `pack_flags`. None with
            several streams.
        heads: the heads other than segmentation: name -> kind.
        untrained: the heads that still have random weights.
        streams: the streams, if there are several. They replace `labels`.
        stores: the seals of the caches whose targets were used.
        validated_on: a digest of the validation split, or ''.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    spec: str
    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    size: tuple[int, int]
    fit: Literal["squash", "crop", "pad"] = "squash"  # of images of another shape into the size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    trained_on: str = ""  # digest of the store or the data set: a run resumes on nothing else
    labels: str | None = None  # which of its samples' labels are learnt from, as `pack_flags` has them
    heads: dict[str, RegressionHead] = {}  # beside segmentation
    untrained: tuple[str, ...] = ()  # heads that are at random, for nothing was learnt of them
    streams: tuple[RunStream, ...] = ()  # where there are several, instead of `labels`
    stores: tuple[str, ...] = ()  # seals of the stores whose targets are learnt from
    validated_on: str = ""  # digest of the split that it is validated on: it is known again wherever it lies

    @model_validator(mode="after")
    def _check_names(self) -> "RunModel":
        wrong = [name for name, times in Counter(self.class_names).items() if times > 1 or not name.strip()]
        if wrong:
            raise ValueError(f"the class name {wrong[0]!r} {self.class_names.count(wrong[0])} times")
        if len(self.class_colours) != len(self.class_names):
            raise ValueError(f"{len(self.class_colours)} class_colours for {len(self.class_names)} class_names")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the fields as model.json has them.

        Fields that are empty are left out. The folder of the model's code is left out of `spec`, because the file may
        be published. The file local.json keeps it.
        """
        fields: dict[str, Any] = serialise(self)
        fields["spec"] = display.public(self.spec)
        if self.fit == "squash":  # as in the first runs
            del fields["fit"]
        return {name: value for name, value in fields.items() if value or name not in _LEFT_OUT}

    @property
    def judged_heads(self) -> dict[str, RegressionHead]:
        """The trained heads other than segmentation: name -> kind."""
        return {name: head for name, head in self.heads.items() if name not in self.untrained}

    def check_classes(self, names: tuple[str, ...], where: str) -> None:
        """Check that data with the classes `names`, in this order, fits the model. `where` names the data in the error.

        Raises: MismatchError if the class names or their order differ.
        """
        if names != self.class_names:
            raise MismatchError(
                f"Cannot use the model on {where}: its classes, or their order, differ ({', '.join(names)} against "
                f"{', '.join(self.class_names)})",
                fix="Give the data set it was trained for.",
            )

    def metadata(self) -> dict[str, str]:
        """Return the fields for the header of an exported file: name -> text, or JSON for values other than texts.

        The fields about the training data are left out.
        """
        fields = self.model_dump(mode="json", exclude={"trained_on", "labels", "streams", "stores", "validated_on"})
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "RunModel | None":
        """Return the description of an exported model, or None if kdcache did not export the file.

        `metadata` is the file's header, as `RunModel.metadata` returned it for the export. `path` is the file, for the
        error.

        Raises: ModelError if the header's fields are invalid.
        """
        if not {"spec", "class_names"} <= set(metadata):
            return None
        fields = {name: metadata[name] for name in cls.model_fields if name in metadata}
        try:
            return cls.model_validate(
                {n: value if n in ("spec", "fit") else json.loads(value) for n, value in fields.items()}
            )
        except ValueError as error:  # of json and of pydantic
            raise ModelError(
                f"Cannot read the description of the model in {path}: {str(error).splitlines()[0]}",
                fix="Export it again.",
            ) from error


@dataclass(frozen=True)
class Run:
    """A run folder. Each of its files is read once, at its first use.

    Attributes:
        folder: the path.
        which: the weights in `RUN@WEIGHTS`, such as `best-ema`. None if the text named none.
        outputs: the kind of outputs in `RUN,outputs=KIND`: `logits`, `probabilities` or `sigmoid`. None if the text
            named none.
    """

    folder: Path
    which: str | None = None
    outputs: str | None = None

    @classmethod
    def open(cls, text: str | Path) -> "Run":
        """Return the run that a text names: `FOLDER`, `FOLDER@WEIGHTS` or `FOLDER,outputs=KIND`.

        WEIGHTS are weights of the run, such as `best-ema`. KIND is `logits`, `probabilities` or `sigmoid`.

        Raises:
            RecipeError: the folder is not a run, its model.json is damaged, or the weights are unknown.
            ModelError: the kind of outputs is unknown.
        """
        name, outputs = split_outputs(str(text))
        folder, weights = named_weights(name) or (Path(name), None)
        run = cls(folder, weights, outputs)
        _ = run.model
        return run

    def __repr__(self) -> str:
        return display.line("Run", self._facts)

    def _repr_html_(self) -> str:
        return display.facts_table("Run", self._facts)

    @property
    def _facts(self) -> dict[str, object]:
        """The facts that are known about the run: name -> text. Unknown facts are None."""
        result, recipe = self.result, self.recipe or {}
        scores = (result.get(name) for name in ("best_miou", "best_depth_rmse", "best_feature_loss"))
        miou, rmse, loss = (score if isinstance(score, int | float) else None for score in scores)
        return {
            "folder": self,
            "model": self.model.spec,
            "trained on": source_of(recipe),
            "method": recipe.get("method"),
            "best mIoU": None if miou is None else f"{100 * miou:.2f} % at iteration {result.get('best_step')}",
            "best depth rmse": None if rmse is None else f"{rmse:.3g} m",
            "least feature loss": None if loss is None else f"{loss:.4g} at iteration {result.get('best_step')}",
            "iterations": result.get("iterations") or "not ended",
            "size": display.size_text(self.model.size),
        }

    def __str__(self) -> str:
        weights = "" if self.which is None else f"@{self.which}"
        return f"{self.folder}{weights}" + ("" if self.outputs is None else f"{_OUTPUTS}{self.outputs}")

    @cached_property
    def model(self) -> RunModel:
        """The content of model.json. Raises: RecipeError if the file is missing or damaged."""
        path = self.folder / MODEL
        try:
            model = RunModel.model_validate_json(read_bytes(path))
            spec = str(self._here.get("spec", ""))
            found = same_spec(spec, model.spec) and Path(spec.rpartition(":")[0]).is_file()
            return model.model_copy(update={"spec": spec}) if found else model
        except FileNotFoundError as error:
            lost = (self.folder / RECIPE).is_file()
            hub = (
                ""
                if self.folder.parent.is_dir() or str(self.folder).count("/") != 1
                else f" For a model of the Hub: hf:{self.folder}"
            )
            raise RecipeError(
                f"Not a run: {self.folder} has no {MODEL}" if self.folder.exists() else f"Run not found: {self.folder}",
                fix="Repeat the training with --resume, which writes it again."
                if lost
                else f"Give the --out of a training.{hub}",
            ) from error
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"Damaged {MODEL}: {path} {_fault(path, error)}",
                fix=f"Restore it from a copy. Or delete {path} and repeat the training with --resume, which writes it "
                "again.",
            ) from error

    @cached_property
    def recipe_text(self) -> str | None:
        """The text of recipe.toml, or None if the folder has no such file. Raises: RecipeError if it cannot be read."""
        path = self.folder / RECIPE
        try:
            return read_text(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _no_recipe(path, error) from error

    @cached_property
    def recipe(self) -> Mapping[str, Any] | None:
        """The settings of the training: flag without its dashes -> value. None if the folder has no recipe.toml.

        Raises: RecipeError if the file is invalid.
        """
        if self.recipe_text is None:
            return None
        try:
            recipe = settings_of(parse_toml(self.recipe_text))
        except ValueError as error:
            raise _no_recipe(self.folder / RECIPE, error) from error
        places = self._here.get("recipe")
        places = places if isinstance(places, dict) else {}
        return {name: _here(value, places.get(name)) for name, value in recipe.items()}

    @cached_property
    def _here(self) -> dict[str, Any]:
        """The content of local.json, or {} without one."""
        return read_object(self.folder / LOCAL)

    def weights(self, which: str = "best") -> Path:
        """Return the path of a weights file. `which` is `best`, `last`, `best-ema` or `last-ema`.

        The weights that the run was opened with (`RUN@WEIGHTS`) have priority. Raises: RecipeError if the file is
        missing.
        """
        which = self.which or which
        path = weights_path(self.folder, which)
        if not path.is_file():
            present = sorted(name for name in WEIGHTS if weights_path(self.folder, name).is_file())
            without_average = which.removesuffix("-ema")
            if without_average != which and without_average in present:
                fix = f"Use --weights {without_average}, or runs of a training with --ema 0.999"
            elif self.result:
                kept = f"Use --weights {present[0]}, or get {path.name} back. " if present else ""
                fix = kept + train_again(self.folder)
            else:
                fix = "Let the training finish (the same command with --resume), or give only runs that have them."
            raise RecipeError(
                f"{self.folder} has no {path.name}, only {', '.join(present)}"
                if present
                else f"{self.folder} has no weights{'' if self.result else ' yet'}",
                fix=fix,
            )
        return path

    @cached_property
    def metrics(self) -> list[dict[str, Any]] | None:
        """The entries of the log metrics.jsonl, or None without it.

        Each entry has a `kind` (text), a `step` (int) and measured values. An incomplete last line is left out. Raises:
        RecipeError if the log is invalid.
        """
        path = self.folder / METRICS
        try:
            lines = read_text(path, MOST_LOG_BYTES).splitlines()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise no_log(path, str(error)) from error
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line)
                rows.append({**row, "kind": str(row["kind"]), "step": int(row["step"])})
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                if number == len(lines):  # a kill in the middle of a line
                    break
                raise no_log(path, f"line {number} is {line[:40]!r}") from error
        return rows

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json: scores and times of the training. It is {} until the training has ended."""
        return read_object(self.folder / RESULT)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The content of environment.json: the machine and the versions of libraries, or {} without that file."""
        return read_object(self.folder / ENVIRONMENT)


def _here(value: Any, place: Any) -> Any:
    """Return the path on this machine (`place`) for a value of a recipe, or the value if the two do not match."""
    return place if place is not None and display.public_values(place) == value else value


def write_local(run: Path, spec: str, recipe: Mapping[str, Any]) -> None:
    """Write a run's local.json: the private folders of this machine, which the run's other files leave out.

    `spec` and `recipe` (flag -> value) have full paths. Without private folders, no file is written.
    """
    code, _, function = spec.rpartition(":")
    content: dict[str, Any] = {"spec": f"{Path(code).absolute()}:{function}"} if code.endswith(".py") else {}
    if places := {name: value for name, value in recipe.items() if display.public_values(value) != value}:
        content["recipe"] = places
    if content:
        write_whole(run / LOCAL, json.dumps(content, indent=1) + "\n")


def same_spec(one: str, other: str) -> bool:
    """Return True if two specs are equal after the folders are removed: `a/net.py:make` and `b/net.py:make` are."""
    return display.bare(one) == display.bare(other)


def is_run(folder: Path) -> bool:
    """Return True if a folder holds a run, also one whose training has only begun."""
    return any((folder / name).is_file() for name in (MODEL, RECIPE))


def named_weights(text: str) -> tuple[Path, str] | None:
    """Split `RUN@WEIGHTS` into (run folder, weights), or return None for any other text.

    Raises: RecipeError if WEIGHTS is not `best`, `last`, `best-ema` or `last-ema`.
    """
    folder, _, weights = text.rpartition("@")
    if not (Path(folder) / MODEL).is_file() or (Path(text) / MODEL).is_file():
        return None
    if weights not in WEIGHTS:
        raise RecipeError(
            f"Unknown weights {weights!r} in {text}",
            fix=f"Use one of {', '.join(WEIGHTS)}, for example {folder}@{WEIGHTS[0]}",
        )
    return Path(folder), weights


def split_outputs(text: str) -> tuple[str, str | None]:
    """Split `MODEL,outputs=KIND` into (MODEL, KIND). Return (text, None) for any other text and for an existing path.

    Raises: ModelError if KIND is not `logits`, `probabilities` or `sigmoid`.
    """
    model, found, kind = text.rpartition(_OUTPUTS)
    if not found or "@" in kind or Path(text).exists():
        return text, None
    if kind not in OUTPUTS:
        raise ModelError(
            f"Unknown outputs {kind!r} in {text}",
            fix=f"Use one of {', '.join(OUTPUTS)}. For a softmax write {model}{_OUTPUTS}{OUTPUTS[1]}, for a sigmoid "
            f"{model}{_OUTPUTS}{OUTPUTS[2]}",
        )
    return model, kind


def weights_path(folder: Path, which: str) -> Path:
    """Return the path of a run's weights file. `which` is `best`, `last`, `best-ema` or `last-ema`."""
    return folder / f"{which}.safetensors"


def _fault(path: Path, error: Exception) -> str:
    """Return the problem with model.json, in words."""
    if not isinstance(error, ValidationError):
        return f"cannot be read: {error}"
    first = error.errors()[0]
    field = "".join(f", {part}" for part in first["loc"])
    return f"holds {first['msg']}{field}" if path.stat().st_size else "is empty"


def _no_recipe(path: Path, error: Exception) -> RecipeError:
    return RecipeError(f"Cannot read {path}: {str(error).splitlines()[0]}", fix=train_again(path.parent))


def train_again(folder: Path) -> str:
    """Return the text of a fix: restore a file of the run from a copy, or rename the folder and train again."""
    return f"Restore it from a copy, or move the run away and repeat the command that trained it: {moved_away(folder)}"


def no_log(path: Path, what: str) -> RecipeError:
    """Return the error for the log `path` (metrics.jsonl), which cannot be read. `what` is the reason."""
    return RecipeError(
        f"Cannot read {path}: {what}",
        fix="Restore it from a copy, or remove it: everything but the curves is drawn without it.",
    )
