"""Which images form the batch of a step: a pure function of (seed, step, subset)."""

from __future__ import annotations

import numpy as np

from prcl_fast.data.draws import Purpose, generator


class BatchSampler:
    """Batches from one random permutation per epoch.

    A batch never spans two epochs: what does not fill a batch is left out of that epoch, so that no image
    meets itself in a batch. With fewer images than a batch holds, the permutation is repeated within it.
    """

    def __init__(self, count: int, batch: int, seed: int, purpose: Purpose) -> None:
        """`count` images (at least 1), `batch` of them a step over all processes."""
        self.count, self.batch, self.seed, self.purpose = count, batch, seed, purpose
        self.batches_per_epoch = max(1, count // batch)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """The image indices of step `step` (from 0), for all processes together."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            order = generator(self.seed, self.purpose, step=epoch).permutation(self.count)
            self._order = np.resize(order, max(self.count, self.batch))
            self._epoch = epoch
        return self._order[position * self.batch : (position + 1) * self.batch].tolist()


def share(batch: int, micro_step: int, *, accumulate: int, rank: int, world: int) -> slice:
    """The rows of a step's batch that process `rank` of `world` takes in micro-step `micro_step`.

    A step is `accumulate` micro-steps; together, the processes' micro-steps cover the batch once.
    """
    part = batch // (accumulate * world)
    first = (micro_step % accumulate * world + rank) * part
    return slice(first, first + part)
