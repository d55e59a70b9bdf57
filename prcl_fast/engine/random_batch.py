"""A micro-batch of random pixels: what a training step computes on, without a data set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prcl_fast.config import Config
from prcl_fast.data.batches import Batch
from prcl_fast.data.draws import STRONG_NUMBERS, strong_draws


def random_batch(
    config: Config, num_classes: int, labeled: int, unlabeled: int, device: torch.device
) -> Batch:
    """Uniform images and labels of `data.crop`, every pixel inside and every class present.

    Args:
        labeled, unlabeled: numbers of images; with 0 unlabeled ones the batch has no unlabeled part.
    """
    height, width = config.data.crop

    def images(count: int) -> Tensor:
        return torch.rand(count, height, width, 3, device=device).permute(0, 3, 1, 2)

    label = torch.randint(num_classes, (labeled, height, width), dtype=torch.uint8, device=device)
    seed = torch.zeros(2, dtype=torch.int64, device=device)
    if not unlabeled:
        return Batch(images(labeled), label, None, None, None, seed)
    uniform = np.random.default_rng(0).random((unlabeled, STRONG_NUMBERS))
    return Batch(
        images(labeled),
        label,
        images(unlabeled),
        torch.ones(unlabeled, height, width, dtype=torch.bool, device=device),
        strong_draws(uniform, config.data.crop, config.data.augment).to(device),
        seed,
    )
