"""A trained model: in its run folder (`model.json`, weights `best` and `last`), or as SPEC@FILE or SPEC@default."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors.torch import save_file

from kdcache.errors import MismatchError, ModelError, RecipeError
from kdcache.files import replacing, write_whole
from kdcache.models.class_map import ClassMapped, count_sources, read_class_map
from kdcache.models.native import SegmentationModel
from kdcache.models.registry import build_model, is_function
from kdcache.models.trust import check_trusted, trusting
from kdcache.models.weights import load_weights, read_metadata, read_state_dict

DESCRIPTION = "model.json"
# The first @ after a spec's last part, which is a name: either path may have one of its own.
_SPEC_WITH_WEIGHTS = re.compile(r"((?:.*?:)?[^@:/]+)@(.+)")


class Classes(Protocol):
    """Names and colours in the order of the ids, such as a data set's class list."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]: ...


class RunModel(BaseModel):
    """What a run's weights belong to. Class names and colours travel with the model into every table."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    spec: str
    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    trained_on: str = ""  # digest of the store or the data set: a run resumes on nothing else

    @model_validator(mode="after")
    def _check_names(self) -> "RunModel":
        wrong = [name for name, times in Counter(self.class_names).items() if times > 1 or not name.strip()]
        if wrong:
            raise ValueError(f"the class name {wrong[0]!r} {self.class_names.count(wrong[0])} times")
        if len(self.class_colours) != len(self.class_names):
            raise ValueError(f"{len(self.class_colours)} class_colours for {len(self.class_names)} class_names")
        return self

    def check_classes(self, names: tuple[str, ...], where: str) -> None:
        """Raises MismatchError when data has other classes than this model."""
        if names != self.class_names:
            raise MismatchError(
                "a model is used on data with its own classes, in the same order",
                received=f"{', '.join(names)} in {where} against {', '.join(self.class_names)}",
                remedy="give the data set it was trained for",
            )

    def metadata(self) -> dict[str, str]:
        """As exported files carry it: text as it is, everything else as JSON. What it was trained on stays behind."""
        fields = self.model_dump(mode="json", exclude={"trained_on"})
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "RunModel | None":
        """The reverse of `metadata`; None for a file that kdcache did not write. Raises ModelError when damaged."""
        if not {"spec", "class_names"} <= set(metadata):
            return None
        said = {name: metadata[name] for name in cls.model_fields if name in metadata}
        try:
            return cls.model_validate({n: value if n == "spec" else json.loads(value) for n, value in said.items()})
        except ValueError as error:  # of json and of pydantic
            raise ModelError(
                "the description in a weights file must be as kdcache export wrote it",
                received=f"{path}: {str(error).splitlines()[0]}",
                remedy="export it again",
            ) from error


def weights_path(run: Path, which: str) -> Path:
    return run / f"{which}.safetensors"


def write_run_model(run: Path, about: RunModel) -> None:
    write_whole(run / DESCRIPTION, about.model_dump_json(indent=1) + "\n")


def write_weights(run: Path, which: str, model: SegmentationModel) -> None:
    """Write `best` or `last`; the file is replaced whole or not at all."""
    # Copies: the format takes no two tensors that share memory, as tied weights do.
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(weights_path(run, which)) as partial:
        save_file(tensors, partial)


def read_run_model(run: Path) -> RunModel:
    """Raises: RecipeError when the folder is not a run's."""
    path = run / DESCRIPTION
    try:
        return RunModel.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise RecipeError(
            "a run is a folder that train-teacher or train-student wrote",
            received=f"{run} " + (f"has no {DESCRIPTION}" if run.exists() else "does not exist"),
            remedy="give the --out of a training",
        ) from error
    except ValidationError as error:
        raise RecipeError(
            "a run's model.json must be well formed, its class names unique and not empty",
            received=f"{path} " + (f"holds {error.errors()[0]['msg']}" if path.stat().st_size else "is empty"),
            remedy="restore it from a copy; or delete it and repeat the training with --resume, which writes it again",
        ) from error


def load_run(run: str | Path, which: str = "best", *, trust: bool = False) -> tuple[SegmentationModel, RunModel]:
    """The trained model of a run, in eval mode, on the CPU.

    Args:
        which: `best` (by validation mIoU; the last weights when nothing was validated) or `last`.
        trust: whether a function that the run names may be imported and called, wherever the run comes from; one that
            a training of this user was begun with may be in any case (see `kdcache.models.trust`).
    Raises: RecipeError when the run has no such checkpoint; ModelError when the weights do not fit, or for a function
        that is not trusted.
    """
    folder = Path(run)
    about = read_run_model(folder)
    path = weights_path(folder, which)
    if not path.is_file():
        present = sorted(file.stem for file in folder.glob("*.safetensors"))
        raise RecipeError(
            f"a run is used by its weights, here {which}.safetensors",
            received=f"{folder} has " + (", ".join(present) if present else "no weights yet"),
            remedy="let the training finish (train-teacher or train-student with --resume)",
        )
    with trusting(trust):
        check_trusted(about.spec, str(folder / DESCRIPTION))
    model = build_model(about.spec, len(about.class_names), mean=about.mean, std=about.std)
    load_weights(model, read_state_dict(path), strict_head=True)
    return model.eval(), about


def split_spec(text: str) -> tuple[str, str] | None:
    """(SPEC, FILE or default) of `SPEC@FILE`; None for a run folder. Raises ModelError for a spec alone."""
    weighted = _SPEC_WITH_WEIGHTS.fullmatch(text)
    if weighted and not (Path(text) / DESCRIPTION).is_file():
        return weighted[1], weighted[2]
    if ":" in text and not Path(text).exists():
        raise ModelError(
            "a trained model comes with weights: a run folder, SPEC@FILE or SPEC@default",
            received=f"{text!r}, a model without weights",
            remedy=f"give {text}@FILE, or {text}@default for the library's own weights (downloaded)",
        )
    return None


def open_model(
    text: str,
    classes: Classes | Callable[[int], Classes],
    size: tuple[int, int] | None = None,
    which: str = "best",
    *,
    class_map: str | Path | None = None,
    trust: bool = False,
) -> tuple[SegmentationModel, RunModel]:
    """A trained model from wherever it is, in eval mode, on the CPU.

    Args:
        text: a run folder, `SPEC@FILE` (weights trained elsewhere, or written by `kdcache export`) or
            `SPEC@default` (the library's own, downloaded now). Every tensor must be in the weights.
        classes: of the data, or a function from their number to them where there is no data. A run and an exported
            file keep their own unless they are mapped (see `RunModel.check_classes`).
        size: (H, W) of the pixels it is used at; default a run's or an exported file's own.
        which: of a run's weights, `best` or `last`.
        class_map: file that says which data class each of its classes becomes (see `read_class_map`).
        trust: as `load_run`.
    Raises: RecipeError, ModelError, MismatchError naming what is missing or does not fit.
    """
    parts = split_spec(text)
    description = read_run_model(Path(text)) if parts is None else _description(*parts)
    chosen = size if description is None else size or description.size
    if chosen is None:
        raise RecipeError(
            "a model that is no run needs the size of its images",
            received=f"{text} and no --size",
            remedy="add --size HxW, for instance --size 288x384",
        )
    if parts is None:
        model, _ = load_run(text, which, trust=trust)
    else:
        # The number that a map or a missing list goes by is that of the weights.
        count = None if callable(classes) or class_map is not None else len(classes.names)
        if count is None and is_function(parts[0]):
            count = _count_of_function(description, class_map)
        model = build_model(parts[0], count, weights=parts[1], strict_head=True).eval()
    if class_map is None and description is not None:
        names, colours = description.class_names, description.class_colours
    else:
        known = classes(model.num_classes) if callable(classes) else classes
        names, colours = known.names, known.colours
    if class_map is not None:
        model = ClassMapped(model, read_class_map(class_map, model.num_classes, names)).eval()
    return model, RunModel(
        spec=model.spec,
        class_names=names,
        class_colours=colours,
        size=chosen,
        mean=model.mean,
        std=model.std,
        trained_on="" if description is None else description.trained_on,
    )


def _count_of_function(description: RunModel | None, class_map: str | Path | None) -> int | None:
    """What a user's function is called with where there are no classes: its weights cannot be counted before it."""
    if description is not None:
        return len(description.class_names)
    return None if class_map is None else count_sources(class_map)


def _description(spec: str, weights: str) -> RunModel | None:
    """What a file that kdcache exported says of itself."""
    if weights == "default":
        return None
    description = RunModel.from_metadata(read_metadata(weights), Path(weights))
    if description is not None and description.spec != spec:
        raise ModelError(
            "weights are used with the model that they were exported from",
            received=f"{spec} with {weights}, which is of {description.spec}",
            remedy=f"give {description.spec}@{weights}",
        )
    return description
