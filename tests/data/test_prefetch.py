"""Prefetching to the device: one ahead on CUDA, on demand on a CPU, errors when they are due."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import pytest
import torch

from prcl_fast.config import parse_config
from prcl_fast.data.batches import Batch, training_batches
from prcl_fast.data.prefetch import one_ahead, prefetched, tensors_of
from prcl_fast.data.sources import build_source
from prcl_fast.errors import InputError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Log:
    """Records starts and ends of items."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, item: int) -> int:
        self.events.append(f"start {item}")
        return item

    def finish(self, item: int) -> int:
        self.events.append(f"finish {item}")
        return item


def items_that_fail_at(number: int, error: BaseException) -> Iterator[int]:
    yield from range(number)
    raise error


def test_an_item_is_started_before_the_one_before_it_is_handed_out():
    log = Log()
    for item in islice(one_ahead(count(), log.start, log.finish), 3):
        log.events.append(f"consume {item}")
    assert log.events == [
        *("start 0", "start 1", "finish 0", "consume 0"),
        *("start 2", "finish 1", "consume 1"),
        *("start 3", "finish 2", "consume 2"),
    ]


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_every_item_comes_once_and_in_order(length):
    log = Log()
    assert list(one_ahead(iter(range(length)), log.start, log.finish)) == list(range(length))


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_an_error_surfaces_only_after_the_items_before_it(failing):
    log = Log()
    items = items_that_fail_at(failing, InputError(f"item {failing}"))
    results = one_ahead(items, log.start, log.finish)
    assert [next(results) for _ in range(failing)] == list(range(failing))
    with pytest.raises(InputError, match=f"item {failing}"):
        next(results)


def test_an_error_of_starting_an_item_surfaces_when_that_item_is_due():
    def start(item: int) -> int:
        return 1 // (2 - item)

    results = one_ahead(count(), start, lambda started: started)
    assert list(islice(results, 2)) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_interrupt_does_not_wait():
    results = one_ahead(items_that_fail_at(1, KeyboardInterrupt()), lambda item: item, lambda item: item)
    with pytest.raises(KeyboardInterrupt):
        next(results)


def test_closing_ends_it():
    log = Log()
    results = one_ahead(count(), log.start, log.finish)
    next(results)
    results.close()
    assert list(results) == []
    assert log.events == ["start 0", "start 1", "finish 0"]


@dataclass
class Payload:
    number: int


def test_a_result_lives_no_longer_than_its_consumer_keeps_it():
    results = one_ahead(count(), Payload, lambda started: started)
    result = next(results)
    watched = weakref.ref(result)
    del result
    gc.collect()
    assert watched() is None


def test_on_the_cpu_an_item_is_placed_when_it_is_asked_for():
    log = Log()
    for item in islice(prefetched(count(), log.start, torch.device("cpu")), 2):
        log.events.append(f"consume {item}")
    assert log.events == ["start 0", "consume 0", "start 1", "consume 1"]


def made(device: str, number: int, **data) -> list[Batch]:
    config = parse_config(
        {
            "output": "unused",
            "data": {"kind": "synthetic", "crop": [48, 56], "workers": 0, **data},
            "method": {"name": "mean_teacher"},
            "train": {"batch_labeled": 4, "batch_unlabeled": 8},
        },
        "test",
    )
    stream = training_batches(build_source(config.data), config, start=0, device=torch.device(device))
    with contextlib.closing(stream):
        return list(islice(stream, number))


def test_all_tensors_of_a_batch_are_found():
    (batch,) = made("cpu", 1)
    found = {id(tensor) for tensor in tensors_of(batch)}
    sections = (batch, batch.unlabeled, batch.unlabeled.strong)
    expected = [v for part in sections for v in vars(part).values() if torch.is_tensor(v)]
    assert len(expected) == 5 + 6
    assert found == {id(tensor) for tensor in expected}


class FakeStream:
    """Records the order of a stream's events."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return "event"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits")


class FakeTensor(torch.Tensor):
    """Records the stream that it is used on."""

    log: list[str]

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"used on {stream.name}")


def test_on_cuda_the_consumer_waits_for_the_event_and_owns_the_tensors(monkeypatch):
    log: list[str] = []
    side, consumer = FakeStream(log, "side"), FakeStream(log, "consumer")

    @contextlib.contextmanager
    def entered(stream: FakeStream):
        log.append(f"enter {stream.name}")
        yield
        log.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)

    @dataclass
    class Placed:
        image: torch.Tensor

    def place(item: int) -> Placed:
        log.append(f"place {item}")
        tensor = torch.zeros(1).as_subclass(FakeTensor)
        tensor.log = log
        return Placed(tensor)

    stream = prefetched(count(), place, torch.device("cuda"))
    next(stream)
    placed = [["enter side", f"place {item}", "side records", "leave side"] for item in range(2)]
    assert log == [*placed[0], *placed[1], "consumer waits", "used on consumer"]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_cuda_are_those_of_the_cpu(workers):
    for one, other in zip(made("cpu", 6), made("cuda", 6, workers=workers), strict=True):
        pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
        assert pairs
        for expected, found in pairs:
            assert found.device.type == "cuda"
            if expected.dtype.is_floating_point:
                torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=0)
            else:
                assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@needs_cuda
def test_memory_of_a_result_is_not_reused_before_the_consumer_is_done():
    device = torch.device("cuda")

    def place(item: int) -> torch.Tensor:
        return torch.full((1 << 22,), float(item), device=device)

    sums = []
    for item in islice(prefetched(count(), place, device), 20):
        torch.cuda._sleep(5_000_000)  # the consumer is late, and drops the item at once
        sums.append(item.sum() / item.numel())
        del item
    assert torch.stack(sums).tolist() == list(range(20))
