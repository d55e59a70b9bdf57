"""Time of decoding, and the number of workers that it needs."""

from __future__ import annotations

import pytest

from prcl_fast.config import DataConfig
from prcl_fast.data.sources import build_source
from prcl_fast.planning.decode_cost import DecodeCost, SubsetCost, decode_cost, workers_needed


def test_both_subsets_are_measured():
    synthetic = {"size": [64, 96], "labeled": 3, "unlabeled": 40}
    cost = decode_cost(build_source(DataConfig(kind="synthetic", synthetic=synthetic)), images=8)
    assert (cost.labeled.images, cost.unlabeled.images) == (3, 8)
    assert cost.labeled.decoded_bytes == cost.unlabeled.decoded_bytes == 64 * 96 * 4
    assert cost.labeled.milliseconds > 0
    assert cost.unlabeled.milliseconds > 0


def test_an_empty_subset_has_no_cost():
    data = DataConfig(kind="synthetic", synthetic={"unlabeled": 1})
    source = build_source(data)
    source.splits = {**source.splits, "unlabeled": source.splits["unlabeled"].__class__("ids", (), "0" * 12)}
    cost = decode_cost(source, images=2)
    assert cost.unlabeled is None
    assert workers_needed(cost, {"labeled": 1, "unlabeled": 1000}, 1000.0) == 1


@pytest.mark.parametrize(("step_seconds", "workers"), [(1.0, 1), (0.2, 1), (0.1, 2), (0.099, 3), (0.02, 10)])
def test_workers_needed_decode_a_step_in_the_time_of_a_step(step_seconds, workers):
    cost = DecodeCost(SubsetCost(5.0, 1e6, 16), SubsetCost(20.0, 1e6, 16))
    assert workers_needed(cost, {"labeled": 8, "unlabeled": 8}, step_seconds) == workers
