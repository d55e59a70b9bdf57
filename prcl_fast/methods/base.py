"""Interface of a method to the trainer, and the supervised pass that all methods share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.methods import MethodSection
from prcl_fast.data.augment import normalize
from prcl_fast.data.batches import Batch
from prcl_fast.errors import InputError
from prcl_fast.losses import PixelCounts, start_counting, supervised_loss
from prcl_fast.models.build import build_network
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork
from prcl_fast.ops.arguments import check_draws
from prcl_fast.step_parts import part


def check_draws_of_step(keys: str, draws: int) -> None:
    """Raises InputError where the keys ask for more draws in a step than an op can make."""
    try:
        check_draws(keys, draws)
    except ValueError as error:
        raise InputError(str(error)) from None


@dataclass(frozen=True)
class StepIndex:
    """The number of an optimiser step: `iteration`, from 0, of `total`.

    The iteration lies on the device, so that a captured step goes on counting.
    """

    iteration: Tensor  # int64 scalar
    total: int


class Method(nn.Module):
    """A student network and the rules by which it learns. Its `state_dict` is its whole state.

    A subclass defines `losses` and declares the type of its `settings`.

    Attributes:
        settings: the section `method` of the configuration.
        warmup: number of supervised iterations at the start.
        warming_up: whether the current step is one of them.
    """

    settings: MethodSection
    # Losses on unlabeled images: zeros in the warm-up, so that all steps log the same terms.
    unlabeled_terms: tuple[str, ...] = ()

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.settings = config.method
        self.optim = config.optim
        self.probability_lr = config.probability_lr
        self.mean, self.std = config.data.mean, config.data.std
        self.num_classes = num_classes
        self.warmup = config.method.warmup_iterations
        self.warming_up = False
        self.student = self.new_network(config, num_classes)

    def new_network(self, config: Config, num_classes: int) -> SegmentationNetwork:
        """A network with the heads that the method needs, freshly initialised."""
        return build_network(config.model, num_classes)

    def learners(self) -> list[SegmentationNetwork]:
        """The networks that learn by gradient."""
        return [self.student]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: each has `params`, `name` and its base learning rate `lr`."""
        optim, learners = self.optim, self.learners()
        backbone_lr = optim.lr if optim.backbone_lr is None else optim.backbone_lr
        parts = [
            ("backbone", [network.backbone_parameters() for network in learners], backbone_lr),
            ("heads", [network.head_parameters() for network in learners], optim.lr),
            ("probability", [network.probability_parameters() for network in learners], self.probability_lr),
        ]
        # Two networks may share parameters: each counts once.
        groups = [
            {"name": name, "params": list(dict.fromkeys(chain.from_iterable(parameters))), "lr": lr}
            for name, parameters, lr in parts
        ]
        return [group for group in groups if group["params"]]

    def lay_out(self) -> None:
        """Called once, when the networks are on their device and before anything refers to their storages."""

    def begin_step(self, iteration: int) -> bool:
        """Called on the host before the step of `iteration`, for events such as the end of the warm-up.

        Returns:
            Whether the operations of a step change here: a captured step must then be captured anew.
        """
        before, self.warming_up = self.warming_up, iteration < self.warmup
        return before != self.warming_up

    def losses(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """The scalars of one micro-batch: "loss", which is minimised, and its named terms."""
        raise NotImplementedError

    def forward(self, batch: Batch, step: StepIndex) -> dict[str, Tensor]:
        """`supervised_losses` in the warm-up, `losses` after it."""
        return self.supervised_losses(batch) if self.warming_up else self.losses(batch, step)

    def supervised_losses(self, batch: Batch) -> dict[str, Tensor]:
        """L_s alone, eq. (13), and zeros for the other terms."""
        _, loss = self.supervised_pass(batch)
        return self.supervised_terms(loss)

    def supervised_terms(self, loss: Tensor) -> dict[str, Tensor]:
        """All terms of a warm-up step whose L_s is `loss`."""
        zero = torch.zeros_like(loss.detach())
        return {"loss": loss, "loss_supervised": loss} | dict.fromkeys(self.unlabeled_terms, zero)

    def supervised_pass(self, batch: Batch) -> tuple[list[NetworkOutput], Tensor]:
        """The learners' outputs for the labeled images, and L_s, summed over the learners."""
        counts = start_counting(batch.label)
        with part("student"):
            image = self.normalize(batch.labeled_image)
            outputs = [network(image, representations=False) for network in self.learners()]
        with part("losses"):
            terms = [self.labeled_loss(output.logits, batch.label, counts()) for output in outputs]
            return outputs, torch.stack(terms).sum()

    def labeled_loss(self, logits: Tensor, label: Tensor, counts: PixelCounts | None) -> Tensor:
        """L_s of one network, eq. (13), from its logits [B, C, h, w] and the labels [B, H, W]."""
        return supervised_loss(logits, label, counts=counts)

    def after_step(self, step: StepIndex) -> None:
        """Called once after the optimiser's step."""

    def networks(self) -> dict[str, nn.Module]:
        """The networks to evaluate, by name; the first gives the run's mIoU."""
        return {"student": self.student}

    def diagnostics(self) -> dict[str, Any]:
        """Numbers and notes about the last batch for the log. Reads from the device."""
        return {}

    def normalize(self, image: Tensor) -> Tensor:
        """[B, 3, h, w] in [0, 1] -> the same shape, less the mean, over the standard deviation."""
        return normalize(image, self.mean, self.std)
