"""CPU kernels with narrower vector instructions than this processor has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prcl_fast.ops import registry
from support.backends import rerun

# An op's moments and backward pass are tested with it.
OPS = [op for op in registry.op_names() if not any(part in op for part in ("backward", "moments"))]
FILES = sorted({str(path) for op in OPS for path in Path(__file__).parent.glob(f"test_{op}*.py")})


@pytest.mark.skipif("PRCL_CPU_ISA" in os.environ, reason="this is the process with fewer instructions")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_kernels_agree_with_float64(isa: str) -> None:
    reason = registry.unavailable("mutual_likelihood_score", "native", "cpu")
    if reason is not None:
        pytest.skip(reason)
    rerun(FILES, "cpu-native", PRCL_CPU_ISA=isa)
