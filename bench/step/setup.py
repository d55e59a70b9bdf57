"""Networks, optimiser, schedules and settings that the alternatives to the package's training step share.

The same configuration and seed give every candidate the same initial weights.
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
from prcl_fast.data.sources import build_source
from prcl_fast.device import choose_device
from prcl_fast.errors import InputError
from prcl_fast.models.build import build_network
from prcl_fast.models.network import SegmentationNetwork

LOSSES = ("loss", "loss_supervised", "loss_unsupervised", "loss_contrast")


class Training(Protocol):
    """One candidate: a training, made step by step."""

    @property
    def student(self) -> nn.Module:
        """The network that learns."""

    def step(self) -> Mapping[str, Tensor | float]:
        """Fetches the next images and makes one optimiser step; returns the scalars named in LOSSES."""

    def close(self) -> None:
        """Ends its data workers."""


class Alternative:
    """Student, teacher, optimiser and schedules of an alternative."""

    def __init__(self, config: Config) -> None:
        self.config, self.method = config, method_of(config)
        self.device = choose_device(config.train.device)
        torch.backends.cudnn.benchmark = True
        self.source = build_source(config.data)
        self.num_classes = len(self.source.classes)
        self.student, self.teacher = build_networks(config, self.num_classes, self.device)
        self.student.train()
        self.optimizer = build_optimizer(self.student, config)
        self.iteration = 0

    def set_learning_rates(self) -> None:
        """base * (1 - iteration / total)^power."""
        remaining = max(0.0, 1 - self.iteration / self.config.train.iterations) ** self.config.optim.power
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * remaining

    def contrast_weight(self) -> float:
        """lambda_c, eq. (12) of the IJCV paper."""
        progress = self.iteration / self.config.train.iterations
        return self.method.lambda_c * math.exp(self.method.alpha * progress**2)

    def teacher_decay(self) -> float:
        """The decay of the teacher's average; the first update copies the student."""
        return min(1 - 1 / (self.iteration + 1), self.method.ema)


def method_of(config: Config) -> PRCLConfig:
    """The method's settings.

    Raises:
        InputError: a setting that a candidate does not support; the message names the key.
    """
    method = config.method
    if not isinstance(method, PRCLConfig):
        raise InputError(f"method.name: {method.name!r}; bench step compares prcl")
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
            raise InputError(f"{key}: {value}; all candidates of bench step support only {expected}")
    return method


def build_networks(
    config: Config, num_classes: int, device: torch.device
) -> tuple[SegmentationNetwork, SegmentationNetwork]:
    """Student and teacher (its copy in evaluation mode), without ops of the package."""
    torch.manual_seed(config.seed)
    network = build_network(config.model, num_classes, representation=True, probability=True)
    student = made_plain(network).to(device)
    return student, copy.deepcopy(student).requires_grad_(False).eval()


def build_optimizer(student: SegmentationNetwork, config: Config) -> torch.optim.SGD:
    """PyTorch's default SGD; each parameter group has its `base_lr`."""
    optim = config.optim
    backbone_lr = optim.lr if optim.backbone_lr is None else optim.backbone_lr
    groups = [
        {"params": list(student.backbone_parameters()), "base_lr": backbone_lr},
        {"params": list(student.head_parameters()), "base_lr": optim.lr},
        {"params": list(student.probability_parameters()), "base_lr": config.probability_lr},
    ]
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def contrast_settings(method: PRCLConfig) -> Settings:
    """The settings as `bench.ops.baselines` and `bench.ops.eager` take them."""
    return Settings(method.temperature, method.reduction, method.normalize, method.beta, method.delta_s)
