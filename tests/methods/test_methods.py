"""Every method: it learns, and resumes bitwise after a stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prcl_fast.config import Config, dump_config, parse_config
from prcl_fast.data.batches import Batch
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.trainer import InterruptedRunError, Trainer
from support.run_folders import final_state, same_state
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
PPS = {"name": "pps", "prototypes": 2, "layers": 1, "heads": 2}
BANK = {"virtual_negatives": 0, "memory_bank": 160}  # more than a step adds
BASELINE = {"representation": "deterministic", "prototype": "local", "virtual_negatives": 0}  # of [IJCV]


def small(output: Path, method: dict[str, Any], **train: Any) -> Config:
    tree = tiny_tree(output, **method)
    tree["data"]["crop"] = [32, 32]
    tree["optim"] = {"lr": 0.02}
    tree["train"] |= train
    return parse_config(tree, "small")


@pytest.fixture(autouse=True)
def _small_backbones() -> Iterator[None]:
    with small_backbones():
        yield


# Below the paper's delta_u, so that pseudo-labels count from the start.
SURE = {"delta_u": 0.2}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param({"name": "supervised"}, id="supervised"),
        pytest.param({"name": "mean_teacher", "mix": "classmix"} | SURE, id="classmix"),
        pytest.param({"name": "mean_teacher", "omega": "pixel"} | SURE, id="confident pixels"),
        pytest.param({"prototype": "global", "virtual_negatives": 4} | SURE, id="prcl"),
        pytest.param(BASELINE | SURE, id="prcl baseline"),
        pytest.param(BANK | SURE, id="prcl memory bank"),
        pytest.param({"name": "pcr", "warmup": 10} | SURE, id="pcr"),
        pytest.param({"name": "pcr", "warmup": 10, "features": "aspp"} | SURE, id="pcr aspp"),
        pytest.param(
            {"name": "pcr", "warmup": 10, "predictor": "prototype"} | SURE, id="pcr prototypes alone"
        ),
        pytest.param({"name": "cps", "mix": "cutmix"}, id="cps cutmix"),
        pytest.param({"name": "cps", "mix": "none"}, id="cps"),
    ],
)
def test_every_method_learns_in_thirty_steps(tmp_path: Path, method: dict[str, Any]) -> None:
    check_learning(Trainer(small(tmp_path / "run", method, iterations=30), QUIET), method.get("warmup", 0))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pps_learns_in_a_hundred_steps(tmp_path: Path, accumulate: int) -> None:
    # A transformer decoder with random weights takes longer, and needs labels first.
    train = {"iterations": 100, "batch_labeled": 4, "batch_unlabeled": 4, "accumulate": accumulate}
    tree = dump_config(small(tmp_path / "run", PPS | {"warmup": 70}, **train))
    tree["model"] |= {"dim": 64, "width": 32}
    check_learning(Trainer(parse_config(tree, "small"), QUIET), 70)


def check_learning(trainer: Trainer, warm_up: int) -> None:
    """Trains to the end: every loss takes part, every parameter moves, and L_s falls."""
    learned = {name: p for name, p in trainer.method.named_parameters() if p.requires_grad}
    before = {name: value.detach().clone() for name, value in learned.items()}
    curve = []
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(trainer.config.train.iterations):
            trainer.step(batches)
            curve.append(trainer.train_step.take_record())
    assert trainer.train_step.failure() is None
    assert all(math.isfinite(value) for record in curve for value in record.values())
    supervised = [record.get("loss_supervised", record["loss"]) for record in curve]
    assert 0 < sum(supervised[-6:]) < 0.75 * sum(supervised[:6])
    # Every other term takes part; pcr's only after its warm-up.
    for name in curve[0].keys() - {"loss", "loss_supervised", "lr"}:
        assert any(record[name] > 0 for record in curve[warm_up:]), name
        assert all(record[name] == 0 for record in curve[:warm_up] if name.startswith("loss_")), name
    assert not [name for name, value in before.items() if torch.equal(value, learned[name])]
    assert all(value.isfinite().all() for value in trainer.method.state_dict().values())
    config = trainer.config
    networks = trainer.method.networks()
    results = evaluate(networks, trainer.source, config.data, config.eval, CPU)
    assert results.keys() == networks.keys() >= {"student"}
    assert all(result.confusion.sum() > 0 and 0 < result.miou < 100 for result in results.values())


@pytest.mark.parametrize(
    ("method", "stops"),
    [
        # Stops before, at and after the iteration in which K-means makes the prototypes.
        ({"name": "pcr", "warmup": 2} | SURE, (1, 2, 3)),
        ({"name": "cps"}, (2,)),
        (PPS, (2,)),
        (BANK, (2,)),
    ],
    ids=["pcr", "cps", "pps", "memory_bank"],
)
def test_a_stopped_run_goes_on_exactly_where_it_was(
    tmp_path: Path, method: dict[str, Any], stops: tuple[int, ...]
) -> None:
    train = {"iterations": 4, "eval_every": 4, "save_every": 4}
    whole = small(tmp_path / "whole", method, **train)
    Trainer(whole, QUIET).run()
    expected = final_state(whole.output)
    for at in stops:
        halves = small(tmp_path / f"stopped at {at}", method, **train)
        first = Trainer(halves, QUIET)
        step = first.step

        def stopped(batches: Iterator[Batch], first=first, step=step, at=at) -> dict[str, torch.Tensor]:
            first.stop.asked = first.iteration + 1 == at  # as a signal does during this step
            return step(batches)

        first.step = stopped  # type: ignore[method-assign]
        with pytest.raises(InterruptedRunError, match=f"stopped at iteration {at} of 4"):
            first.run()
        assert Trainer(halves, QUIET).run()["iterations"] == 4
        assert same_state(final_state(halves.output), expected), at
    if method.get("name") == "pcr":
        assert expected["method"]["predictor.known"].any()
        assert expected["method"]["predictor.prototypes"].any()
