"""Memory bank: a ring buffer of each class's most recent pixel features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prcl_fast.ops import ClassLists, Purpose, class_lists, philox_normal, sample_anchors
from prcl_fast.ops.arguments import FLOATING, check_count, check_pixel_maps, check_seed, check_tensor
from prcl_fast.processes.collectives import rank, start_sum, world_size

# Keep the draws of the bank apart from the anchors' draws of the same step.
_ADD, _DRAW = 0x42414E4B, 0x44524157
_STEPS = 128  # steps that fill a large ring
_FEW_STEPS = 8  # least steps that fill a small ring
_FEW_ROWS = 64  # most rows of a class that a step adds to a small ring


def rows_a_step(size: int) -> int:
    """Rows of each class that a step adds to a ring of `size` M: the larger of M / 128 and min(64, M / 8).

    All valid pixels would be too many: a batch of 16 maps of 129 x 129 has 266 thousand, 0.5 GB of float32
    means and variances in 256 dimensions. A ring of 65536 takes 512 rows of a class per step, one of 30000
    takes 234. A large ring is thus full after 128 steps with the class and then spans its last 128 steps,
    or more if the class has fewer valid pixels.
    """
    return max(1, size // _STEPS, min(_FEW_ROWS, size // _FEW_STEPS))


class FeatureBank(nn.Module):
    """The last `size` features of every class; a step adds `rows` of them, drawn from its batch.

    With several processes each contributes an equal number of rows. One all-reduce of [C, R, W + 1] numbers
    per step gives all processes the same bank.

    The IJCV paper's bank (table 7) holds mu and sigma^2 of 30000 or 65536 pixels of each class in 256
    dimensions: `FeatureBank(21, 256, 256, size=65536)` takes 2.63 GiB. The bank stays on the device and is
    part of every checkpoint.

    Args:
        num_classes: C.
        dims: channels of each map that `add` takes; W is their sum.
        size: M, features kept of each class.
        rows: R <= M, largest number of features of a class that a step adds, over all processes; at least
            one of each process. None: `rows_a_step`.
    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range; the message names it.
    """

    features: Tensor  # [C, M + 1, W] float32; row M takes the writes that are to be discarded
    count: Tensor  # [C] int64, features added so far

    def __init__(self, num_classes: int, *dims: int, size: int, rows: int | None = None) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("size", size)
        for dim in dims:
            check_count("dims", dim)
        rows = rows_a_step(size) if rows is None else rows
        if not 1 <= rows <= size:
            raise ValueError(f"rows must be between 1 and size {size}; got {rows}")
        self.num_classes, self.dims, self.size, self.rows = num_classes, dims, size, rows
        self.register_buffer("features", torch.zeros(num_classes, size + 1, sum(dims)))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def nbytes(self) -> int:
        """Size on the device in bytes."""
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

        A class with n < R valid pixels adds n rows. Rows that are not finite are left out.

        Args:
            maps: one tensor [B, D_i, h, w], floating, for each of `dims`; a single one may stand alone. A
                feature is the concatenation of all maps at a pixel.
            label: [B, h, w] integer; values outside 0 .. C-1 are no class.
            valid: [B, h, w] bool.
            seed: int64 [2] = (seed, step), on the maps' device.
            lists: `class_lists` of the same label and valid.
        Raises:
            TypeError, ValueError: an argument does not fit the bank or the other ones, or `size` is below the
                number of processes; the message names it.
        """
        maps = (maps,) if isinstance(maps, Tensor) else maps
        if len(maps) != len(self.dims):
            raise ValueError(f"maps must be {len(self.dims)} tensors; got {len(maps)}")
        for number, (features, width) in enumerate(zip(maps, self.dims, strict=True)):
            name = f"maps[{number}]"
            check_tensor(name, features, ("B", width, "h", "w"), FLOATING, ("the bank", self.features))
            check_pixel_maps(name, features, seed, label=label, valid=valid)
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
        """Features drawn uniformly, with replacement, from the ring of each class.

        Args:
            number: V, per class.
            seed: int64 [2] = (seed, step), on the bank's device.
        Returns:
            [C, V, D_i] float32 for each of `dims`, zeros for a class without features; then [C] bool, the
            classes with features.
        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_count("number", number)
        check_seed(seed, ("the bank", self.features))
        normal = philox_normal(seed ^ _DRAW, (self.num_classes, number, 1), Purpose.VIRTUAL_NEGATIVES)
        kept = self.count.clamp(max=self.size)[:, None, None]
        place = (torch.special.ndtr(normal) * kept).long().minimum((kept - 1).clamp(min=0))
        drawn = self.features.gather(1, place.expand(-1, -1, self.features.shape[-1]))
        return *drawn.split(self.dims, dim=2), self.count > 0
