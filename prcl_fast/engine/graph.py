"""The whole step as one CUDA graph: a single launch in place of thousands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prcl_fast.data.batches import Batch
from prcl_fast.data.prefetch import tensors_of
from prcl_fast.errors import RunError
from prcl_fast.processes.collectives import world_size

_WARM_UP = 3
# DistributedDataParallel lays out its buckets in the first two steps, and the host waits for its times in the
# first ten. PyTorch's notes on CUDA graphs ask for eleven.
_WARM_UP_OF_SEVERAL = 11


def warm_up_steps() -> int:
    """Real steps before a capture: libraries make handles, compilers code, the optimiser its state."""
    return _WARM_UP if world_size() == 1 else _WARM_UP_OF_SEVERAL


class GraphCaptureError(RunError):
    """The step does something that a CUDA graph cannot hold; the message says what PyTorch says of it."""


class CapturedStep:
    """Runs `step` eagerly a few times, then captures it and replays it on batches of the same shapes.

    Each batch is copied into the tensors that the graph reads; the tensors that the step returns and those
    that its method remembers are the graph's own, written anew by every replay.

    Args:
        step: a function of micro-batches that changes nothing but tensors on the device, in place.
        stream: of the eager steps and of the capture. What holds on to the gradients' accumulation, as
            DistributedDataParallel does from its start, must have been made on it.
    """

    def __init__(
        self, step: Callable[[Sequence[Batch]], dict[str, Tensor]], stream: torch.cuda.Stream
    ) -> None:
        self._step, self._stream = step, stream
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Batch] = []
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One step.

        Raises:
            GraphCaptureError: the step cannot be captured.
            ValueError: a batch has another shape than those before.
        """
        self._calls += 1
        if self._calls <= warm_up_steps():
            with on_stream(self._stream):  # so that the gradients' accumulation belongs to it
                return self._step(batches)
        if self._graph is None:
            self._inputs = [cloned(batch) for batch in batches]
            self._graph = self._capture()
        for own, batch in zip(self._inputs, batches, strict=True):
            copy_batch(own, batch)
        self._graph.replay()
        return self._outputs

    def forget(self) -> None:
        """Begins anew: the next calls are eager again, then the step is captured as it has become.

        A process group must not be left before: NCCL waits for the end of every graph that holds its
        collectives.
        """
        self._graph, self._calls = None, 0

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on: the loader's pins memory, NCCL's asks what has ended.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = self._step(self._inputs)
        except RuntimeError as error:
            # Ending a capture that has failed is an error of its own, which hides the first.
            reason = " ".join(str(error.__context__ or error).split())[:300]
            raise GraphCaptureError(
                f"train.graph: this configuration's step cannot be captured: {reason}; set train.graph=false"
            ) from error
        return graph


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs the block on `stream`, between what the current one did before and does after; None: as it is."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def cloned(batch: Batch) -> Batch:
    """A batch with tensors of its own, of the same memory formats."""
    return _mapped(batch, torch.clone)


def copy_batch(target: Batch, source: Batch) -> None:
    """Copies every tensor into `target`'s. Raises ValueError where the shapes differ."""
    for own, other in zip(tensors_of(target), tensors_of(source), strict=True):
        if own.shape != other.shape:
            raise ValueError(f"a captured step takes {list(own.shape)}; got {list(other.shape)}")
        own.copy_(other, non_blocking=True)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), function) for f in fields(value)})
    return value
