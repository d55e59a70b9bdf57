"""A step as one CUDA graph: a single launch in place of thousands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.data.batches import Batch
from prcl_fast.data.prefetch import tensors_of
from prcl_fast.errors import InputError, RunError
from prcl_fast.processes.collectives import backend, world_size

_WARM_UP = 3
# DistributedDataParallel lays out its buckets in the first two steps and reads its timings on the host in the
# first ten. PyTorch's notes on CUDA graphs ask for eleven.
_WARM_UP_OF_SEVERAL = 11


def check_capture(config: Config, device: torch.device) -> None:
    """Raises InputError where a run's step does not support `train.graph` or `train.sync_check`."""
    train, world = config.train, world_size()
    for key in ("graph", "sync_check"):
        if not getattr(train, key):
            continue
        if device.type != "cuda":
            raise InputError(f"train.{key}: needs a CUDA device; this run is on {device}")
        if world > 1 and config.method.warmup_iterations > 0:
            # DistributedDataParallel asks the device for the parameters that a warm-up leaves out.
            raise InputError(
                f"train.{key}: with a warm-up, the step of {world} processes waits for the device; set "
                f"method.warmup=0 or train.{key}=false"
            )
    if train.graph and world > 1 and backend("cuda") != "nccl":
        raise InputError(
            f"train.graph: a graph can hold only the collectives of NCCL; these {world} processes use "
            f"{backend('cuda')}, set it to false"
        )
    if train.graph and world > 1 and train.stall_timeout is None:
        raise InputError(
            f"train.stall_timeout: must be set where train.graph captures the step of {world} processes: "
            "nothing else ends a process that waits for a lost one"
        )


def warm_up_steps() -> int:
    """Eager steps before a capture: libraries make handles, compilers code, the optimiser its state."""
    return _WARM_UP if world_size() == 1 else _WARM_UP_OF_SEVERAL


@contextlib.contextmanager
def host_syncs_refused(refused: bool) -> Iterator[None]:
    """Makes a host synchronisation inside the block an error if `refused`."""
    if not refused:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class GraphCaptureError(RunError):
    """The step does something that a CUDA graph cannot hold; the message quotes PyTorch's reason."""


class CapturedStep:
    """Runs `step` eagerly a few times, then captures it and replays it on batches of the same shapes.

    Each batch is copied into the graph's input tensors. The tensors that the step returns and those that its
    method stores belong to the graph: every replay overwrites them.

    Args:
        step: a function of micro-batches that changes only tensors on the device, in place.
        stream: of the eager steps and of the capture. A DistributedDataParallel, which holds the gradients'
            accumulators from its start, must have been made on it.
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
            ValueError: a batch has another shape than the captured one.
        """
        self._calls += 1
        if self._calls <= warm_up_steps():
            with on_stream(self._stream):  # AccumulateGrad nodes belong to this stream
                return self._step(batches)
        if self._graph is None:
            self._inputs = [cloned(batch) for batch in batches]
            self._graph = self._capture()
        for own, batch in zip(self._inputs, batches, strict=True):
            copy_batch(own, batch)
        self._graph.replay()
        return self._outputs

    def forget(self) -> None:
        """Drops the graph: the next calls are eager again, then the step is captured anew.

        Must be called before the process group is left: NCCL waits for the end of every graph that holds its
        collectives.
        """
        self._graph, self._calls = None, 0

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Calls of other threads are allowed: the loader's pins memory, NCCL's watchdog queries events.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = self._step(self._inputs)
        except RuntimeError as error:
            # Leaving a failed capture raises another error, whose context is the first one.
            reason = " ".join(str(error.__context__ or error).split())[:300]
            raise GraphCaptureError(
                f"train.graph: this configuration's step cannot be captured: {reason}; set train.graph=false"
            ) from error
        return graph


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs the block on `stream`, ordered with the current stream; None: on the current one."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def cloned(batch: Batch) -> Batch:
    """A copy of the batch, in the same memory formats."""
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
