"""Stops a run whose loss is no longer finite, without a host synchronisation in every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prcl_fast.errors import RunError

_NEVER = torch.iinfo(torch.int64).max


class NonFiniteLossError(RunError):
    """A loss became NaN or infinite; the message names the term and the iteration."""


class FiniteGuard:
    """Remembers on the device, for each term, the first iteration at which it was not finite."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """`names` of the terms that `watch` will be given."""
        self._names = tuple(names)
        self._first = torch.full((len(names),), _NEVER, device=device)

    def watch(self, values: Tensor, iteration: Tensor) -> None:
        """Records the terms [names] of `iteration`, an integer scalar."""
        now = torch.where(values.isfinite(), _NEVER, iteration)
        torch.minimum(self._first, now, out=self._first)

    def check(self) -> None:
        """Raises NonFiniteLossError if any recorded term was not finite. Reads from the device."""
        first = dict(zip(self._names, self._first.tolist(), strict=True))
        # Terms rather than the total that they spoilt.
        name = min(first, key=lambda name: (first[name], name == "loss"))
        if first[name] == _NEVER:
            return
        raise NonFiniteLossError(
            f"the term {name} was not finite at iteration {first[name]}; the last checkpoint is from before "
            "it. A smaller optim.lr, a larger method.tau or train.amp=bf16 instead of fp16 often helps."
        )
