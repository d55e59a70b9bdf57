"""The guard against NaN and infinity: find the term, protect the buffers, end the run or skip the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prcl_fast.data.micro_steps import named_images
from prcl_fast.errors import RunError

GRADIENT = "gradient"
_MOST_SKIPPED = 10  # consecutive skipped steps that end the run
_NEVER = torch.iinfo(torch.int64).max


class NonFiniteLossError(RunError):
    """A loss or the gradient is NaN or infinite; the message names the term and the iteration."""


@dataclass(frozen=True)
class Failure:
    """The first term that was not finite, its iteration, and the number of such steps."""

    term: str  # "gradient", or "term " and the name of a loss
    iteration: int
    steps: int  # since the start of the command
    in_a_row: int  # of these, up to the last step

    def skipped(self, on_nonfinite: str, seed: int, images: Sequence[str]) -> str:
        """A line about the skipped steps. With the seed and the images, the first one can be replayed.

        Args:
            on_nonfinite: "stop" or "skip", as in `train.on_nonfinite`.
            images: of the first step.

        Raises:
            NonFiniteLossError: the run must end: `on_nonfinite` is "stop", or too many were skipped in a row.
        """
        found = (
            f"the {self.term} was not finite at iteration {self.iteration} (seed {seed}, "
            f"{named_images(images)})"
        )
        if on_nonfinite == "stop":
            raise NonFiniteLossError(
                f"{found}; the last checkpoint is from before it, and the same command replays it from "
                "there. A smaller optim.lr, a larger method.tau or train.amp=bf16 instead of fp16 often "
                "helps; train.on_nonfinite=skip leaves such steps out."
            )
        if self.in_a_row >= _MOST_SKIPPED:
            raise NonFiniteLossError(f"{found}, as were {self.in_a_row} steps in a row: the run is stopped")
        return f"{found}: left out, {self.steps} such steps since the start of this command"


class FiniteGuard:
    """Stores on the device, for each term, the first iteration at which it was not finite.

    Attributes:
        bad: float32 scalar, 1 if any term of the last step was not finite, else 0.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """`names` of the terms, in the order in which `watch` takes them."""
        self._names = tuple(names)
        self._first = torch.full((len(names),), _NEVER, device=device)
        self.bad = torch.zeros((), dtype=torch.float32, device=device)  # the type of fused optimisers
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def watch(self, values: Tensor, iteration: Tensor) -> None:
        """Records the terms [names] of `iteration`, an integer scalar."""
        finite = values.isfinite()
        torch.minimum(self._first, torch.where(finite, _NEVER, iteration), out=self._first)
        self.bad.copy_(~finite.all())
        bad = self.bad.long()
        self._steps += bad
        self._in_a_row.add_(1).mul_(bad)

    def take(self) -> Failure | None:
        """The failure since the last call, None if all was finite. Reads from the device."""
        first = dict(zip(self._names, self._first.tolist(), strict=True))
        # A term makes the total and the gradient NaN, too: of the same iteration, name the term.
        name = min(first, key=lambda name: (first[name], name in ("loss", GRADIENT), name == GRADIENT))
        if first[name] == _NEVER:
            return None
        self._first.fill_(_NEVER)
        term = name if name == GRADIENT else f"term {name}"
        return Failure(term, first[name], int(self._steps), int(self._in_a_row))


class BufferSnapshot:
    """A copy of a module's buffers from before a step: batch statistics, prototypes, their counts."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._saved = [torch.empty_like(buffer) for buffer in self._buffers]

    @torch.no_grad()
    def take(self) -> None:
        """Copies the present values."""
        torch._foreach_copy_(self._saved, self._buffers)

    @torch.no_grad()
    def restore_if(self, bad: Tensor) -> None:
        """Restores the copied values if `bad` is not 0, without a host synchronisation."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            torch.where(bad != 0, saved, buffer, out=buffer)
