"""`bench ops`: checked candidates, results that survive, comparison, figures and exit statuses."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.commands import main
from bench.ops import CANDIDATES, OPS, ceilings, harness
from bench.ops.case import CONTRAST_SIZES, Options, Outcome
from bench.ops.compare import pairs
from bench.ops.run import KIND, broken_rows, read_result, write_result
from prcl_fast.errors import InputError
from prcl_fast.ops import PrototypeStatistics
from prcl_fast.reference.prototype_statistics import prototype_statistics
from support.bench_command import run_bench

OPTIONS = Options("small", "cpu", torch.float32, "coherent")


@pytest.fixture(autouse=True, scope="module")
def _quick_ceilings() -> Iterator[None]:
    """The ceilings of the test's machine are measured on small amounts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings._AMOUNTS, "cpu", (1 << 20, 1 << 10, (1 << 20,), 64))
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `python -m bench ops ARGUMENTS`; exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "220")
    return functools.partial(run_bench, capsys, "ops")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real result of two ops, forward and backward, and forward alone."""
    file = tmp_path_factory.mktemp("result") / "result.json"
    options = ("--rounds", "3", "--candidates", "loop,eager,torch,triton", "--json", str(file))
    main(["ops", "sample_anchors", "mutual_likelihood_score", *options])
    return read_result(file)


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
    with pytest.raises(InputError, match=r"a\.json: is not a result of the kind 'prcl bench 1'"):
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


def test_rows_beyond_their_bound_count_as_broken(result: dict[str, Any]) -> None:
    spoiled = copy.deepcopy(result)
    row = next(row for row in spoiled["rows"] if row["candidate"] == "torch")
    row["error"] = 2 * row["error_bound"]
    assert broken_rows(result) == []
    assert broken_rows(spoiled) == [row]


def test_small_sizes_are_the_same_everywhere() -> None:
    assert CONTRAST_SIZES["cpu"]["small"] == CONTRAST_SIZES["cuda"]["small"]
