"""Order of the training images: the batch of each step, and each rank's rows of it."""

from __future__ import annotations

import numpy as np

from prcl_fast.data.random_streams import RandomStream, generator


class BatchSampler:
    """Batches from one random permutation per epoch.

    A batch never spans two epochs: images that do not fill a batch are left out of that epoch, so no batch
    holds an image twice. With fewer images than a batch holds, the permutation is repeated within the batch.
    """

    def __init__(self, count: int, batch: int, seed: int, stream: RandomStream) -> None:
        """`count` images (at least 1), `batch` of them a step over all ranks."""
        self.count, self.batch, self.seed, self.stream = count, batch, seed, stream
        self.batches_per_epoch = max(1, count // batch)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> list[int]:
        """The image indices of step `step` (from 0), over all ranks."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            order = generator(self.seed, self.stream, step=epoch).permutation(self.count)
            self._order = np.resize(order, max(self.count, self.batch))
            self._epoch = epoch
        return self._order[position * self.batch : (position + 1) * self.batch].tolist()


def rows_of(batch: int, micro_step: int, *, accumulate: int, rank: int, world: int) -> slice:
    """The rows of a step's batch that rank `rank` of `world` takes in micro-step `micro_step`.

    A step is `accumulate` micro-steps; the micro-steps of all ranks cover the batch once.
    """
    count = batch // (accumulate * world)
    first = (micro_step % accumulate * world + rank) * count
    return slice(first, first + count)
