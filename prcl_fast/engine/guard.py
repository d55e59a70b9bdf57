"""What a step that is not finite may do: nothing to the weights, and either end the run or be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prcl_fast.errors import RunError

GRADIENT = "gradient"
_NAMED = 16  # images
_NEVER = torch.iinfo(torch.int64).max


class NonFiniteLossError(RunError):
    """A loss or the gradient became NaN or infinite; the message names the term and the iteration."""


@dataclass(frozen=True)
class Failure:
    """The first term that was not finite, and its iteration; how many such steps there were."""

    term: str  # "gradient", or "term " and the name of a loss
    iteration: int
    steps: int
    in_a_row: int  # the last ones

    def describe(self, seed: int, images: Sequence[str]) -> str:
        """What happened, and what replays it: the seed and the step's images."""
        return f"the {self.term} was not finite at iteration {self.iteration} (seed {seed}, {named(images)})"


def named(images: Sequence[str]) -> str:
    """The first of some images, for a message."""
    more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    return f"images {', '.join(images[:_NAMED])}{more}"


class FiniteGuard:
    """Remembers on the device, for each term, the first iteration at which it was not finite.

    Attributes:
        bad: float32 scalar, 1 if any term of the last step was not finite, else 0.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """`names` of the terms that `watch` will be given."""
        self._names = tuple(names)
        self._first = torch.full((len(names),), _NEVER, device=device)
        self.bad = torch.zeros((), dtype=torch.float32, device=device)  # what fused optimisers take
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
        """What was not finite since the last call, None if nothing was. Reads from the device."""
        first = dict(zip(self._names, self._first.tolist(), strict=True))
        # Terms rather than the total, and the gradient, that they spoilt.
        name = min(first, key=lambda name: (first[name], name in ("loss", GRADIENT), name == GRADIENT))
        if first[name] == _NEVER:
            return None
        self._first.fill_(_NEVER)
        term = name if name == GRADIENT else f"term {name}"
        return Failure(term, first[name], int(self._steps), int(self._in_a_row))


class BufferSnapshot:
    """The buffers of a module as they were before a step: batch statistics, prototypes, their counts."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._saved = [torch.empty_like(buffer) for buffer in self._buffers]

    @torch.no_grad()
    def take(self) -> None:
        """Remembers the present values."""
        torch._foreach_copy_(self._saved, self._buffers)

    @torch.no_grad()
    def restore_if(self, bad: Tensor) -> None:
        """Puts the remembered values back where `bad` is not 0; the host need not know."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            torch.where(bad != 0, saved, buffer, out=buffer)
