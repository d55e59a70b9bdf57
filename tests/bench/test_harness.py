"""The benchmarks' harness: turns, directions, memory, floors and failures."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import Tensor

from bench.ops import harness
from bench.ops.case import Candidate, Case, Ceilings, Work
from bench.ops.memory import Meter


def case(candidates: dict[str, Candidate], *, leaves: tuple[int, ...] = (0,)) -> Case:
    """A case whose input is one row of ones."""
    return Case(
        shape="1",
        inputs=[(torch.ones(4, requires_grad=bool(leaves)),)],
        candidates=candidates,
        work={"forward": Work(4, instructions=4), "backward": Work(4)},
        errors=lambda name, outcome: {"forward": 0.0, "backward": 0.0},
        bounds={"forward": 0.0, "backward": 0.0},
        check="",
        leaves=leaves,
    )


def test_percentiles_are_linear_between_neighbours() -> None:
    assert harness.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert harness.percentile([0.0, 10.0], 20) == pytest.approx(2.0)


def test_candidates_take_turns_and_every_direction_is_timed() -> None:
    order: list[str] = []

    def candidate(name: str, seconds: float) -> Candidate:
        def function(x: Tensor) -> Tensor:
            order.append(name)
            time.sleep(seconds)
            return x.sum()

        return Candidate(function)

    both = case({"eager": candidate("eager", 0.0), "native": candidate("native", 0.02)})
    measured = {name: harness.first_calls(both, both.candidates[name], "cpu") for name in both.candidates}
    order.clear()
    harness.time_in_turns(both, measured, "cpu", 3)
    assert order == ["eager", "native"] * 3
    times = measured["native"].times
    assert {name: len(values) for name, values in times.items()} == {
        "forward": 3,
        "backward": 3,
        "both": 3,
    }
    assert min(times["forward"]) >= 20
    for forward, backward, sum_ in zip(*(times[x] for x in ("forward", "backward", "both")), strict=True):
        assert forward + backward == pytest.approx(sum_)


def test_a_slow_candidate_gets_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_BUDGET_SECONDS", 0.06)
    slow = case({"loop": Candidate(lambda x: time.sleep(0.02))}, leaves=())
    measured = {"loop": harness.first_calls(slow, slow.candidates["loop"], "cpu")}
    harness.time_in_turns(slow, measured, "cpu", 50)
    assert 2 <= len(measured["loop"].times["forward"]) <= 3


def test_a_candidate_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no such kernel\nsecond line")

    def measured(candidate: Candidate) -> harness.Measured:
        return harness.first_calls(case({}), candidate, "cpu")

    assert measured(Candidate(fails, reason="not built")) == harness.Measured(failure="not built")
    assert measured(Candidate(fails)) == harness.Measured(failure="ValueError: no such kernel", broken=True)
    compiled = measured(Candidate(fails, compiled=True))
    assert compiled.failure == "cannot be compiled: ValueError: no such kernel"
    assert not compiled.broken
    assert "GB of memory" in (measured(Candidate(fails, needs=1 << 60)).failure or "")
    monkeypatch.setattr(harness, "COMPILE_SECONDS", 1)
    endless = measured(Candidate(lambda x: time.sleep(30), compiled=True))
    assert endless.failure == "not compiled after 1 s"


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
def test_memory_counts_what_is_held_beyond_results() -> None:
    meter = Meter("cpu")
    meter.start()
    held = torch.ones(8 << 20)  # 32 MB
    temporary = torch.ones(16 << 20)
    output = temporary[: 4 << 20].clone()
    del temporary
    meter.after_forward(output.nbytes)
    gradient = held.clone()
    meter.after_backward(gradient.nbytes)
    if meter.peak is None:
        pytest.skip("this system does not tell")
    assert 90 < meter.peak / 2**20 < 108
    assert 28 < (meter.retained or 0) / 2**20 < 44


def test_the_floor_is_the_slowest_of_memory_and_arithmetic() -> None:
    limits = Ceilings(copy=1e9, gather=5e8, arithmetic=1e10, row_bytes=512)
    assert Work(1e6, 1e6).milliseconds(limits) == pytest.approx(3.0)
    assert Work(1e6, instructions=1e8).milliseconds(limits) == pytest.approx(10.0)
    assert Work(1e6, special=1e8).milliseconds(limits) == pytest.approx(80.0)
