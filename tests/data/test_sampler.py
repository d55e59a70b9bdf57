"""Order of the images: a function of (seed, step, subset), without repetition in a batch."""

from __future__ import annotations

import pytest

from prcl_fast.data.random_streams import RandomStream
from prcl_fast.data.sampler import BatchSampler, rows_of


def sampler(
    count: int, batch: int, seed: int = 0, stream: RandomStream = RandomStream.ORDER_LABELED
) -> BatchSampler:
    return BatchSampler(count, batch, seed, stream)


def epoch(order: BatchSampler, number: int) -> list[int]:
    per_epoch = order.batches_per_epoch
    return [i for step in range(number * per_epoch, (number + 1) * per_epoch) for i in order.indices(step)]


def test_an_epoch_shows_every_image_exactly_once():
    order = sampler(24, 4)
    for number in range(3):
        assert sorted(epoch(order, number)) == list(range(24))


def test_epochs_differ_in_order():
    order = sampler(24, 4)
    assert len({tuple(epoch(order, number)) for number in range(5)}) == 5


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (9, 8), (100, 16)])
def test_no_batch_holds_an_image_twice(count, batch):
    order = sampler(count, batch)
    for step in range(60):
        indices = order.indices(step)
        assert len(indices) == batch
        assert len(set(indices)) == batch


def test_what_does_not_fill_a_batch_is_not_always_the_same():
    order = sampler(10, 4)
    seen = {i for number in range(20) for i in epoch(order, number)}
    assert seen == set(range(10))


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (3, 8), (5, 8)])
def test_with_fewer_images_than_a_batch_each_is_repeated_evenly(count, batch):
    order = sampler(count, batch)
    for step in range(5):
        indices = order.indices(step)
        assert len(indices) == batch
        times = [indices.count(i) for i in range(count)]
        assert max(times) - min(times) <= 1


def test_order_is_a_function_of_the_step_alone():
    forwards, backwards = sampler(13, 3), sampler(13, 3)
    steps = range(30)
    expected = [forwards.indices(step) for step in steps]
    assert [backwards.indices(step) for step in reversed(steps)] == expected[::-1]


def test_seed_and_subset_change_the_order():
    orders = [
        sampler(50, 50).indices(0),
        sampler(50, 50, seed=1).indices(0),
        sampler(50, 50, stream=RandomStream.ORDER_UNLABELED).indices(0),
    ]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_rows_of_ranks_and_micro_steps_cover_a_batch_once(accumulate, world):
    rows = list(range(24))
    for step in (0, 5):
        taken = [
            rows[rows_of(24, step * accumulate + part, accumulate=accumulate, rank=rank, world=world)]
            for part in range(accumulate)
            for rank in range(world)
        ]
        assert sorted(i for part in taken for i in part) == rows
        assert {len(part) for part in taken} == {24 // (accumulate * world)}
