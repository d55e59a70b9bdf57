"""The benchmarks: right statistics, results that survive, and exit statuses."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench import CANDIDATES, OPS
from bench.gpu import sanitize
from bench.ops import ceilings, harness
from bench.ops.case import (
    CONTRAST_SIZES,
    Candidate,
    Case,
    Ceilings,
    Options,
    Outcome,
    Work,
)
from bench.ops.compare import pairs
from bench.ops.memory import Meter
from bench.ops.run import KIND, broken_rows, read_result, write_result
from prcl_fast.cli import bench as command
from prcl_fast.cli.main import main
from prcl_fast.errors import InputError
from prcl_fast.ops import PrototypeStatistics
from prcl_fast.reference.prototype_statistics import prototype_statistics

OPTIONS = Options("small", "cpu", torch.float32, "coherent")


@pytest.fixture(autouse=True, scope="module")
def _quick_ceilings() -> Iterator[None]:
    """What a test's machine can do at best is nobody's business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings._AMOUNTS, "cpu", (1 << 20, 1 << 10, (1 << 20,), 64))
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `prcl bench ARGUMENTS`; exit status, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prcl", "bench", *arguments])
        monkeypatch.setenv("COLUMNS", "220")
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return call


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real result of two ops, forward and backward, and forward alone."""
    file = tmp_path_factory.mktemp("result") / "result.json"
    options = ("--rounds", "3", "--candidates", "loop,eager,torch,triton", "--json", str(file))
    argv, sys.argv = sys.argv, ["prcl", "bench", "sample_anchors", "mutual_likelihood_score", *options]
    try:
        with pytest.raises(SystemExit):
            main()
    finally:
        sys.argv = argv
    return read_result(file)


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


# The harness.


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


# A run and its result.


@pytest.mark.parametrize("op", OPS)
def test_every_op_s_candidates_are_checked_and_wrong_results_are_seen(op: str) -> None:
    module = __import__(f"bench.ops.{op}", fromlist=["cases"])
    for one in module.cases(OPTIONS):
        assert set(one.candidates) <= set(CANDIDATES)
        assert {"eager", "compile", "native", "triton"} <= set(one.candidates)
        found = harness.first_calls(one, one.candidates["eager"], "cpu")
        assert found.failure is None
        assert found.outcome is not None
        right = one.errors("eager", found.outcome)
        assert all(right[direction] <= bound for direction, bound in one.bounds.items())
        first = found.outcome.outputs[0]
        changed = first.roll(1) if not first.is_floating_point() else first * 1.1
        confidence = [x * 1.1 if x.is_floating_point() else x for x in found.outcome.outputs[1:]]
        spoiled = Outcome((changed, *confidence), tuple(1.1 * x for x in found.outcome.gradients))
        wrong = one.errors("eager", spoiled)
        assert all(wrong[direction] > bound for direction, bound in one.bounds.items())


def test_a_result_says_what_its_numbers_depend_on(result: dict[str, Any]) -> None:
    assert result["kind"] == KIND
    assert result["machine"].keys() >= {
        "device", "driver", "threads", "torch", "triton", "prcl_fast", "commit", "date", "command"
    }  # fmt: skip
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["ceilings"]["copy_gb_s"] > 0
    rows = {(row["op"], row["direction"], row["candidate"]): row for row in result["rows"]}
    assert ("mutual_likelihood_score", "backward", "torch") in rows
    assert ("sample_anchors", "backward", "eager") not in rows
    row = rows["mutual_likelihood_score", "both", "torch"]
    assert row["ms_20"] <= row["ms"] <= row["ms_80"]
    assert row["rounds"] == 3
    assert 0 <= row["error"] <= row["error_bound"]
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert rows["sample_anchors", "forward", "triton"]["ms"] is None
    assert rows["sample_anchors", "forward", "triton"]["note"]


def test_a_result_survives_writing_and_reading(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.json"
    write_result(result, file)
    assert read_result(file) == result
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def test_a_run_prints_ratios_and_reasons(run: Callable[..., Any]) -> None:
    code, out, _ = run("sample_anchors", "--rounds", "2", "--candidates", "loop,eager,triton")
    assert code == 0
    assert "sample_anchors" in out
    assert "vs loop" in out
    assert "triton: Triton kernels are for CUDA" in out
    assert "1.00x" in out


def test_threads_are_set(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    before = torch.get_num_threads()
    try:
        run("sample_anchors", "--rounds", "1", "--candidates", "eager", "--threads", "2", "--json", str(file))
    finally:
        torch.set_num_threads(before)
    assert read_result(file)["machine"]["threads"] == 2


def test_a_wrong_backend_makes_the_run_fail(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.ops import prototype_statistics as module

    def wrong(*arguments: Any) -> PrototypeStatistics:
        mu, var, label, valid, num_classes = arguments
        return PrototypeStatistics(
            *prototype_statistics(mu * 1.01, var, label, valid, num_classes, False, None, None)[:3]
        )

    monkeypatch.setattr(module, "prototype_statistics", wrong)
    code, _, err = run("prototype_statistics", "--rounds", "1", "--candidates", "torch")
    assert code == 1
    assert "prototype_statistics forward torch: error" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("prototype_statistic",), "did you mean prototype_statistics?"),
        (("--size", "huge"), "--size: 'huge'"),
        (("--dtype", "float8"), "--dtype: 'float8'"),
        (("--labels", "random"), "--labels: 'random'"),
        (("--candidates", "eager,nativ"), "did you mean native?"),
        (("--device", "tpu"), "device: 'tpu'"),
        (("--compare", "none.json", "none.json"), "none.json: cannot be read"),
        (("--compare", __file__, __file__), "is not JSON"),
        (("--plot",), "--plot: name at least one result file"),
        (("--plot", "none.json"), "none.json: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(
    run: Callable[..., Any], arguments: tuple[str, ...], named: str
) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.strip().count("\n") == 0
    assert named in err


def test_without_the_sources_one_line_says_where_benchmarks_are(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "__file__", str(tmp_path / "prcl_fast" / "cli" / "bench.py"))
    code, _, err = run()
    assert code == 2
    assert "benchmarks come with the source tree" in err


# Two results side by side.


def times(result: dict[str, Any], factor: float, only: str = "") -> dict[str, Any]:
    """A copy, slower by a factor where the candidate's name is `only`."""
    other = copy.deepcopy(result)
    for row in other["rows"]:
        if row["ms"] is not None and only in ("", row["candidate"]):
            row["ms"] *= factor
    return other


@pytest.mark.parametrize(("factor", "bound", "code"), [(1.05, "1.1", 0), (1.2, "1.1", 1), (1.2, "1.3", 0)])
def test_compare_fails_beyond_the_bound_and_names_what_became_slower(
    run: Callable[..., Any], result: dict[str, Any], tmp_path: Path, factor: float, bound: str, code: int
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, value in zip(files, (result, times(result, factor, "torch")), strict=True):
        write_result(value, file)
    status, out, err = run("--compare", *map(str, files), "--bound", bound)
    assert status == code
    assert f"{factor:.3f}" in out
    slower = "slower than 1.1 times: mutual_likelihood_score small float32 coherent both torch"
    assert (slower in err) == bool(code)
    assert "eager" not in err


def test_a_candidate_that_no_longer_runs_is_a_regression(result: dict[str, Any]) -> None:
    after = copy.deepcopy(result)
    gone = next(row for row in after["rows"] if row["candidate"] == "torch")
    gone["ms"] = None
    found = {pair.name: pair for pair in pairs(result, after)}
    assert [name for name, pair in found.items() if pair.ratio > 1.1] == [
        "mutual_likelihood_score small float32 coherent forward torch"
    ]


def test_results_with_nothing_in_common_cannot_be_compared(result: dict[str, Any]) -> None:
    after = copy.deepcopy(result)
    for row in after["rows"]:
        row["size"] = "voc"
    with pytest.raises(InputError, match="in common"):
        pairs(result, after)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"kind": "something"}))
    with pytest.raises(InputError, match=r"a\.json: is not a result of prcl bench"):
        read_result(file)


def test_figures_are_drawn(run: Callable[..., Any], result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_result(result, file)
    code, out, _ = run("--plot", str(file), "--out", str(tmp_path / "figures"))
    assert code == 0
    paths = [tmp_path / "figures" / f"run_{name}.png" for name in ("roofline", "times")]
    assert out.split() == [str(path) for path in paths]
    for path in paths:
        image = np.asarray(Image.open(path).convert("L"))
        assert min(image.shape) > 200
        assert (image < 100).mean() > 0.002


def test_the_sanitizer_s_calls_reach_every_op_and_see_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu", "--backend", "torch"])
    assert sanitize.main() == 0
    said = capsys.readouterr().out
    assert all(op in said for op in OPS)
    monkeypatch.setattr(sanitize, "pseudo_label", lambda *_: (torch.tensor([float("nan")]),))
    assert sanitize.main() == 1
    assert "pseudo_label float32: a result is not finite" in capsys.readouterr().out


def test_rows_beyond_their_bound_count_as_broken(result: dict[str, Any]) -> None:
    spoiled = copy.deepcopy(result)
    row = next(row for row in spoiled["rows"] if row["candidate"] == "torch")
    row["error"] = 2 * row["error_bound"]
    assert broken_rows(result) == []
    assert broken_rows(spoiled) == [row]


def test_small_sizes_are_the_same_everywhere() -> None:
    assert CONTRAST_SIZES["cpu"]["small"] == CONTRAST_SIZES["cuda"]["small"]
