"""A trained model in its run folder: what it is (`model.json`) and its weights (`best`, `last`)."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file

from kdcache.errors import MismatchError, RecipeError
from kdcache.models.native import SegmentationModel
from kdcache.models.registry import build_model
from kdcache.models.weights import load_weights, read_state_dict

DESCRIPTION = "model.json"


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

    def check_classes(self, names: tuple[str, ...], where: str) -> None:
        """Raises MismatchError when data has other classes than this model."""
        if names != self.class_names:
            raise MismatchError(
                "a model is used on data with its own classes, in the same order",
                received=f"{', '.join(names)} in {where} against {', '.join(self.class_names)}",
                remedy="give the data set it was trained for",
            )


def weights_path(run: Path, which: str) -> Path:
    return run / f"{which}.safetensors"


def write_run_model(run: Path, about: RunModel) -> None:
    (run / DESCRIPTION).write_text(about.model_dump_json(indent=1) + "\n", encoding="utf-8")


def write_weights(run: Path, which: str, model: SegmentationModel) -> None:
    """Write `best` or `last`; the file is replaced whole or not at all."""
    partial = run / f".{which}.safetensors.partial"
    # Copies: the format takes no two tensors that share memory, as tied weights do.
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
        partial.replace(weights_path(run, which))
    finally:
        partial.unlink(missing_ok=True)


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
            "a run's model.json must be well formed",
            received=f"{path}: {error.errors()[0]['msg']}",
            remedy="restore it from a copy, or train again",
        ) from error


def load_run(run: str | Path, which: str = "best") -> tuple[SegmentationModel, RunModel]:
    """The trained model of a run, in eval mode, on the CPU.

    Args:
        which: `best` (by validation mIoU; the last weights when nothing was validated) or `last`.
    Raises: RecipeError when the run has no such checkpoint; ModelError when the weights do not fit.
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
    model = build_model(about.spec, len(about.class_names), mean=about.mean, std=about.std)
    load_weights(model, read_state_dict(path), strict_head=True)
    return model.eval(), about
