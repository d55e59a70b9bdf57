"""Stops a run whose loss is no longer finite, without a host synchronisation in every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names the term and the iteration."""


class FiniteGuard:
    """Remembers on the device, for each term, the first iteration at which it was not finite."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    def watch(self, losses: Mapping[str, Tensor], iteration: int) -> None:
        """Records this iteration's terms (scalars)."""
        # The total is last, so that a term is named rather than the sum that it spoilt.
        names = (*(name for name in losses if name != "loss"), "loss")
        values = torch.stack([losses[name].detach().float() for name in names])
        if self._first is None:
            self._names = names
            self._first = torch.full((len(names),), torch.iinfo(torch.int64).max, device=values.device)
        now = torch.full_like(self._first, iteration)
        self._first = torch.where(values.isfinite(), self._first, torch.minimum(self._first, now))

    def check(self) -> None:
        """Raises NonFiniteLossError if any recorded term was not finite. Reads from the device."""
        if self._first is None:
            return
        first = self._first.tolist()
        earliest = min(first)
        if earliest == torch.iinfo(torch.int64).max:
            return
        name = self._names[first.index(earliest)]
        raise NonFiniteLossError(
            f"the term {name} was not finite at iteration {earliest}; the last checkpoint is from before it. "
            "A smaller optim.lr, a larger method.tau or train.amp=bf16 instead of fp16 often helps."
        )
