"""A batch of training: pixels, labels and targets by name, and the window of the view that they show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kdcache.distill.target import Target, TargetFormat
from kdcache.tasks import SEGMENTATION as SEGMENTATION
from kdcache_kernels import target_argmax_confidence
from kdcache_kernels.window import ViewPositions, view_positions


@dataclass(frozen=True)
class PseudoLabels:
    """The classes that a network predicts for the pixels of a batch. A pytree.

    Attributes:
        label: (B, H, W) uint8, or int16 above 256 classes.
        confidence: (B, H, W) float16, the probability of that class.
    """

    label: Tensor
    confidence: Tensor


class StoredTargets(Protocol):
    """Anything with `to_dict`, such as the result of `Cache.targets_for`: stored targets without pixels or labels."""

    def to_dict(self) -> Mapping[str, Any]:
        """Return a dict: name, as in `Batch.to_dict`, such as `targets/segmentation/values` -> numpy array."""


@dataclass(frozen=True)
class Batch:
    """Tensors of B samples of one stream, as a pytree. An absent tensor is None or a missing key.

    `batch.label` is short for `batch.labels["segmentation"]`.

    >>> import kdcache
    >>> dataset = kdcache.CacheDataset(kdcache.open_cache("streets.zarr"))
    >>> batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=2)))
    >>> batch.pixels.shape, batch.label.shape
    (torch.Size([2, 48, 64, 3]), torch.Size([2, 48, 64]))

    An item of a dataset has the same fields without the leading B.

    Attributes:
        pixels: (B, H, W, 3) uint8 RGB.
        labels: task -> labels (B, H, W). Segmentation is uint8, 255 void. Depth is float32 metres, NaN if unknown.
        targets: head -> the teacher's packed outputs. None in a batch without a teacher.
        arrays: path -> (B, ...) further arrays as the cache stores them: features/<tap>, scales/<tap>,
            statistics/<name>.
        window: (B, 4) float64 (y0, x0, y1, x1), edge coordinates in pixels of the view. None is the whole view.
        flip: (B,) bool, True if the window is mirrored. None mirrors nothing.
        inside: (B, 4) float64 edges, in pixels of the view, of the part that shows the image. The rest is grey. None is
            the whole view.
        zoom: (B,) float64, the magnification of the window relative to the teacher's view. Targets in metres are
            divided by it. None divides nothing.
        own: (B, H, W) bool, True for the sample's own pixels, False for pixels pasted from another sample. None means
            that nothing is pasted.
        pasted: the targets of the pasted samples, with windows in pixels of this batch's views. If `own` is set and
            this is None, each sample's neighbour is pasted (samples 2n and 2n + 1 are neighbours).
        dice: (B, N) float32 random numbers in 0..1, for random draws on the batch's device. None if there are none.
        record: (B,) int64 record numbers, to gather `targets` that a device keeps. None if it is not needed.
        weak: (B, H, W, 3) uint8, the pixels before the colour jitter. None if no pseudo labels need them.
        pseudo: `student` or `ema` -> the pseudo labels that this network predicts from `weak`.
    """

    pixels: Tensor | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Target] | None = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    window: Tensor | None = None
    flip: Tensor | None = None
    inside: Tensor | None = None
    zoom: Tensor | None = None
    own: Tensor | None = None
    pasted: "Batch | None" = None
    dice: Tensor | None = None
    record: Tensor | None = None
    weak: Tensor | None = None
    pseudo: dict[str, PseudoLabels] = field(default_factory=dict)

    @property
    def label(self) -> Tensor:
        """The segmentation labels, (B, H, W) uint8. Raises: KeyError if the batch has none."""
        return self.labels[SEGMENTATION]

    @property
    def any_label(self) -> Tensor:
        """The segmentation labels (B, H, W), or if there are none, another task's labels.

        Raises: KeyError for a batch without any labels.
        """
        return self.labels[SEGMENTATION if SEGMENTATION in self.labels else next(iter(self.labels), SEGMENTATION)]

    @property
    def target(self) -> Target | None:
        """The target of segmentation, or None if the batch has none."""
        return None if self.targets is None else self.targets.get(SEGMENTATION)

    @property
    def numbers(self) -> dict[str, Tensor]:
        """All entries of `arrays` as numbers, except scales: path -> tensor.

        8-bit features are decoded with their scales to float32 (B, c, h, w). Other entries are unchanged.
        """
        numbers = {path: array for path, array in self.arrays.items() if not path.startswith("scales/")}
        for path, scales_B2c in self.arrays.items():
            room, _, tap = path.partition("/")
            if room == "scales":
                low, step = scales_B2c.float()[..., None, None].unbind(1)
                numbers[f"features/{tap}"] = torch.addcmul(low, self.arrays[f"features/{tap}"], step)
        return numbers

    @property
    def size(self) -> tuple[int, int]:
        """The (H, W) of the labels, in pixels."""
        return self.any_label.shape[-2], self.any_label.shape[-1]

    def __len__(self) -> int:
        return len(tensors_of(self)[0])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a copy with `change` applied to every tensor."""
        changed: Batch = pytree.tree_map_only(Tensor, change, self)
        return changed

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return a copy with all tensors on `device`.

        True for `non_blocking` does not wait for copies between pinned memory and a GPU, like `Tensor.to`.
        """
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def empty_like(self, device: torch.device) -> "Batch":
        """Return a batch of uninitialised tensors on `device`, with the same shapes and dtypes."""
        return self.map(lambda tensor: torch.empty_like(tensor, device=device))

    def copy_from(self, other: "Batch") -> None:
        """Copy another batch's tensors into this batch's tensors of the same shapes, without waiting for the device.

        PyTorch keeps the other batch's pinned memory until it was read.
        """
        for tensor, source in zip(tensors_of(self), tensors_of(other), strict=True):
            tensor.copy_(source, non_blocking=True)

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory, for fast copies to a GPU. `DataLoader` calls it."""
        return self.map(lambda tensor: tensor.pin_memory())

    def rows(self, count: int, first: int = 0) -> "Batch":
        """Return the `count` samples from number `first` on, without copying."""
        return self.map(lambda tensor: tensor[first : first + count])

    def targets_alone(self, view_scale: tuple[float, float] = (1.0, 1.0)) -> "Batch":
        """Return a batch with only the targets, and the window, flip, inside and zoom that place them.

        The edges of window and inside are multiplied by `view_scale` (y, x). It is the size of another view divided by
        the size of this batch's view.
        """
        window, inside = (_scaled(edges_B4, view_scale) for edges_B4 in (self.window, self.inside))
        return Batch(targets=self.targets, window=window, flip=self.flip, inside=inside, zoom=self.zoom)

    def with_pasted_targets(self) -> "Batch":
        """Return a copy with the targets and windows of the pasted samples.

        The field `pasted` has them. If it is None, samples 2n and 2n + 1 swap targets and windows. Pixels and labels
        stay the same.
        """
        source = self.targets_alone().map(neighbours) if self.pasted is None else self.pasted
        return replace(self, **{name: getattr(source, name) for name in _OF_TARGETS})

    def argmax_confidence(
        self, form: TargetFormat, size: tuple[int, int], *, impl: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's best class of each pixel and its probability, (B, H, W) each.

        Args:
            form: the format of the targets, such as an open cache.
            size: (H, W) of the student's image in pixels.
            impl: the kernels' implementation: "auto" (the fastest for the device), "triton", "numba" or "reference".
        Returns: (argmax, confidence): class ids (uint8, int16 above 256 classes), and float16 in 0..1, 0 outside the
            view.
        """
        assert self.target is not None
        return target_argmax_confidence(self.target.packed(form), size, self.window, self.flip, impl=impl)

    def in_view(self, form: TargetFormat, size: tuple[int, int]) -> Tensor:
        """Return the bool mask (B, H, W) of pixels of the student's image that lie in the teacher's view.

        The mask is (1, H, W) if all images of the batch show the whole view. `form` is the format of the targets, such
        as an open cache. `size` is (H, W) of the student's image.
        """
        return self._positions(form, size).inside()

    def shown(self, form: TargetFormat, size: tuple[int, int]) -> Tensor | None:
        """Return the bool mask (B, H, W) of pixels that show the image, not the grey around it. None means all pixels.

        `form` is the format of the targets, such as an open cache, and `size` is (H, W) of the student's image.
        """
        if self.inside is None:
            return None
        at = self._positions(form, size)
        y0_B1, x0_B1, y1_B1, x1_B1 = self.inside.mT[..., None].unbind()
        rows_BH, columns_BW = (at.y >= y0_B1) & (at.y < y1_B1), (at.x >= x0_B1) & (at.x < x1_B1)
        return rows_BH[:, :, None] & columns_BW[:, None, :]

    def _positions(self, form: TargetFormat, size: tuple[int, int]) -> ViewPositions:
        device = self.any_label.device if self.window is None else self.window.device
        return view_positions(self.window, self.flip, form.view_size, size, device)

    def to_dict(self) -> dict[str, Tensor]:
        """Return the tensors as a flat dict with names such as `pixels`, `labels/depth`, `targets/segmentation/values`.

        Absent tensors, `pasted` and `pseudo` are left out.
        """
        flat = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        flat |= {f"labels/{task}": label for task, label in self.labels.items()}
        for head, target in (self.targets or {}).items():
            flat |= {f"targets/{head}/{name}": part for name, part in vars(target).items() if part is not None}
        return flat | {f"arrays/{path}": array for path, array in self.arrays.items()}

    @classmethod
    def of_targets(cls, targets: StoredTargets, device: torch.device | str = "cpu") -> "Batch":
        """Return a batch of stored targets on `device`, without pixels and labels."""
        tensors = {name: torch.from_numpy(array) for name, array in targets.to_dict().items()}
        return cls.from_dict(tensors).to(device, non_blocking=True)

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> "Batch":
        """Make a batch from a result of `to_dict`. It keeps the given tensors, on the devices where they are."""
        groups: dict[str, dict[str, Any]] = {"labels": {}, "targets": {}, "arrays": {}}
        plain: dict[str, Any] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            if group == "targets":
                head, _, part = rest.partition("/")
                groups[group].setdefault(head, {})[part] = tensor
            elif rest:
                groups[group][rest] = tensor
            else:
                plain[name] = tensor
        targets = {head: Target(**parts) for head, parts in groups["targets"].items()}
        return cls(**plain, labels=groups["labels"], targets=targets, arrays=groups["arrays"])


_OF_TARGETS = ("targets", "window", "flip", "inside", "zoom")
_PLAIN = ("pixels", "window", "flip", "inside", "zoom", "own", "dice", "record", "weak")
pytree.register_dataclass(PseudoLabels)
pytree.register_dataclass(Batch)


Streams = tuple[Batch, ...]
"""The batch of a training step: the rows of every stream, in order, equally many at every step."""


def tensors_of(batch: Batch | Streams) -> list[Tensor]:
    """Return all tensors of a batch, or of a tuple of batches, as a list.

    Batches with the same fields have the same order.
    """
    return pytree.tree_leaves(batch)


def pixels_of(streams: Streams) -> Tensor:
    """Return the pixels of all streams, one stream after another, as one uint8 tensor (B, H, W, 3).

    `streams` is a tuple with the batch of each stream. A single stream's pixels are not copied.
    """
    pixels = [batch.pixels for batch in streams if batch.pixels is not None]
    return pixels[0] if len(pixels) == 1 else torch.cat(pixels)


def rows_of(streams: Streams, count: int, first: int = 0) -> Streams:
    """Return a part of a batch of several streams. Each stream gives the same fraction of its samples.

    If all streams together have N samples, a stream with n samples gives max(1, n * count // N) neighbouring samples.
    They begin with sample number n * first // N of the stream.

    Args:
        streams: the batch of each stream.
        count: number of samples of the part, over all streams, if the divisions are exact.
        first: number of samples before the part, over all streams.
    """
    total = sum(map(len, streams))
    return tuple(batch.rows(max(1, len(batch) * count // total), len(batch) * first // total) for batch in streams)


def _scaled(edges_B4: Tensor | None, scale: tuple[float, float]) -> Tensor | None:
    """Return edges (y0, x0, y1, x1) in pixels of a view of another size."""
    if edges_B4 is None or scale == (1.0, 1.0):
        return edges_B4
    return torch.stack([edge_B * scale[axis % 2] for axis, edge_B in enumerate(edges_B4.unbind(1))], 1)


def neighbours(part: Tensor) -> Tensor:
    """Return the rows 1, 0, 3, 2, ... of a tensor (B, ...), where B is even."""
    return part.reshape(-1, 2, *part.shape[1:]).flip(1).reshape(part.shape)
