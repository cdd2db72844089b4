"""Specs of models of transformers and timm, and of checkpoints of ultralytics.

hf:FOLDER                          a folder that transformers or timm wrote
hf:OWNER/NAME,revision=SHA         a repository of the hub, or its copy in the local cache
hf:FOLDER,task=features            semantic, universal, depth or features; default by the model's own architecture
timm:NAME                          a network of timm
timm:NAME,weights=FILE             with weights of a file
ultralytics:FILE.pt                a checkpoint of ultralytics, which has its own architecture
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from kdcache.errors import ModelError

Task = Literal["semantic", "universal", "depth", "features"]
TASKS = get_args(Task)
LIBRARIES = ("hf", "timm")
_OPTIONS = {"hf": ("task", "revision"), "timm": ("weights",)}
_OPTION = re.compile(r",([A-Za-z_]+)=([^,]*)$")


ULTRALYTICS = "ultralytics"
CHECKPOINT_SUFFIX = ".pt"


@dataclass(frozen=True)
class HubSpec:
    """The parts of the spec of a hub model (transformers or timm), such as `hf:nvidia/mit-b0,revision=main`.

    Attributes:
        library: `hf` or `timm`.
        place: a folder, a Hugging Face repository, or the name of a timm model.
        task: the option `task`: `semantic`, `universal`, `depth` or `features`. None derives it from the architecture.
        revision: the option `revision`: a branch, tag or commit of the repository. None for the latest.
        weights: the option `weights`: a file. None for the published weights.
    """

    library: str
    place: str
    task: str | None = None
    revision: str | None = None
    weights: str | None = None

    @property
    def network(self) -> str:
        """The spec with library, `place` and task only, such as `hf:nvidia/mit-b0,task=features`."""
        return f"{self.library}:{self.place}" + ("" if self.task is None else f",task={self.task}")


def is_hub(spec: str) -> bool:
    """Return True if a spec names a hub model: `hf:...` (transformers) or `timm:...`."""
    return spec.partition(":")[0] in LIBRARIES and ":" in spec


def is_checkpoint(spec: str) -> bool:
    """Return True if a spec names a checkpoint of Ultralytics: `ultralytics:FILE.pt`."""
    return spec.startswith(f"{ULTRALYTICS}:") and spec.endswith(CHECKPOINT_SUFFIX) and "@" not in spec


def parse_hub(spec: str) -> HubSpec:
    """Split the spec of a hub model, such as `hf:nvidia/mit-b0,revision=main`, into library, name and options.

    Raises: ModelError for an unknown option or task, and if the name is missing.
    """
    library, _, place = spec.partition(":")
    values = dict[str, str]()
    while (found := _OPTION.search(place)) is not None:
        name, value = found.groups()
        if name not in _OPTIONS[library] or name in values or not value:
            options = " and ".join(f",{option}=..." for option in _OPTIONS[library])
            raise ModelError(
                f"Unknown option {name}={value} of {library}:{place[: found.start()]}", fix=f"Use {options}, each once."
            )
        values[name] = value
        place = place[: found.start()]
    if not place:
        raise ModelError(f"Missing name after {library}: in {spec!r}", fix=f"Write {library}:NAME.")
    if (task := values.get("task")) is not None and task not in TASKS:
        raise ModelError(f"Unknown task {task!r} in {spec}", fix=f"Use one of {', '.join(TASKS)}.")
    return HubSpec(library, place, task, values.get("revision"), values.get("weights"))
