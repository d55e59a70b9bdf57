"""What the trainer asks of a method, and what every method with one student shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.data.augment import normalize
from prcl_fast.data.batches import Batch
from prcl_fast.models.network import SegmentationNetwork, build_network


@dataclass(frozen=True)
class Step:
    """Where training stands: `iteration` counts optimiser steps from 0, of `total`.

    The count lies on the device, so that a captured step can go on counting.
    """

    iteration: Tensor  # int64 scalar
    total: int


class Method(nn.Module):
    """A student network and the rules by which it learns. Its `state_dict` is its whole state.

    A subclass says `losses`; the trainer knows nothing else of it.
    """

    needs_unlabeled = False

    def __init__(
        self, config: Config, num_classes: int, *, representation: bool = False, probability: bool = False
    ) -> None:
        super().__init__()
        self.optim = config.optim
        self.mean, self.std = config.data.mean, config.data.std
        self.num_classes = num_classes
        self.student: SegmentationNetwork = build_network(
            config.model, num_classes, representation=representation, probability=probability
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: each has `params`, `name` and its base learning rate `lr`."""
        optim = self.optim
        backbone_lr = optim.lr if optim.backbone_lr is None else optim.backbone_lr
        groups = [
            {"name": "backbone", "params": list(self.student.backbone_parameters()), "lr": backbone_lr},
            {"name": "heads", "params": list(self.student.head_parameters()), "lr": optim.lr},
            {
                "name": "probability",
                "params": list(self.student.probability_parameters()),
                "lr": optim.probability_lr,
            },
        ]
        return [group for group in groups if group["params"]]

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The scalars of one micro-batch: "loss" is what is minimised, the others are its named terms."""
        raise NotImplementedError

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """`losses`, for what wraps a module, such as DistributedDataParallel."""
        return self.losses(batch, step)

    def after_step(self, step: Step) -> None:
        """Called once after the optimiser step of `step`."""

    def networks(self) -> dict[str, nn.Module]:
        """The networks to evaluate, by name; the first is the one that counts."""
        return {"student": self.student}

    def diagnostics(self) -> dict[str, Any]:
        """Numbers and sentences about the last batch for the log. Reads from the device."""
        return {}

    def normalize(self, image: Tensor) -> Tensor:
        """[B, 3, h, w] in [0, 1] -> the same, as the network expects it."""
        return normalize(image, self.mean, self.std)
