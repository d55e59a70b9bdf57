"""What the trainer asks of a method, and what every method with one student shares."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.methods import UnlabeledConfig
from prcl_fast.data.augment import normalize
from prcl_fast.data.batches import Batch
from prcl_fast.losses import PixelCounts, start_counting, supervised_loss
from prcl_fast.models.network import NetworkOutput, SegmentationNetwork, build_network
from prcl_fast.step_parts import part


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

    Attributes:
        warmup: number of supervised iterations at the start.
        warming_up: whether the step begun is one of them.
    """

    needs_unlabeled = False
    # The losses that a step of the warm-up has not: logged as zeros, so that all steps have the same terms.
    unlabeled_terms: tuple[str, ...] = ()

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.optim = config.optim
        self.probability_lr = config.probability_lr
        self.mean, self.std = config.data.mean, config.data.std
        self.num_classes = num_classes
        self.warmup = config.method.warmup if isinstance(config.method, UnlabeledConfig) else 0
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
        # What two networks share is one parameter.
        groups = [
            {"name": name, "params": list(dict.fromkeys(chain.from_iterable(parameters))), "lr": lr}
            for name, parameters, lr in parts
        ]
        return [group for group in groups if group["params"]]

    def lay_out(self) -> None:
        """Called once the networks are on their device, before anything relies on where their tensors lie."""

    def begin_step(self, iteration: int) -> bool:
        """Called by the host before the step of `iteration`, for what happens once in a run.

        Returns:
            Whether steps consist of other operations from here on: a captured step is then captured anew.
        """
        before, self.warming_up = self.warming_up, iteration < self.warmup
        return before != self.warming_up

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The scalars of one micro-batch: "loss" is what is minimised, the others are its named terms."""
        raise NotImplementedError

    def forward(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """`supervised_losses` in the warm-up, `losses` after it."""
        return self.supervised_losses(batch) if self.warming_up else self.losses(batch, step)

    def supervised_losses(self, batch: Batch) -> dict[str, Tensor]:
        """L_s alone, eq. (13), and zeros for the other terms."""
        _, loss = self.supervised_pass(batch)
        return self.supervised_terms(loss)

    def supervised_terms(self, loss: Tensor) -> dict[str, Tensor]:
        """The terms of a step of the warm-up whose L_s is `loss`."""
        zero = torch.zeros_like(loss.detach())
        return {"loss": loss, "loss_supervised": loss} | dict.fromkeys(self.unlabeled_terms, zero)

    def supervised_pass(self, batch: Batch) -> tuple[list[NetworkOutput], Tensor]:
        """What the learners say of the labeled images, and L_s, summed over the learners."""
        counts = start_counting(batch.label)
        with part("student"):
            image = self.normalize(batch.labeled_image)
            outputs = [network(image, representations=False) for network in self.learners()]
        with part("losses"):
            terms = [self.labeled_loss(output.logits, batch.label, counts()) for output in outputs]
            return outputs, torch.stack(terms).sum()

    def labeled_loss(self, logits: Tensor, label: Tensor, counts: PixelCounts | None) -> Tensor:
        """L_s of one network, eq. (13), of its logits [B, C, h, w] and the labels [B, H, W]."""
        return supervised_loss(logits, label, counts=counts)

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
