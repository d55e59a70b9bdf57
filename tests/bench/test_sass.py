"""Loops and their instructions in SASS."""

from __future__ import annotations

import pytest

from bench.gpu import sass

# Two nested loops, with a block that is out of the way behind the end and comes back into the inner one.
NESTED = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0030*/               @P1 BRA 0x90 ;
        /*0040*/                   FADD R3, R3, R2 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   ISETP.NE.AND P2, PT, R1, 0x8, PT ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/             @!UP0 FMUL R3, R3, R6 ;
        /*00a0*/                   BRA 0x40 ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
"""


def test_a_nest_counts_each_instruction_at_its_depth() -> None:
    (outer,) = sass.loops(NESTED)
    assert len(outer.instructions) == 3  # 0x10, 0x60, 0x70
    (inner,) = outer.inner
    assert len(inner.instructions) == 6  # 0x20 .. 0x50 and the block out of the way
    assert inner.inner == ()
    assert outer.issued(5) == 3 + 5 * 6
    assert inner.issued() == 6


def test_trips_of_inner_loops_must_be_said() -> None:
    with pytest.raises(ValueError, match="how often"):
        sass.loops(NESTED)[0].issued()


def test_code_without_loops_has_none() -> None:
    assert sass.loops("        /*0000*/  FADD R0, R0, R1 ;\n        /*0010*/  EXIT ;") == ()
