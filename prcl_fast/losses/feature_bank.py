"""Memory bank: a ring of each class's most recent pixel features, which every step adds to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prcl_fast.ops import ClassLists, Purpose, class_lists, philox_normal, sample_anchors
from prcl_fast.processes.collectives import rank, start_sum, world_size

# Draws for the bank must not be those of the anchors of the same step.
_ADD, _DRAW = 0x42414E4B, 0x44524157
# Steps that fill a large ring; steps and rows a step of a small one.
_STEPS, _FEW_STEPS, _FEW_ROWS = 128, 8, 64


def rows_a_step(size: int) -> int:
    """Rows of each class that a step adds to a ring of `size` features: M / 128, or 64 of at most M / 8.

    Every valid pixel would be too many: a batch of 16 maps of 129 x 129 has 266 thousand, 0.5 GB of float32
    means and variances in 256 dimensions. With 65536 features a step adds 512 of a class, with 30000 it adds
    234. So a class's ring is full after 128 steps with that class (more where it has fewer valid pixels), and
    from then on holds nothing older than 128 of its steps.
    """
    return max(1, size // _STEPS, min(_FEW_ROWS, size // _FEW_STEPS))


class FeatureBank(nn.Module):
    """The last `size` features of every class, drawn `rows` a step from the batch of all processes.

    With several processes each gives its share of the rows, and all hold the same bank, by an all-reduce of
    [C, R, W + 1] numbers a step.

    The IJCV paper's bank (table 7) keeps mu and sigma^2 of 30000 or 65536 pixels of each class in 256
    dimensions: `FeatureBank(21, 256, 256, size=65536)`, 2.63 GiB. It stays on the device and is part of every
    checkpoint.

    Args:
        num_classes: C.
        dims: channels of each map that `add` takes; W is their sum.
        size: M, features kept of each class.
        rows: R <= M, features of each class that a step adds at most, over all processes; at least one of
            each. None: `rows_a_step`.
    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    features: Tensor  # [C, M + 1, W] float32; the last one takes what is not to be kept, as zeros
    count: Tensor  # [C] int64, features added so far

    def __init__(self, num_classes: int, *dims: int, size: int, rows: int | None = None) -> None:
        super().__init__()
        rows = rows_a_step(size) if rows is None else rows
        if not 1 <= rows <= size:
            raise ValueError(f"rows must be between 1 and size {size}; got {rows}")
        self.num_classes, self.dims, self.size, self.rows = num_classes, dims, size, rows
        self.register_buffer("features", torch.zeros(num_classes, size + 1, sum(dims)))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def nbytes(self) -> int:
        """Bytes that the bank takes on its device."""
        return self.features.nbytes + self.count.nbytes

    def extra_repr(self) -> str:
        return f"dims={self.dims}, size={self.size}, rows={self.rows}, nbytes={self.nbytes}"

    @torch.no_grad()
    def add(
        self,
        maps: Tensor | Sequence[Tensor],
        label: Tensor,
        valid: Tensor,
        seed: Tensor,
        *,
        lists: ClassLists | None = None,
    ) -> None:
        """Adds features of pixels drawn uniformly, with replacement, from each class's valid ones.

        A class with fewer than R valid pixels adds as many rows as it has. A row that is not finite is left
        out.

        Args:
            maps: [B, D_i, h, w] floating, D_i as in `dims`; or the one tensor. A feature is what the maps
                have at a pixel, one after the other. Only the rows that are drawn are converted.
            label: [B, h, w] integer; outside 0 .. C-1 means "none".
            valid: [B, h, w] bool.
            seed: int64 [2] = (seed, step), on the maps' device.
            lists: `class_lists` of the same label and valid.
        Raises:
            ValueError: the maps are not those of `dims`, or the bank has less room than there are processes.
        """
        maps = (maps,) if isinstance(maps, Tensor) else maps
        channels = tuple(x.shape[1] for x in maps)
        if channels != self.dims:
            raise ValueError(f"maps must have {self.dims} channels; got {channels}")
        world = world_size()
        own = max(1, self.rows // world)
        if world * own > self.size:
            raise ValueError(
                f"size must be at least {world * own}, one row of every process; got {self.size}"
            )
        lists = class_lists(label, valid, valid, self.num_classes) if lists is None else lists.with_all_hard()
        index = sample_anchors(label, valid, valid, self.num_classes, own, seed ^ _ADD, lists=lists)  # [C, R]
        pixels = lists.valid_start.diff()
        rows = [x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])[index.clamp(min=0)].float() for x in maps]
        values = torch.cat(rows, dim=2)  # [C, R, W]
        found = (torch.arange(own, device=index.device) < pixels[:, None]) & values.isfinite().all(2)
        values = torch.where(found[..., None], values, 0.0)
        width = values.shape[2]
        if world > 1:
            shares = values.new_zeros(self.num_classes, world, own, width + 1)
            shares[:, rank()] = torch.cat([values, found[..., None].float()], dim=2)
            values, flag = start_sum(shares)().flatten(1, 2).split([width, 1], dim=2)
            found = flag[..., 0] > 0
        place = (self.count[:, None] + found.cumsum(1) - 1) % self.size
        place = torch.where(found, place, self.size)
        self.features.scatter_(1, place[..., None].expand(-1, -1, width), values)
        self.count += found.sum(1)

    @torch.no_grad()
    def draw(self, number: int, seed: Tensor) -> tuple[Tensor, ...]:
        """Features drawn uniformly, with replacement, from all that a class keeps.

        Args:
            number: V, per class.
            seed: int64 [2] = (seed, step), on the bank's device.
        Returns:
            [C, V, D_i] float32 for each of `dims`, zeros for a class without features; then [C] bool, the
            classes that have some.
        """
        normal = philox_normal(seed ^ _DRAW, (self.num_classes, number, 1), Purpose.VIRTUAL_NEGATIVES)
        kept = self.count.clamp(max=self.size)[:, None, None]
        place = (torch.special.ndtr(normal) * kept).long().minimum((kept - 1).clamp(min=0))
        drawn = self.features.gather(1, place.expand(-1, -1, self.features.shape[-1]))
        return *drawn.split(self.dims, dim=2), self.count > 0
