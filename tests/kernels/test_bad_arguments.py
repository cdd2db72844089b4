"""Every argument that the kernels cannot take is named on every family alike, with what it is and a fix."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kdcache_kernels import (
    KernelError,
    PackedTarget,
    ShapeError,
    ValueRangeError,
    densify,
    distill_denominators,
    distill_loss,
    pack,
    relation_loss,
    relation_moments,
    target_argmax_confidence,
)

NAN, INF = float("nan"), math.inf
B, C, GRID, SIZE = 2, 5, (2, 3), (8, 9)
STUDENT = torch.linspace(-3, 3, B * C * 6).reshape(B, C, *GRID)
LABELS = torch.zeros(B, *SIZE, dtype=torch.uint8)
GATE = torch.ones(B, *SIZE)
WEIGHTS = torch.ones(C)
WINDOW = torch.tensor([[0.0, 0, 8, 9]] * B, dtype=torch.float64)
FLIP = torch.zeros(B, dtype=torch.bool)
TARGET = PackedTarget(*pack(STUDENT, C), C, SIZE)
SPARSE_VALUES, INDICES, TAIL = pack(STUDENT, 3)
assert INDICES is not None
assert TAIL is not None


def with_row(*row: float) -> Tensor:
    return torch.stack([WINDOW[0], torch.tensor(row, dtype=torch.float64)])


Cases = dict[str, list[Any]]
"""Values by the argument that cannot be them."""


class Operation(NamedTuple):
    """A public function with arguments that it takes, all that it has; and values that it refuses.

    Attributes:
        anchor: the argument that all others have to agree with.
    """

    function: Callable[..., Any]
    anchor: str
    arguments: dict[str, Any]
    shapes: Cases
    values: Cases

    def __call__(self, backend: Any, **changes: Any) -> Any:
        """The function, on the device and by the family of a backend; a tensor of elsewhere stays there."""
        call = {"impl": backend.impl} | self.arguments | changes
        for name, value in call.items():
            if isinstance(value, Tensor | PackedTarget) and value.device.type == "cpu":
                call[name] = value.to(backend.device)
        return self.function(**call)


IMPL: Cases = {"impl": ["cutlass", None]}
SIZES: Cases = {"size": [(0, 9), (8,), (8, 9, 3), 8]}
MOVED = {"window_B4": WINDOW, "flip_B": FLIP}
MOVED_SHAPES: Cases = {"window_B4": [WINDOW[:1], WINDOW.float()], "flip_B": [FLIP[:1], torch.zeros(B)]}
EMPTY: Cases = {"window_B4": [with_row(5, 0, 5, 9), with_row(0, 9, 8, 0), with_row(0, NAN, 8, 9)]}
TEMPERATURES = [0.0, -1.0, NAN, INF, None, "2"]
WEIGHS = [-1.0, NAN, INF, None, "1"]

ON_CELLS = {
    "student_logits_BChw": STUDENT,
    "teacher_logits_BChw": STUDENT.half(),
    "view_size": SIZE,
    "size": SIZE,
    "temperature": 2.0,
    "pixel_weight_BHW": GATE,
    "counted_BHW": GATE > 0,
    **MOVED,
}
ON_CELLS_SHAPES: Cases = {
    "student_logits_BChw": [STUDENT.long(), STUDENT[:, :0], STUDENT[:, :, :0]],
    "teacher_logits_BChw": [STUDENT[:, :4], STUDENT[:1], STUDENT[:, :, :0], STUDENT.int()],
    "pixel_weight_BHW": [GATE[:, :4], GATE[:1]],
    "counted_BHW": [GATE[:, :4] > 0, GATE],
    **SIZES,
    **MOVED_SHAPES,
}
ON_CELLS_VALUES: Cases = {
    "view_size": [(8, 0), (8, 9, 3), 8],
    "temperature": TEMPERATURES,
    **EMPTY,
    **IMPL,
}
COUNT = {"count": torch.tensor(9.0)}
COUNT_SHAPES, COUNT_VALUES = {"count": [torch.ones(1)]}, {"count": [-1.0, NAN, "9"]}

OPERATIONS = {
    "distill_loss": Operation(
        distill_loss,
        "student_logits_BChw",
        {
            "student_logits_BChw": STUDENT,
            "labels_BHW": LABELS,
            "target": TARGET,
            "size": SIZE,
            "ce_weight": torch.tensor(1.0),
            "kl_weight": torch.tensor(1.0),
            "temperature": 2.0,
            "class_weight": WEIGHTS,
            "ce_pixel_weight_BHW": GATE,
            "pixel_weight_BHW": GATE,
            "ce_denominator": torch.tensor(9.0),
            "kl_denominator": torch.tensor(9.0),
            **MOVED,
        },
        {
            "student_logits_BChw": [STUDENT.long(), STUDENT[:, :0], STUDENT[:, :, :0]],
            "labels_BHW": [LABELS[:, None], LABELS[:1], LABELS.float()],
            "target": [
                PackedTarget(TARGET.values[:1], None, None, C, SIZE),
                PackedTarget(TARGET.values[:, :4], None, None, 4, SIZE),
                TARGET.values,
            ],
            "class_weight": [torch.ones(C + 1), torch.ones(C, dtype=torch.int64)],
            "ce_pixel_weight_BHW": [GATE[:, :4], GATE[:1]],
            "pixel_weight_BHW": [GATE[:, :4], GATE[:1]],
            "ce_weight": [torch.ones(1)],
            "kl_weight": [torch.ones(1)],
            "ce_denominator": [torch.ones(1)],
            "kl_denominator": [torch.ones(1)],
            **MOVED_SHAPES,
            "size": [*SIZES["size"], (9, 8)],
        },
        {
            "labels_BHW": [LABELS + C, LABELS.long() - 1],
            "temperature": TEMPERATURES,
            "ce_weight": WEIGHS,
            "kl_weight": WEIGHS,
            "class_weight": [-WEIGHTS, WEIGHTS * NAN],
            "label_smoothing": [-0.1, 1.0, NAN, None],
            "focal_gamma": [-1.0, INF, None],
            "ignore_index": [None, 255.0],
            "window_B4": [*EMPTY["window_B4"], with_row(0, 9, 8, 18)],
            "ce_denominator": [-1.0, "9"],
            "kl_denominator": [NAN],
            **IMPL,
        },
    ),
    "distill_denominators": Operation(
        distill_denominators,
        "labels_BHW",
        {"labels_BHW": LABELS, "target": TARGET, "num_classes": C, "size": SIZE, "class_weight": WEIGHTS, **MOVED},
        {
            "labels_BHW": [LABELS[:, None], LABELS.float()],
            "target": [PackedTarget(TARGET.values[:1], None, None, C, SIZE), TARGET.values],
            "class_weight": [torch.ones(C + 1), torch.ones(C, dtype=torch.int64)],
            **MOVED_SHAPES,
            **SIZES,
        },
        {"ignore_index": [None], **IMPL},
    ),
    "target_argmax_confidence": Operation(
        target_argmax_confidence,
        "target",
        {"target": TARGET, "size": SIZE, **MOVED},
        {"target": [TARGET.values], **MOVED_SHAPES, **SIZES},
        {**EMPTY, **IMPL},
    ),
    "relation_loss": Operation(
        relation_loss,
        "student_logits_BChw",
        {**ON_CELLS, **COUNT, "beta": 0.5, "gamma": 2.0, "moments_6C": torch.ones(6, C, dtype=torch.float64)},
        {**ON_CELLS_SHAPES, **COUNT_SHAPES, "moments_6C": [torch.ones(5, C, dtype=torch.float64), torch.ones(6, C)]},
        {**ON_CELLS_VALUES, **COUNT_VALUES, "beta": WEIGHS, "gamma": WEIGHS},
    ),
    "relation_moments": Operation(relation_moments, "student_logits_BChw", ON_CELLS, ON_CELLS_SHAPES, ON_CELLS_VALUES),
    "pack": Operation(
        pack,
        "logits_BChw",
        {"logits_BChw": STUDENT, "k": 3},
        {"logits_BChw": [STUDENT.long()]},
        {"k": [0, C + 1], **IMPL},
    ),
    "densify": Operation(
        densify,
        "values",
        {"values": SPARSE_VALUES, "indices": INDICES, "tail": TAIL, "num_classes": C},
        {
            "values": [SPARSE_VALUES.long(), SPARSE_VALUES[:, :0]],
            "indices": [None, INDICES.long(), INDICES[:, :2]],
            "tail": [None, TAIL[:, None], TAIL.int()],
        },
        {"indices": [INDICES + C], **IMPL},
    ),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture(autouse=True)
def _values_are_read_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_DEBUG", "1")


def refusal(operation: Operation, backend: Any, name: str, value: Any, kind: type[KernelError]) -> KernelError:
    """The error that names the argument."""
    with pytest.raises(kind) as caught:
        operation(backend, **{name: value})
    assert type(caught.value) is kind
    assert caught.value.problem.startswith((f"Invalid {name}: ", f"Unknown {name} "))
    assert caught.value.fix
    return caught.value


def assert_described(error: KernelError, tensor: Tensor) -> None:
    """Shape, dtype and strides are in it."""
    assert f"{tuple(tensor.shape)} {tensor.dtype}" in error.problem
    assert (str(tensor.stride()) if tensor.layout == torch.strided else str(tensor.layout)) in error.problem


@every_operation
def test_the_arguments_are_taken_as_they_are(operation, backend):
    """So that what is refused below is refused for the one argument that is changed."""
    assert operation(backend) is not None


def cases(kind: str) -> list[Any]:
    return [
        pytest.param(operation, name, value, id=f"{function}-{name}")
        for function, operation in OPERATIONS.items()
        for name, values in getattr(operation, kind).items()
        for value in values
    ]


@pytest.mark.parametrize(("operation", "name", "value"), cases("shapes"))
def test_shapes_and_dtypes(operation, name, value, backend):
    value = value.to(backend.device) if isinstance(value, Tensor) else value
    error = refusal(operation, backend, name, value, ShapeError)
    if isinstance(value, Tensor):
        assert_described(error, value)
    elif isinstance(value, PackedTarget):
        assert_described(error, value.values.to(backend.device))
    else:
        assert str(value) in error.problem


@pytest.mark.parametrize(("operation", "name", "value"), cases("values"))
def test_values(operation, name, value, backend):
    error = refusal(operation, backend, name, value, ValueRangeError)
    assert isinstance(value, Tensor) or repr(value) in error.problem


def tensors_of(*, anchors: bool = True, scalars: bool = True) -> list[Any]:
    return [
        pytest.param(operation, name, id=f"{function}-{name}")
        for function, operation in OPERATIONS.items()
        for name, value in operation.arguments.items()
        if isinstance(value, Tensor) and (anchors or name != operation.anchor) and (scalars or value.dim())
    ]


@pytest.mark.parametrize("make", [Tensor.to_sparse, lambda x: x.to(torch.complex64)], ids=["sparse", "complex"])
@pytest.mark.parametrize(("operation", "name"), tensors_of())
def test_tensors_of_other_kinds(operation, name, make, backend):
    value = make(operation.arguments[name]).to(backend.device)
    assert_described(refusal(operation, backend, name, value, ShapeError), value)


@pytest.mark.parametrize(("operation", "name"), tensors_of())
def test_tensors_of_other_axes(operation, name, backend):
    taken = operation.arguments[name].to(backend.device)
    for value in (taken[None], taken[0] if taken.dim() else taken.expand(2)):
        assert_described(refusal(operation, backend, name, value, ShapeError), value)


@pytest.mark.parametrize("make", [Tensor.numpy, Tensor.tolist], ids=["array", "list"])
@pytest.mark.parametrize(("operation", "name"), tensors_of(scalars=False))
def test_what_is_no_tensor(operation, name, make, backend):
    error = refusal(operation, backend, name, make(operation.arguments[name]), ShapeError)
    kind = "numpy.ndarray" if make is Tensor.numpy else "builtins.list"
    assert error.problem.startswith(f"Invalid {name}: a {kind}, not ")


@pytest.mark.parametrize(("operation", "name"), tensors_of(anchors=False))
def test_tensors_of_another_device(operation, name, backend):
    value = operation.arguments[name].to("meta")
    error = refusal(operation, backend, name, value, ShapeError)
    assert_described(error, value)
    others = "values is" if operation is OPERATIONS["densify"] else "the other tensors are"
    assert f"on meta, but {others} on {backend.device.type}" in error.problem


@pytest.mark.parametrize("function", ["distill_loss", "distill_denominators"])
def test_a_target_of_another_device(function, backend):
    error = refusal(OPERATIONS[function], backend, "target", TARGET.to("meta"), ShapeError)
    assert_described(error, TARGET.values)


@pytest.mark.fused
@pytest.mark.parametrize("function", ["distill_loss", "relation_loss", "pack"])
def test_a_family_says_which_tensor_it_cannot_take(function, backend):
    operation = OPERATIONS[function]
    value = operation.arguments[operation.anchor].double().to(backend.device)
    with pytest.raises(ValueRangeError, match=rf"^Cannot compute with impl='{backend.impl}'") as caught:
        operation(backend, **{operation.anchor: value})
    assert f"{operation.anchor} is" in caught.value.problem
    assert_described(caught.value, value)
    assert "reference" in caught.value.fix
