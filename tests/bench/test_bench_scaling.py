"""`bench scaling`: formulas and measured collectives agree, and simulated networks take their time."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from bench.ops.run import read_result
from bench.scaling import command as scaling
from bench.scaling import run as scaling_run
from bench.scaling.process_groups import USED, EqualProcesses, simulated
from bench.scaling.run import measure_contrast
from bench.scaling.traffic import (
    GATHERING,
    GRADIENTS,
    NETWORKS,
    NORM_FORWARD,
    STATISTICS,
    Collective,
    Network,
    collectives,
    images_of_a_process,
    shape_of,
    table,
)
from prcl_fast.config import Config, parse_config
from prcl_fast.engine.trainer import Trainer
from support.bench_command import run_bench
from support.tiny import tiny_tree

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `python -m bench scaling ARGUMENTS`; exit status, standard output, standard error."""
    return functools.partial(run_bench, capsys, "scaling")


def tiny(folder: Path, processes: int) -> Config:
    tree = tiny_tree(folder / "run")
    tree["train"] |= {"batch_labeled": 2 * processes, "batch_unlabeled": 2 * processes, "device": "cpu"}
    return parse_config(tree, "test")


@contextlib.contextmanager
def training(folder: Path, processes: int) -> Iterator[tuple[Callable[[], None], EqualProcesses, Trainer]]:
    with simulated(processes) as group:
        trainer = Trainer(tiny(folder, processes), Console(quiet=True))
        with contextlib.closing(trainer.batches()) as batches:

            def step() -> None:
                trainer.step(batches)
                trainer.stop.agreed()

            yield step, group, trainer


def sums(passed: list[Collective]) -> dict[str, tuple[int, int]]:
    """Calls and bytes by purpose."""
    calls, given = Counter(one.purpose for one in passed), Counter[str]()
    for one in passed:
        given[one.purpose] += one.gives
    return {purpose: (calls[purpose], given[purpose]) for purpose in calls}


def test_the_formulas_say_what_a_training_step_sends(tmp_path: Path) -> None:
    with training(tmp_path, 4) as (step, group, trainer):
        step()
        group.take()
        step()
        found = sums(group.take()[0])
        expected = sums(collectives(shape_of(trainer.config, len(trainer.source.classes))))
    # Gloo's DistributedDataParallel also asks which parameters were used, and cuts its buckets otherwise.
    assert found.pop(USED)[0] == 1
    assert found.pop(GRADIENTS)[1] == expected.pop(GRADIENTS)[1]
    assert found == expected


def test_equal_processes_train_as_one_of_them_would_alone(tmp_path: Path) -> None:
    alone = Trainer(tiny(tmp_path / "alone", 1), Console(quiet=True))
    with contextlib.closing(alone.batches()) as batches:
        seen = [next(batches) for _ in range(2)]
    expected = [
        alone.step(iter(seen[:1])),
        dict(alone.method.contrast.diagnostics),
        alone.step(iter(seen[1:])),
    ]
    with training(tmp_path, 3) as (_, _, trainer):
        first = trainer.step(iter(seen[:1]))
        diagnostics = dict(trainer.method.contrast.diagnostics)
        second = trainer.step(iter(seen[1:]))
    # The same mean over three times the pixels. The contrast alone differs: its prototypes are more certain.
    for name in ("loss_supervised", "loss_unsupervised"):
        torch.testing.assert_close(first[name], expected[0][name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(second[name], expected[2][name], rtol=1e-2, atol=1e-6)
    assert torch.equal(diagnostics["valid_per_class"], 3 * expected[1]["valid_per_class"])


def test_a_step_takes_longer_by_what_the_network_cannot_hide(tmp_path: Path) -> None:
    slow = Network("slow", latency=0.02, bandwidth=1e12)
    with training(tmp_path, 2) as (step, group, _):
        step()
        group.take()
        group.network = slow
        started = time.perf_counter()
        step()
        taken = time.perf_counter() - started
        passed, waited = group.take()
        hidden = sum(0.02 for one in passed if one.purpose not in (NORM_FORWARD, STATISTICS))
    assert taken > slow.seconds(passed, 2) - hidden > 0.3
    assert waited[NORM_FORWARD] > 0.02 * (sums(passed)[NORM_FORWARD][0] - 1)
    assert waited[GRADIENTS] > 0.0


def test_gathered_features_pass_in_the_place_of_the_statistics() -> None:
    network = Network("one byte a second", latency=0.0, bandwidth=1.0)
    group = EqualProcesses(3)
    group.network = network
    statistics, other = Collective(STATISTICS, 6), Collective(GRADIENTS, 3)
    now = time.perf_counter()
    assert group._arrival(statistics) - now == pytest.approx(8.0, abs=1.0)
    group.instead = [Collective(GATHERING, 10, gathers=True)]
    assert group._arrival(other) - now == pytest.approx(8.0 + 4.0, abs=1.0)
    assert group._arrival(statistics) - now == pytest.approx(12.0 + 20.0, abs=1.0)


def test_rings_send_what_they_must() -> None:
    assert Collective("", 100).sent(1) == 0
    assert Collective("", 100).sent(4) == 150
    assert Collective("", 100, gathers=True).sent(4) == 300
    network = Network("", latency=1.0, bandwidth=50.0)
    assert network.seconds([Collective("", 100)] * 2, 8) == 2 * (3 + 175 / 50)
    assert network.seconds([Collective("", 100)], 5) == 3 + 160 / 50


def test_a_process_gets_its_share_of_the_batch_or_two_and_two(tmp_path: Path) -> None:
    shape = shape_of(tiny(tmp_path, 4), 6)
    assert [images_of_a_process(shape, count) for count in (1, 2, 4)] == [(8, 8), (4, 4), (2, 2)]
    # One image has no partner to be mixed with.
    assert images_of_a_process(shape, 8) == images_of_a_process(shape, 3) == (2, 2)


def test_at_voc_size_statistics_stay_below_100_kb_where_features_take_a_gigabyte() -> None:
    shape = shape_of(scaling.load_config(scaling._VOC, ["model.weights=null"]), scaling._VOC_CLASSES)
    assert (shape.height, shape.width, shape.classes, shape.dim) == (128, 128, 21, 256)
    assert 58e6 < shape.parameters == sum(shape.buckets) < 61e6
    rows = {row["processes"]: row for row in table(shape, scaling.PROCESSES)}
    assert all(row["sent_bytes"][STATISTICS] < 100e3 for row in rows.values())  # type: ignore[index]
    assert rows[2]["sent_bytes"][STATISTICS] == 21 * (2 * 256 + 4) * 4  # type: ignore[index]
    mu_and_var, one_hot = 2 * 256 * 128 * 128 * 4, 21 * 128 * 128 * 4
    of_others = 7 * (4 * (mu_and_var + one_hot) + 2 * 512 * 512 * (12 + 8 + 4))
    assert rows[8]["gathering_bytes"] == of_others > 1e9
    assert not any(rows[1]["sent_bytes"].values())  # type: ignore[attr-defined]
    times = rows[64]["ms"][NETWORKS[1].name]  # type: ignore[index]
    assert times["exposed"] < times["all"] < times["gathering, exposed"] < times["gathering"]


def test_the_contrast_on_two_processes_sends_its_statistics_and_nothing_else(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path / "run")
    shape = shape_of(parse_config(tree, "test"), 6)
    found = measure_contrast(shape)["collectives"]
    size = 6 * (2 * shape.dim + 4) * 4
    assert found == {STATISTICS: {"calls": 1, "gives": size, "sends": size}}


def test_two_processes_send_what_the_formulas_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def small(size: str, folder: Path, overrides: Any) -> Config:
        return tiny(folder, 2)

    monkeypatch.setattr(scaling_run, "size_config", small)
    row = scaling_run.measure(2)
    expected = sums(collectives(shape_of(tiny(tmp_path, 2), 6)))
    found = {purpose: (sent["calls"], sent["gives"]) for purpose, sent in row["collectives"].items()}
    assert found.pop(USED)[0] == 1
    assert found.pop(GRADIENTS)[1] == expected.pop(GRADIENTS)[1]
    assert found == expected
    assert row["images"] == 8
    assert len(row["every_ms"]) == scaling_run.STEPS
    assert 0 < row["waited_share"] < 1


def test_the_result_holds_the_parts_asked_for_and_is_drawn(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "scaling.json"
    status, out, _ = run("--table", "--json", str(file))
    assert status == 0
    assert "1024" in out
    assert set(read_result(file, scaling.KIND)) == {"kind", "machine", "options", "paper"}
    status, _, error = run("--plot", str(file))
    assert status == 2
    assert error == "bench scaling: scaling: holds no table or no simulation; measure without naming parts\n"

    monkeypatch.setattr(scaling, "SIMULATED", (1, 2))
    monkeypatch.setattr(scaling_run, "ROUNDS", 1)
    monkeypatch.setattr(scaling_run, "size_config", lambda size, folder, overrides: tiny(folder, 2))
    assert run("--table", "--simulate", "--json", str(file))[0] == 0
    rows = read_result(file, scaling.KIND)["simulated"]
    assert [(row["processes"], row["network"] is None) for row in rows] == [(1, True), (2, True)] + 6 * [
        (2, False)
    ]
    assert run("--plot", str(file), "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_number_of_processes_that_cannot_share_the_batch_is_one_line(run: Callable[..., Any]) -> None:
    status, _, error = run("--processes", "1,3")
    assert status == 2
    assert error.startswith("bench scaling: --processes")
    assert error.count("\n") == 1
    assert not dist.is_initialized()
