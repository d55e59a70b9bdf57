"""What the alternatives to the package's training step share: networks, optimiser, schedules and settings.

All of it comes from the same configuration, and the same seed gives every candidate the same initial weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.ops.baselines import Settings
from bench.step.plain_network import made_plain
from prcl_fast.config import Config
from prcl_fast.config.methods import PRCLConfig
from prcl_fast.errors import InputError
from prcl_fast.models.build import build_network
from prcl_fast.models.network import SegmentationNetwork

LOSSES = ("loss", "loss_supervised", "loss_unsupervised", "loss_contrast")


class Training(Protocol):
    """One candidate: a training that goes on step by step."""

    @property
    def student(self) -> nn.Module:
        """The network that learns."""

    def step(self) -> Mapping[str, Tensor | float]:
        """Fetches the next images and makes one optimiser step; the scalars named in LOSSES."""

    def close(self) -> None:
        """Ends its data workers."""


def method_of(config: Config) -> PRCLConfig:
    """The method's settings.

    Raises:
        InputError: a setting that not all candidates know; the message names the key.
    """
    method = config.method
    if not isinstance(method, PRCLConfig):
        raise InputError(f"method.name: {method.name!r}; bench.step compares prcl")
    for key, value, known in (
        ("method.representation", method.representation, ("probabilistic",)),
        ("method.mix", method.mix, ("classmix",)),
        ("method.omega", method.omega, ("batch",)),
        ("method.confidence", method.confidence, ("student",)),
        ("method.prototype", method.prototype, ("local",)),
        ("train.accumulate", config.train.accumulate, (1,)),
        ("train.amp", config.train.amp, ("off", "bf16")),
    ):
        if value not in known:
            expected = " or ".join(map(str, known))
            raise InputError(f"{key}: {value}; bench.step compares {expected}, which all candidates know")
    return method


def build_networks(
    config: Config, num_classes: int, device: torch.device
) -> tuple[SegmentationNetwork, SegmentationNetwork]:
    """Student and teacher, which is its copy in evaluation mode, without an operation of the package's."""
    torch.manual_seed(config.seed)
    network = build_network(config.model, num_classes, representation=True, probability=True)
    student = made_plain(network).to(device)
    return student, copy.deepcopy(student).requires_grad_(False).eval()


def build_optimizer(student: SegmentationNetwork, config: Config) -> torch.optim.SGD:
    """SGD as PyTorch has it by default; each group remembers its `base_lr`."""
    optim = config.optim
    backbone_lr = optim.lr if optim.backbone_lr is None else optim.backbone_lr
    groups = [
        {"params": list(student.backbone_parameters()), "base_lr": backbone_lr},
        {"params": list(student.head_parameters()), "base_lr": optim.lr},
        {"params": list(student.probability_parameters()), "base_lr": config.probability_lr},
    ]
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def set_learning_rates(optimizer: torch.optim.SGD, config: Config, iteration: int) -> None:
    """base * (1 - iteration / total)^power."""
    share = max(0.0, 1 - iteration / config.train.iterations) ** config.optim.power
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share


def contrast_weight(method: PRCLConfig, iteration: int, total: int) -> float:
    """lambda_c, eq. (12) of the IJCV paper."""
    return method.lambda_c * math.exp(method.alpha * (iteration / total) ** 2)


def teacher_decay(method: PRCLConfig, iteration: int) -> float:
    """The first update copies the student."""
    return min(1 - 1 / (iteration + 1), method.ema)


def contrast_settings(method: PRCLConfig) -> Settings:
    """Those of the contrast in `bench.ops.baselines` and `bench.ops.eager`."""
    return Settings(method.temperature, method.reduction, method.normalize, method.beta, method.delta_s)
