"""Memory format of gradients: that of the tensor to which they belong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import Node

from prcl_fast.config import parse_config
from prcl_fast.device import autocast
from prcl_fast.engine.trainer import Trainer
from prcl_fast.methods import StepIndex
from prcl_fast.models.conv3x3 import Conv3x3
from support.tiny import tiny_tree

SURE = {"delta_u": 0.2, "delta_w": 0.0, "delta_s": 1.0}


def nodes(loss: Tensor) -> Iterator[Node]:
    """All operations that led to the loss."""
    assert loss.grad_fn is not None
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


# Operations on maps [B, C, h, w]; all others work on rows of pixels, with other dimensions.
OF_MAPS = (
    *(
        "Convolution",
        "NativeBatchNorm",
        "Relu",
        "Hardtanh",
        "MaxPool2D",
        "AvgPool2D",
        "Upsample",
        "Add",
        "Split",
        "Cat",
    ),
    "GeneratedBackwardFor_prcl_fast",
)


def is_channels_last(x: Tensor) -> bool:
    """Whether x has dense rows of pixels, or channels of such rows, as in gradients of concatenated maps."""
    _, channels, height, width = x.shape
    pixel = x.stride(3) if width > 1 else x.stride(2) if height > 1 else channels
    strides = zip(x.shape[1:], x.stride()[1:], (1, width * pixel, pixel), strict=True)
    return pixel >= channels and all(size == 1 or got == want for size, got, want in strides)


def strange_gradients(loss: Tensor) -> list[str]:
    """The operations on maps with a gradient that is not channels_last, as input or output."""
    found, seen = [], set()

    def look(name: str, side: str, gradients: tuple[Tensor | None, ...]) -> None:
        for gradient in gradients:
            if gradient is None or gradient.dim() != 4:
                continue
            seen.add(name)
            if not is_channels_last(gradient):
                found.append(f"{name} {side} {list(gradient.shape)} with strides {gradient.stride()}")

    def watch(node: Node) -> None:
        name = node.name()

        def hook(given: tuple[Tensor | None, ...], taken: tuple[Tensor | None, ...]) -> None:
            look(name, "takes", taken)
            look(name, "gives", given)

        if name.startswith(OF_MAPS):
            node.register_hook(hook)

    for node in nodes(loss):
        watch(node)
    loss.backward()
    assert {"ConvolutionBackward0", "NativeBatchNormBackward0"} <= seen
    return found


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param({"name": "supervised"}, id="supervised"),
        pytest.param({"name": "mean_teacher", "delta_u": 0.2}, id="mean_teacher"),
        pytest.param(SURE, id="prcl"),
        pytest.param(SURE | {"forward": "separate"}, id="prcl separate"),
        pytest.param(
            SURE | {"representation": "deterministic", "virtual_negatives": 0}, id="prcl deterministic"
        ),
        pytest.param({"name": "pcr", "warmup": 1, "delta_u": 0.2}, id="pcr"),
        pytest.param({"name": "cps", "mix": "cutmix"}, id="cps cutmix"),
        pytest.param({"name": "cps", "mix": "none"}, id="cps"),
        pytest.param({"name": "pps", "prototypes": 2, "layers": 1, "heads": 2, "mix": "cutmix"}, id="pps"),
        pytest.param({"name": "pps", "prototypes": 2, "layers": 1, "heads": 2, "mix": "none"}, id="pps none"),
    ],
)
def test_no_gradient_of_a_step_leaves_channels_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], amp: str, backbone: str
) -> None:
    # As on a GPU: the second way of these convolutions works on rows of pixels.
    monkeypatch.setattr(Conv3x3, "forward", nn.Conv2d.forward)
    tree = tiny_tree(tmp_path, **method)
    tree["train"] |= {"amp": amp}
    tree["model"] |= {"backbone": backbone}
    trainer = Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    learner, warmup = trainer.method, method.get("warmup", 0)
    with contextlib.closing(trainer.batches()) as batches:
        for number in range(warmup + 1):
            learner.begin_step(number)
            step = StepIndex(torch.tensor(number), trainer.config.train.iterations)
            with autocast(trainer.device, amp):
                losses = learner(next(batches), step)
    assert all(float(term.detach()) != 0 for term in losses.values())  # every term has a gradient
    assert strange_gradients(losses["loss"]) == []
