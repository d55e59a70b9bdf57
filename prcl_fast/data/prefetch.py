"""Prefetching to the device: on CUDA, one batch ahead of the consumer and on a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Started = TypeVar("Started")
Result = TypeVar("Result")


def prefetched(
    items: Iterator[Item], place: Callable[[Item], Result], device: torch.device
) -> Generator[Result, None, None]:
    """place(item) for every item, in order; `place` copies an item to the device and augments it there.

    On CUDA, `place` runs on a stream of its own, for item k + 1 before result k is handed out, so that the
    copies from pinned memory and the augmentation overlap with the consumer's work on result k. The
    consumer's current stream waits for its result, and may use it as if it had been made there.

    On a CPU, `place` runs when its result is asked for.
    """
    if device.type != "cuda":
        yield from map(place, items)
        return
    stream = torch.cuda.Stream(device)

    def start(item: Item) -> tuple[Result, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return place(item), stream.record_event()

    def finish(started: tuple[Result, torch.cuda.Event]) -> Result:
        result, placed = started
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(placed)
        for tensor in tensors_of(result):
            # The memory belongs to `stream`, which must not reuse it before the consumer is done.
            tensor.record_stream(consumer)
        return result

    yield from one_ahead(items, start, finish)


def one_ahead(
    items: Iterator[Item], start: Callable[[Item], Started], finish: Callable[[Started], Result]
) -> Generator[Result, None, None]:
    """finish(start(item)) for every item, in order; item k + 1 is started before result k is handed out.

    An exception of item k + 1 is raised when that item is asked for, after result k was handed out.
    """
    ahead: deque[Started] = deque()
    failure: Exception | None = None
    more = True
    while True:
        try:
            while more and len(ahead) < 2:
                ahead.append(start(next(items)))
        except StopIteration:
            more = False
        except Exception as error:
            failure, more = error, False
        if not ahead:
            break
        # No name refers to a result: its memory is free as soon as the consumer drops it.
        yield finish(ahead.popleft())
    if failure is not None:
        raise failure


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of a dataclass and of the dataclasses in it, in the order of the fields."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
