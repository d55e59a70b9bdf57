"""A memory bank: for each class the features of its most recent pixels, a ring that every step adds to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prcl_fast.distributed import rank, start_sum, world_size
from prcl_fast.ops import ClassLists, Purpose, philox_normal, sample_anchors

# Draws for the bank must not be those of the anchors of the same step.
_ADD, _DRAW = 0x42414E4B, 0x44524157


class FeatureBank(nn.Module):
    """The last `size` features of every class, drawn `rows` a step from the batch of all processes.

    With several processes each gives its share of the rows, and all hold the same bank.

    Args:
        num_classes: C.
        dim: D.
        size: M, features kept of each class.
        rows: R <= M, features of each class that a step adds, over all processes; at least one of each.
    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    features: Tensor  # [C, M + 1, D] float32; the last one takes what is not to be kept, as zeros
    count: Tensor  # [C] int64, features added so far

    def __init__(self, num_classes: int, dim: int, *, size: int, rows: int = 16) -> None:
        super().__init__()
        if not 1 <= rows <= size:
            raise ValueError(f"rows must be between 1 and size {size}; got {rows}")
        self.num_classes, self.size, self.rows = num_classes, size, rows
        self.register_buffer("features", torch.zeros(num_classes, size + 1, dim))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def add(
        self, features: Tensor, label: Tensor, valid: Tensor, seed: Tensor, *, lists: ClassLists | None = None
    ) -> None:
        """Adds features of pixels drawn uniformly, with replacement, from each class's valid ones.

        Args:
            features: [B, D, h, w] floating; only the rows that are drawn are converted.
            label: [B, h, w] integer; outside 0 .. C-1 means "none".
            valid: [B, h, w] bool.
            seed: int64 [2] = (seed, step), on the features' device.
            lists: `class_lists` of the same label and valid.
        Raises:
            ValueError: the bank has less room than there are processes.
        """
        world = world_size()
        own = max(1, self.rows // world)
        if world * own > self.size:
            raise ValueError(
                f"size must be at least {world * own}, one row of every process; got {self.size}"
            )
        lists = None if lists is None else lists.with_all_hard()
        index = sample_anchors(label, valid, valid, self.num_classes, own, seed ^ _ADD, lists=lists)  # [C, R]
        dim = features.shape[1]
        pixels = features.permute(0, 2, 3, 1).reshape(-1, dim)
        found = index >= 0
        values = torch.where(found[..., None], pixels[index.clamp(min=0)].float(), 0.0)
        if world > 1:
            shares = values.new_zeros(self.num_classes, world, own, dim + 1)
            shares[:, rank()] = torch.cat([values, found[..., None].float()], dim=2)
            values, flag = start_sum(shares)().flatten(1, 2).split([dim, 1], dim=2)
            found = flag[..., 0] > 0
        place = (self.count[:, None] + found.cumsum(1) - 1) % self.size
        place = torch.where(found, place, self.size)
        self.features.scatter_(1, place[..., None].expand(-1, -1, dim), values)
        self.count += found.sum(1)

    @torch.no_grad()
    def draw(self, number: int, seed: Tensor) -> Tensor:
        """[C, number, D]: features drawn uniformly, with replacement; zeros for a class without any."""
        normal = philox_normal(seed ^ _DRAW, (self.num_classes, number, 1), Purpose.VIRTUAL_NEGATIVES)
        kept = self.count.clamp(max=self.size)[:, None, None]
        place = (torch.special.ndtr(normal) * kept).long().minimum((kept - 1).clamp(min=0))
        return self.features.gather(1, place.expand(-1, -1, self.features.shape[-1]))
