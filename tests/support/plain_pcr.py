"""PCR's equations written down plainly, and a method of one-layer networks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prcl_fast.config import parse_config
from prcl_fast.losses import FeatureBank, PrototypePredictor
from prcl_fast.methods import PCR, StepIndex, build_method
from prcl_fast.models.teacher import EMATeacher
from support.stub_networks import PixelNetwork
from support.tiny import tiny_tree

C, K, D, T = 3, 2, 4, 0.2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predictor(known: tuple[bool, ...] = (True, True, True), decay: float = 0.99) -> PrototypePredictor:
    made = PrototypePredictor(C, K, D, temperature=T, decay=decay)
    made.initialize(draw(C, K, D, seed=9) * torch.tensor(known)[:, None, None], torch.tensor(known))
    return made


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def plain_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, C, h, w]: the largest cosine with one of the class's prototypes, over T."""
    batch, _, height, width = features.shape
    rows = [
        max(cosine(features[b, :, y, x], p) for p in prototypes[c]) / T
        for b, c, y, x in product(range(batch), range(C), range(height), range(width))
    ]
    return torch.stack(rows).view(batch, C, height, width)


def plain_update(
    prototypes: Tensor, features: Tensor, label: Tensor, valid: Tensor, known: tuple[bool, ...]
) -> tuple[Tensor, set[tuple[int, int]]]:
    """The prototypes after the update, and which of them have pixels."""
    pixels: dict[tuple[int, int], list[Tensor]] = {}
    for b, y, x in product(*map(range, label.shape)):
        c, feature = int(label[b, y, x]), features[b, :, y, x].double()
        if valid[b, y, x] and c < C and known[c]:
            nearest = max(range(K), key=lambda k: float(cosine(feature, prototypes[c, k].double())))
            pixels.setdefault((c, nearest), []).append(feature)
    updated = prototypes.double().clone()
    for key, members in pixels.items():
        updated[key] = 0.99 * updated[key] + 0.01 * torch.stack(members).mean(0)
    return updated, set(pixels)


def with_stub(**settings: Any) -> PCR:
    torch.manual_seed(0)
    tree = tiny_tree(Path("unused"), **{"name": "pcr", "prototypes": K, "warmup": 2, **settings})
    method = build_method(parse_config(tree, "tiny"), C)
    assert isinstance(method, PCR)
    torch.manual_seed(3)
    method.student = PixelNetwork(C, D)  # type: ignore[assignment]
    method.teacher = EMATeacher(method.student)
    method.predictor = predictor()
    method.predictor.temperature = T
    method.samples = FeatureBank(C, D, size=32, rows=8)
    return method


def step(iteration: int) -> StepIndex:
    return StepIndex(torch.tensor(iteration), 6)
