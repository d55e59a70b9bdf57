"""The declaration of a benchmark: inputs, candidates, minimal work, and the check of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prcl_fast.ops.registry import BACKENDS, unavailable

COMPILED_BACKENDS = ("native", "triton")

# A multiprocessor issues reciprocals, logarithms and exponentials at an eighth of the rate of other
# instructions. A CPU is not faster at them, so the floor remains a lower bound.
_SPECIAL = 8

# Largest error of the package's own backends: they compute in float32 and round gradients to the features'
# dtype at the end.
EXACT_BOUND = 1e-5
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Options:
    """Size, device, dtype and labels of one run."""

    size: str
    device: str  # cpu or cuda
    dtype: torch.dtype
    labels: str  # coherent or uniform

    @property
    def input_sets(self) -> int:
        """On CUDA calls rotate through several, so that no input is in the L2 from the call before."""
        return 3 if self.device == "cuda" else 1


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of this machine, measured once a run.

    Attributes:
        copy: bytes per second, read and written.
        gather: bytes per second of randomly chosen rows.
        arithmetic: float32 multiply-adds per second.
        row_bytes: size of the rows of `gather`.
    """

    copy: float
    gather: float
    arithmetic: float
    row_bytes: int


@dataclass(frozen=True)
class Work:
    """The minimal memory traffic and arithmetic of an op.

    Attributes:
        streamed: bytes read or written in order, each once.
        gathered: bytes of randomly chosen rows.
        instructions: arithmetic instructions on one float32.
        special: reciprocals, logarithms and exponentials.
    """

    streamed: float = 0
    gathered: float = 0
    instructions: float = 0
    special: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.streamed + other.streamed,
            self.gathered + other.gathered,
            self.instructions + other.instructions,
            self.special + other.special,
        )

    def milliseconds(self, ceilings: Ceilings) -> float:
        """The floor: memory, arithmetic and special functions in parallel, each at its ceiling."""
        return 1e3 * max(
            self.streamed / ceilings.copy + self.gathered / ceilings.gather,
            self.instructions / ceilings.arithmetic,
            _SPECIAL * self.special / ceilings.arithmetic,
        )


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op.

    Attributes:
        function: called with one input set; only its first output has a gradient.
        backend: of prcl_fast's ops.
        reason: why it cannot run on this machine, or None.
        note: a remark on its number.
        needs: bytes at its peak, if they may exceed the machine's memory.
        compiled: its first call compiles.
        graph: whether a CUDA graph can capture it.
        work: by direction, if it is less than the case's.
    """

    function: Callable[..., Any]
    backend: str = "torch"
    reason: str | None = None
    note: str = ""
    needs: int = 0
    compiled: bool = False
    graph: bool = True
    work: Mapping[str, Work] | None = None


@dataclass(frozen=True)
class Outcome:
    """Outputs and gradients of a candidate on the first input set."""

    outputs: tuple[Any, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One benchmark at one size.

    Attributes:
        variant: distinguishes the cases of one op; empty for a single case.
        shape: the sizes as text.
        inputs: the input sets, all of the same shape.
        candidates: by name.
        work: by direction: forward, and backward if there is a gradient.
        errors: (name, outcome) -> by direction, the candidate's error to float64 on the same values.
        bounds: by direction, the largest error of the package's own backends.
        check: the meaning of `errors`, in a few words.
        leaves: positions of the inputs that get a gradient.
        upstream: incoming gradient, for an output that is not a scalar.
    """

    shape: str
    inputs: Sequence[tuple[Any, ...]]
    candidates: Mapping[str, Candidate]
    work: Mapping[str, Work]
    errors: Callable[[str, Outcome], Mapping[str, float]]
    bounds: Mapping[str, float]
    check: str
    variant: str = ""
    leaves: Sequence[int] = ()
    upstream: Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of the contrast: B images of h x w pixels, D dimensions, C classes, A anchors, N negatives."""

    batch: int
    height: int
    width: int
    dim: int
    classes: int
    anchors: int
    negatives: int

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def __str__(self) -> str:
        return (
            f"B={self.batch} {self.height}x{self.width} D={self.dim} C={self.classes} "
            f"A={self.anchors} N={self.negatives}"
        )


_SMALL = Sizes(2, 32, 32, 64, 6, 32, 64)
CONTRAST_SIZES = {
    "cpu": {
        "small": _SMALL,
        "voc": Sizes(4, 128, 128, 256, 21, 256, 512),
        "cityscapes": Sizes(2, 192, 192, 256, 19, 256, 512),
    },
    "cuda": {
        "small": _SMALL,
        "voc": Sizes(32, 128, 128, 256, 21, 256, 512),
        "cityscapes": Sizes(32, 192, 192, 256, 19, 256, 512),
    },
}


def backends(
    op: str,
    function: Callable[..., Any],
    options: Options,
    *,
    dtype: torch.dtype,
    names: Sequence[str] = BACKENDS,
) -> dict[str, Candidate]:
    """A candidate for each backend: `function` calls the public op, `dtype` determines which kernels exist.

    Triton's interpreter is not a candidate, because its time is meaningless.
    """
    found = {}
    for name in names:
        reason = unavailable(op, name, options.device, dtype)
        if name == "triton" and options.device == "cpu":
            reason = "Triton kernels are for CUDA"
        found[name] = Candidate(function, name, reason)
    return found


def compiled(function: Callable[..., Any]) -> Candidate:
    """`function` under torch.compile, as one graph."""
    return Candidate(torch.compile(function, dynamic=False, fullgraph=True), compiled=True)


def relative_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|values - expected| / |expected|, L2, over all tensors together; infinite where a value is NaN."""
    difference = scale = 0.0
    for value, target in zip(values, expected, strict=True):
        difference += float((value.double() - target.double()).square().sum())
        scale += float(target.double().square().sum())
    error = (difference / scale) ** 0.5 if scale > 0 else difference**0.5
    return error if error == error else float("inf")
