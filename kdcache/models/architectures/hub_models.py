"""`hf:` and `timm:`: networks of transformers and timm, with the image settings of their processor.

Files come from a folder, or from a hub repository through huggingface_hub's cache. Offline only the cache is read.
Weights are read from .safetensors, else from .bin with `weights_only`. Code in a repository runs only with `--trust`.
Class names come from `id2label`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.files import read_object
from kdcache.model_table import NEEDS, lacks, pip_command
from kdcache.models.class_names import names_in
from kdcache.models.foreign.answers import Reading
from kdcache.models.foreign.hub_spec import HubSpec
from kdcache.models.foreign.image_settings import ImageSettings, image_settings
from kdcache.models.foreign.readings import TimmMaps, reading_as, task_of
from kdcache.models.foreign.tokens import SUMMARY
from kdcache.models.foreign.wrapped import WrappedModel
from kdcache.models.native import LoadReport
from kdcache.models.weights import load_weights, read_weights

CODE_ALLOWED: ContextVar[bool] = ContextVar("code_allowed", default=False)
"""Permission to import code that files name (see `kdcache.models.trust`)."""
_TEXTS = ("*.json", "*.txt")
_SHOWN = 4


@dataclass
class _Made:
    """A network with its reader, its image settings and its class names, as far as they are known."""

    network: nn.Module
    reading: Reading | None
    images: ImageSettings
    names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    revision: str | None = None


def build_hub(spec: str, hub: HubSpec, num_classes: int | None, *, pretrained: bool, strict: bool) -> WrappedModel:
    """Build a network of transformers or timm.

    Args:
        spec: the spec as the user gave it.
        hub: the parsed spec.
        num_classes: the number of classes. None takes the number in the published model.
        pretrained: True loads the published weights. False starts from random ones.
        strict: True keeps the published head, which must have `num_classes` classes. False allows a new head with
            random weights.
    Raises: ModelError if files are missing or do not fit, if the network needs code and `--trust` is missing, or if
    kdcache does not know how to read its output.
    """
    if lacks(hub.library):
        raise ModelError(f"Missing {NEEDS[hub.library]} for {spec}", fix=pip_command(hub.library))
    classes = None if strict else num_classes
    if hub.library == "timm":
        built = _timm(spec, hub.place, hub.weights, pretrained=pretrained)
    else:
        folder, revision = _files(spec, hub, pretrained=pretrained)
        config = read_object(folder / "config.json")
        if not {"model_type", "architecture", "auto_map"} & set(config):
            raise ModelError(
                f"Cannot find a model in {hub.place}: {folder / 'config.json'} names none of transformers or timm",
                fix=_smp_spec(config, hub.place) or "Give a folder that save_pretrained of transformers or timm wrote.",
            )
        if "model_type" not in config and "architecture" in config:
            built = _timm(spec, str(folder), None, pretrained=pretrained)
        else:
            built = _transformers(spec, hub, folder, config, classes, pretrained=pretrained)
        built.revision = revision
    model = WrappedModel(hub.network if pretrained else spec, built.network, None, reading=built.reading)
    model.mean, model.std = built.images.mean, built.images.std
    model.processor = replace(
        model.processor,
        multiple=math.lcm(model.multiple, built.images.multiple, _covered(model)),
        native_size=built.images.native_size,
        pads=built.images.pads,
        channels=built.images.channels,
        revision=built.revision,
    )
    if hub.weights is not None and pretrained:
        load_weights(model, read_weights(hub.weights).state, strict_head=True)
    if strict and num_classes and model.num_classes not in (0, num_classes):
        raise ModelError(
            f"{spec} has {model.num_classes} classes "
            f"({', '.join(built.names[:_SHOWN]) + ', ...' if built.names else 'without names'}), and the data have "
            f"{num_classes}",
            fix="Map each of its classes to one of the data's with --class-map FILE.",
        )
    if pretrained:
        model.load_report = LoadReport(tuple(model.state_dict()), class_names=built.names, notes=tuple(built.notes))
    return model


def _smp_spec(config: Mapping[str, Any], place: str) -> str:
    """Return a fix for a folder of segmentation_models_pytorch, which needs another spec, or ''."""
    decoder, encoder = config.get("_model_class"), config.get("encoder_name")
    return f"It is of segmentation_models_pytorch: smp:{str(decoder).lower()}-{encoder}@{place}" if encoder else ""


def _covered(model: WrappedModel) -> int:
    """Return the multiple for image sides at which every feature covers the whole image.

    At other sides, layers with strides may cut the image's edge off.
    """
    if model.head_kinds or model.fixed_size is not None:
        return 1
    height, width = model.probe_size
    with torch.no_grad():
        shapes = _shapes(model, (height, width))
        strides = {tap: round(height / shape[0]) for tap, shape in shapes.items() if shape[0] > 1}
        most = max(strides.values(), default=1)
        cut = _shapes(model, (height + most // 2, width)) if most > 1 and model.patch in (None, 1, 2, 4) else {}
    return math.lcm(
        *(stride for tap, stride in strides.items() if tap in cut and cut[tap][0] * stride < height + most // 2)
    )


def _shapes(model: WrappedModel, size: tuple[int, int]) -> dict[str, torch.Size]:
    like = next(model.parameters())
    return {tap: y.shape[-2:] for tap, y in model.eval()(like.new_zeros(1, 3, *size), model.taps).features.items()}


def _files(spec: str, hub: HubSpec, *, pretrained: bool) -> tuple[Path, str | None]:
    """Return the folder with a model's files, and the repository's commit (None for a folder).

    Raises: ModelError if files are missing.
    """
    folder = Path(hub.place).expanduser()
    if folder.is_dir():
        if hub.revision is not None:
            raise ModelError(
                f"Cannot use revision={hub.revision}: {hub.place} is a folder",
                fix="Leave ,revision=... out, or name the repository.",
            )
        return folder, None
    if hub.place.startswith((".", "/", "~")) or hub.place.count("/") != 1:
        raise ModelError(f"Folder not found: {hub.place}", fix="Check the path. A repository of the hub is OWNER/NAME.")
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(hub.place, revision=hub.revision, allow_patterns=[*_TEXTS, "*.py"]))
        for pattern in ("*.safetensors", "*.bin") if pretrained else ():
            if not any(path.glob("*.safetensors")):
                path = Path(snapshot_download(hub.place, revision=hub.revision, allow_patterns=[pattern]))
    except Exception as error:  # the hub's own errors, those of its HTTP client, OSError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"Cannot find {hub.place}"
            + (f" at revision {hub.revision}" if hub.revision else "")
            + f": it is not in the local cache, and the hub did not give it: {reason}",
            fix="Check the name and the network. Offline, copy the model's files here and give hf:FOLDER.",
        ) from error
    return path, path.name


def _transformers(
    spec: str, hub: HubSpec, folder: Path, described: Mapping[str, Any], classes: int | None, *, pretrained: bool
) -> _Made:
    import transformers
    from transformers.models.auto import configuration_auto

    tables: Any = configuration_auto
    known = described.get("model_type") in tables.CONFIG_MAPPING_NAMES
    if not known and "auto_map" not in described:
        raise ModelError(
            f"Unknown model type {described.get('model_type')!r} in {hub.place}: transformers "
            f"{transformers.__version__} does not have it",
            fix="Update transformers.",
        )
    if not known and not CODE_ALLOWED.get():
        raise ModelError(
            f"Cannot run the code of {hub.place}: you have not allowed it. {folder / 'config.json'} names "
            f"{', '.join(map(str, dict(described['auto_map']).values()))}",
            fix="Read that code. If you trust it, add --trust. In Python, call inside `with "
            "kdcache.models.trusting():`",
        )
    options: dict[str, Any] = {"trust_remote_code": not known, "local_files_only": True}
    with _quiet():
        config = transformers.AutoConfig.from_pretrained(str(folder), **options)
        task = hub.task or task_of(described.get("architectures") or [])
        if task == "features":
            config = getattr(config, "vision_config", config)
        if classes and task != "features":
            config.num_labels = classes
        kind = _class_for(task, config, known=known)
        if task == "features" and kind is not transformers.AutoModel:
            config.out_features = config.stage_names[1:]
            if hasattr(config, "reshape_hidden_states"):
                config.reshape_hidden_states = True
        network, notes = _network(spec, kind, folder, config, options, pretrained=pretrained, exact=not classes)
    sentence = _sentence(folder, config) if task == "universal" else None
    names = names_in({"id2label": described.get("id2label")}) if task in ("semantic", "universal") else ()
    images, found = image_settings(folder)
    return _Made(network, reading_as(task, network, sentence) or Reading(), images, names, notes + found)


def _class_for(task: str, config: Any, *, known: bool) -> Any:
    """Return the class of transformers that builds a network for a task."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    if task == "features":
        flat = hasattr(config, "patch_size") and not hasattr(config, "depths")  # tokens, and a summary of them
        staged = known and config.model_type in MODEL_FOR_BACKBONE_MAPPING_NAMES and not flat
        name = MODEL_FOR_BACKBONE_MAPPING_NAMES[config.model_type] if staged else "AutoModel"
        return getattr(transformers, name)
    return {
        "semantic": transformers.AutoModelForSemanticSegmentation,
        "universal": transformers.AutoModelForUniversalSegmentation,
        "depth": transformers.AutoModelForDepthEstimation,
    }[task]


def _network(
    spec: str, kind: Any, folder: Path, config: Any, options: Mapping[str, Any], *, pretrained: bool, exact: bool
) -> tuple[nn.Module, list[str]]:
    """Return the network, with published weights if asked for, and notes about them."""
    try:
        if not pretrained:
            trust = options["trust_remote_code"]
            built: nn.Module = kind.from_config(config, trust_remote_code=trust) if _is_auto(kind) else kind(config)
            return built, []
        network, found = kind.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=not exact,
            weights_only=True,
            **options,
        )
    except Exception as error:  # whatever the library or the model's own code raises
        raise ModelError(
            f"Cannot load {spec}: {type(error).__name__}: "
            f"{(str(error) or type(error).__name__).strip().splitlines()[0]}",
            fix="Check the folder's files: config.json, and model.safetensors or pytorch_model.bin.",
        ) from error
    missing, notes = sorted(found["missing_keys"]), list[str]()
    if any(name.startswith("pooler.") for name in missing):
        network.pooler = None
        notes.append(f"{spec}: its weights have no pooler, so there is no tap {SUMMARY}")
    if any("hidden_states_norms" in name for name in missing):
        notes.append(f"{spec}: its weights have no norms of stages, so stages are normalised plainly")
    if lost := [name for name in missing if not name.startswith("pooler.") and "hidden_states_norms" not in name]:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise ModelError(
            f"{spec} lacks {len(lost)} of its tensors: {', '.join(lost[:_SHOWN])}{more} are not in the weights of "
            f"{folder}",
            fix="Give the weights of the whole network, or another ,task=...",
        )
    return network.eval(), notes


def _is_auto(kind: Any) -> bool:
    return str(kind.__name__).startswith("AutoModel")


def _sentence(folder: Path, config: Any) -> Tensor | None:
    """Return the tokens (1, N) of the sentence that asks a network of several tasks to segment classes."""
    if config.model_type != "oneformer":
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception:  # whatever the library raises: there is none
        return None
    text = tokenizer("the task is semantic", padding="max_length", max_length=config.task_seq_len, truncation=True)
    return torch.tensor(text["input_ids"])[None] * torch.tensor(text["attention_mask"])[None]


def _timm(spec: str, place: str, weights: str | None, *, pretrained: bool) -> _Made:
    import timm

    library_weights = pretrained and weights is None
    name = f"local-dir:{place}" if Path(place).is_dir() else place
    try:
        with _quiet():
            network = _create(name, pretrained=library_weights)
    except Exception as error:  # the library's own errors, the hub's, those of its HTTP client, OSError
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        if name == place and not timm.is_model(place.partition(".")[0]):
            near = timm.list_models(f"*{place.partition('.')[0].partition('_')[0]}*")[:_SHOWN]
            raise ModelError(
                f"Unknown model of timm: {place} ({reason})", fix=f"Did you mean {' or '.join(near) or 'resnet18'}?"
            ) from error
        raise ModelError(
            f"Cannot load {spec}: {type(error).__name__}: {reason}",
            fix=f"Check the network, or give a file: timm:{place},weights=FILE.",
        ) from error
    if not hasattr(network, "forward_intermediates"):
        raise ModelError(
            f"Cannot take features of {spec}: it has no forward_intermediates in timm {timm.__version__}",
            fix="Use another model of timm, or a function of your own, FILE.py:FUNCTION.",
        )
    published = network.pretrained_cfg
    side = published.get("input_size")
    images = ImageSettings(tuple(published["mean"]), tuple(published["std"]), native_size=side and tuple(side[1:]))
    return _Made(network, TimmMaps(), images)


def _create(name: str, *, pretrained: bool) -> Any:
    """Return a timm network without a classifier. It takes images of any size if its architecture allows that."""
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' tables and bars, because kdcache reports what matters."""
    if lacks("hf"):
        yield
        return
    from transformers import utils

    logging: Any = utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
