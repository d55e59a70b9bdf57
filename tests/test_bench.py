"""The benchmarks: honest baselines, right statistics, results that survive, and exit statuses."""

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

from bench import CANDIDATES, OPS, baselines, ceilings, eager, harness, inputs, sanitize
from bench.baselines import Settings
from bench.case import (
    CONTRAST_SIZES,
    Candidate,
    Case,
    Ceilings,
    Options,
    Outcome,
    Sizes,
    Work,
    relative_error,
)
from bench.compare import pairs
from bench.memory import Meter
from bench.run import KIND, broken_rows, read_result, write_result
from prcl_fast.cli import bench as command
from prcl_fast.cli.main import main
from prcl_fast.errors import InputError
from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.ops import PrototypeStatistics, probabilistic_info_nce, use_backend
from prcl_fast.reference.prototype_statistics import prototype_statistics

SIZES = Sizes(2, 12, 10, 8, 5, 6, 16)
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


# The baselines compute what the package computes.


def contrast_inputs(absent: int | None) -> tuple[Any, ...]:
    """mu, var, anchors, negatives and positive on random draws; class `absent` has no pixel."""
    generator = torch.Generator().manual_seed(0)
    batch = inputs._batch(SIZES, OPTIONS, 0)
    valid = torch.ones_like(batch.valid)
    label = batch.label.clone()
    if absent is not None:
        label[label == absent] = 255
    statistics = PrototypeStatistics(*prototype_statistics(batch.mu, batch.var, label, valid, SIZES.classes))
    anchors = torch.randint(SIZES.pixels, (SIZES.classes, SIZES.anchors), generator=generator)
    shape = (SIZES.classes, SIZES.anchors, SIZES.negatives)
    negatives = torch.randint(SIZES.pixels, shape, generator=generator)
    if absent is not None:
        anchors[absent], negatives[absent] = -1, -1
    return batch.mu.requires_grad_(), batch.var.requires_grad_(), anchors, negatives, statistics


@pytest.mark.parametrize("absent", [None, 3])
@pytest.mark.parametrize("virtual", [0, 2])
@pytest.mark.parametrize(
    "settings", [Settings(0.1, "mean", True), Settings(20.0, "sum", False)], ids=["mean", "sum"]
)
def test_the_loop_and_eager_losses_are_the_op_s_on_the_same_draws(
    absent: int | None, virtual: int, settings: Settings
) -> None:
    mu, var, anchors, negatives, positive = contrast_inputs(absent)
    virtual_mu = positive.mean[:, None] + 0.1 * torch.randn(SIZES.classes, virtual, SIZES.dim)
    given = virtual_mu if virtual else None
    with use_backend("torch"):
        expected = probabilistic_info_nce(
            mu, var, anchors, negatives, positive, given,
            tau=settings.tau, reduction=settings.reduction, normalize=settings.normalize,
        )  # fmt: skip
    loop = baselines.loop_loss(mu, var, anchors, negatives, positive.mean, positive.variance, given, settings)
    plain = eager.eager_loss(mu, var, anchors, negatives, positive, given, settings)
    assert expected > 0.5
    slopes = torch.autograd.grad(expected, (mu, var))
    for loss in (loop, plain):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
        assert relative_error(torch.autograd.grad(loss, (mu, var)), slopes) < 1e-5


def test_the_eager_loss_shares_negatives_as_the_op_does() -> None:
    mu, var, anchors, negatives, positive = contrast_inputs(None)
    shared = negatives[:, ::3]
    with use_backend("torch"):
        expected = probabilistic_info_nce(
            mu, var, anchors, shared, positive, None, tau=0.1, reduction="mean", normalize=True
        )
    torch.testing.assert_close(eager.eager_loss(mu, var, anchors, shared, positive, None), expected)


def test_the_loop_s_prototypes_are_the_reference_s() -> None:
    batch = inputs._batch(SIZES, OPTIONS, 0)
    label = torch.where(batch.label == 2, 255, batch.label)
    arguments = (batch.mu, batch.var, label, batch.valid, SIZES.classes)
    expected = PrototypeStatistics(*prototype_statistics(*arguments))
    mean, variance = baselines.loop_prototypes(*arguments)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(variance, expected.variance)


def test_the_loop_draws_negatives_from_the_given_classes_and_valid_pixels() -> None:
    batch = inputs._batch(Sizes(2, 32, 32, 8, 4, 40, 50), OPTIONS, 0)
    probability = torch.tensor([[0.0, 0.7, 0.3, 0.0], [1.0, 0, 0, 0], [0, 0, 0, 1.0], [0, 0, 0, 0]])
    index = baselines.loop_negatives(probability, batch.label, batch.valid, 40, 50, np.random.default_rng(0))
    assert index.shape == (4, 40, 50)
    assert (index[3] == -1).all()
    label, valid = batch.label.flatten(), batch.valid.flatten()
    assert valid[index[:3]].all()
    assert (label[index[1]] == 0).all()
    assert (label[index[2]] == 3).all()
    share = (label[index[0]] == 1).double().mean()
    assert abs(share - 0.7) < 4 * (0.7 * 0.3 / 2000) ** 0.5
    assert len(index[1].unique()) > 100


def test_the_loop_s_anchors_are_hard_pixels_of_their_class() -> None:
    batch = inputs._batch(SIZES, OPTIONS, 0)
    hard = batch.hard & (batch.label != 1)
    index = baselines.loop_anchors(batch.label, hard, SIZES.classes, 200)
    assert (index[1] == -1).all()
    for number in (0, 2):
        assert hard.flatten()[index[number]].all()
        assert (batch.label.flatten()[index[number]] == number).all()


def test_the_whole_loop_agrees_with_the_package_up_to_its_draws() -> None:
    sizes = Sizes(2, 32, 32, 8, 4, 200, 200)
    batch = inputs._batch(sizes, OPTIONS, 0)
    module = ProbabilisticContrast(
        4, 8, tau=0.1, num_anchors=200, num_negatives=200, reduction="mean", prototype="local"
    )
    arguments = (batch.mu, batch.var, batch.label, batch.valid, batch.confidence)
    expected = module(*arguments, batch.seed)
    torch.manual_seed(0)
    loop = baselines.loop_contrast(*arguments, 4, 200, 200, 4)
    plain = eager.eager_contrast(*arguments, batch.seed, 4, 200, 200, 4)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(loop, expected, rtol=0.05, atol=0.0)


# Inputs.


def test_coherent_labels_are_two_thirds_background_and_hold_every_class() -> None:
    sizes = Sizes(4, 128, 128, 256, 21, 256, 512)
    label = inputs.labels(sizes, "coherent", torch.Generator().manual_seed(0))
    share = torch.bincount(label.flatten().long(), minlength=256) / label.numel()
    assert 0.55 < share[0] < 0.78
    assert (share[:21] > 0).all()
    assert 0 < share[255] < 0.1
    assert share[1:3].sum() > 2 * share[19:21].sum()
    right_is_equal = (label[:, :, 1:] == label[:, :, :-1]).double().mean()
    assert right_is_equal > 0.95


def test_uniform_labels_hold_every_class_alike() -> None:
    label = inputs.labels(SIZES, "uniform", torch.Generator().manual_seed(0))
    share = torch.bincount(label.flatten().long(), minlength=5) / label.numel()
    assert (abs(share - 0.2) < 0.12).all()


def test_features_are_channels_last_and_nothing_is_zero() -> None:
    batch = inputs._batch(SIZES, OPTIONS, 0)
    assert batch.mu.is_contiguous(memory_format=torch.channels_last)
    assert (batch.mu != 0).all()
    assert (batch.var > 0).all()
    assert batch.hard.any()
    assert (batch.hard <= batch.valid).all()


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
    module = __import__(f"bench.{op}", fromlist=["cases"])
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
    from bench import prototype_statistics as module

    def wrong(*arguments: Any) -> PrototypeStatistics:
        mu, var, label, valid, num_classes = arguments
        return PrototypeStatistics(*prototype_statistics(mu * 1.01, var, label, valid, num_classes))

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
