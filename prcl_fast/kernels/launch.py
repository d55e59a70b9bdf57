"""Device, grid and fast arithmetic that all Triton launchers share."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# An interpreted operation takes the same time for a block of any size.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_MOST_X, _MOST_YZ = 2**31 - 1, 2**16 - 1  # programs that CUDA counts along the axes of a grid


def device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device; a no-op for CPU tensors, which the interpreter takes."""
    return torch.cuda.device_of(tensor)


def grid_of(x: int, y: int = 1, z: int = 1) -> tuple[int, int, int]:
    """The grid of a launch. Raises ValueError where it is too large for CUDA."""
    if x > _MOST_X or max(y, z) > _MOST_YZ:
        raise ValueError(f"the operands are too large for one Triton launch: {x} x {y} x {z} programs")
    return x, y, z


@triton.jit
def at_least(x, smallest):
    """The larger of the two; propagates NaN, which the GPU's max does not."""
    return tl.maximum(x, smallest, propagate_nan=tl.PropagateNan.ALL)


# One instruction of the special function unit each, exact enough for normal numbers. Triton's own forms take
# 5 and 20 instructions, in order to be right for subnormal numbers too.
if INTERPRETED:

    @triton.jit
    def reciprocal(x):
        """1 / x of a float32."""
        return 1.0 / x

    @triton.jit
    def log2(x):
        """The logarithm of a float32 to base 2."""
        return tl.log2(x)

else:

    @triton.jit
    def reciprocal(x):
        """1 / x of a float32, within 1 unit in the last place."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def log2(x):
        """The logarithm of a float32 to base 2, within 2^-22, of it or of 1, whichever is larger."""
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
