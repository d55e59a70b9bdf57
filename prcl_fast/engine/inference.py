"""Inference at image size: whole images, sliding windows, several scales, mirrored.

`evaluate` and `predict` both use these functions, so their results agree to the last digit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prcl_fast.config import DataConfig, EvalConfig
from prcl_fast.device import autocast
from prcl_fast.models.network import NetworkOutput
from prcl_fast.ops import pseudo_label


def inference_settings(settings: EvalConfig, data: DataConfig) -> EvalConfig:
    """The settings with `data.crop` in place of a null `crop` or `window`."""
    return settings.model_copy(
        update={"crop": settings.crop or data.crop, "window": settings.window or data.crop}
    )


@contextlib.contextmanager
def inference(networks: Iterable[nn.Module], device: torch.device, amp: str) -> Iterator[None]:
    """Eval mode, no gradients, no compilation, deterministic convolutions; restores all of it at the end.

    A compiled network would be compiled anew for each image size, and would round differently from the same
    network loaded from its checkpoint.

    Args:
        amp: "off", "bf16" or "fp16", as in `train.amp`.
    """
    modes = [(module, module.training) for network in networks for module in network.modules()]
    cudnn = torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    try:
        for module, _ in modes:
            module.training = False
        # The benchmark measures anew for each image size, and can choose another algorithm each time.
        cudnn.benchmark, cudnn.deterministic = False, True
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(autocast(device, amp))
            if any(module._compiled_call_impl is not None for module, _ in modes):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        for module, training in modes:
            module.training = training


class Segmentation(NamedTuple):
    """The class of every pixel, with its confidence and sigma^2."""

    label: Tensor  # uint8 [B, H, W]
    confidence: Tensor  # float32 [B, H, W], the largest class probability
    variance: Tensor | None  # float32 [B, H, W], sigma^2, its mean over D; None without probability head
    num_classes: int


def segmentation_of(network: nn.Module, image: Tensor, settings: EvalConfig) -> Segmentation:
    """The class with the highest score of `logits_of` at each pixel, and sigma^2, averaged like the scores.

    With one view of the whole image, the common case, no scores at the image's size are stored.

    Args:
        network, image, settings: as in `logits_of`.
    """
    size = (image.shape[2], image.shape[3])
    views = _views(settings)
    if settings.mode != "sliding" and len(views) == 1:
        view = _scaled(image, views[0][0]).contiguous(memory_format=torch.channels_last)
        output = network(view, representations=False)
        label, confidence = pseudo_label(output.logits, size)
        variance = _variance(network, output, size)
        return Segmentation(
            label, confidence, None if variance is None else variance[:, 0], output.logits.shape[1]
        )
    scores, variance = _averaged(network, image, settings)
    if settings.average == "softmax":
        confidence, label = scores.max(dim=1)
        label = label.to(torch.uint8)
    else:
        label, confidence = pseudo_label(scores, size)
    return Segmentation(label, confidence, variance, scores.shape[1])


def logits_of(network: nn.Module, image: Tensor, settings: EvalConfig) -> Tensor:
    """Class scores of every pixel, averaged over windows, scales and the mirror image.

    Args:
        network: as `SegmentationNetwork`; its logits may be smaller than the image.
        image: [B, 3, H, W] float32, normalised.
        settings: with `window` set where `mode` is sliding, see `inference_settings`. Mode center counts as
            whole here: `evaluate` crops image and label before.

    Returns:
        [B, C, H, W] float32: logits with `average: logits`, probabilities with `average: softmax`.
    """
    return _averaged(network, image, settings)[0]


def _averaged(network: nn.Module, image: Tensor, settings: EvalConfig) -> tuple[Tensor, Tensor | None]:
    """The scores of `logits_of`, and sigma^2 [B, H, W] or None, averaged over the same views and windows."""

    def maps(view: Tensor, size: tuple[int, int]) -> Tensor:
        output = network(view, representations=False)
        scores = _upsample(output.logits, size)
        if settings.average == "softmax":
            scores = scores.softmax(dim=1)
        variance = _variance(network, output, size)
        return scores if variance is None else torch.cat([scores, variance], dim=1)

    size = (image.shape[2], image.shape[3])
    views = _views(settings)
    total: Tensor | None = None
    for scale, flip in views:
        view = _scaled(image, scale)
        if flip:
            view = view.flip(3)
        result = _dense(maps, view, size, settings)
        if flip:
            result = result.flip(3)
        total = result if total is None else total + result
    assert total is not None
    averaged = total / len(views)
    if not has_variance(network):
        return averaged, None
    return averaged[:, :-1], averaged[:, -1]


def has_variance(network: nn.Module) -> bool:
    """Whether the network has a probability head."""
    return getattr(network, "probability", None) is not None


def _variance(network: nn.Module, output: NetworkOutput, size: tuple[int, int]) -> Tensor | None:
    """sigma^2 of every pixel, its mean over D, [B, 1, *size], from the features in `output`."""
    if not has_variance(network):
        return None
    # A pass with representations would also compute their means, which are not needed.
    var: Tensor = network.probability(output.features)  # type: ignore[operator]
    return _upsample(var.float().mean(dim=1, keepdim=True), size)


def window_starts(size: int, window: int, stride: float) -> list[int]:
    """First pixels of the windows along one axis; they cover it, the last one is shifted inside.

    Args:
        stride: distance of neighbours as a fraction of the window.
    """
    if size <= window:
        return [0]
    step = max(1, math.ceil(window * stride))
    return [min(step * i, size - window) for i in range(math.ceil((size - window) / step) + 1)]


def _views(settings: EvalConfig) -> list[tuple[float, bool]]:
    """(scale, whether mirrored) of each view of an image."""
    flips = [False, True] if settings.flip else [False]
    return [(scale, flip) for scale in settings.scales for flip in flips]


def _scaled(image: Tensor, scale: float) -> Tensor:
    if scale != 1.0:
        height, width = image.shape[2:]
        image = _upsample(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    return image


def _dense(
    score: Callable[[Tensor, tuple[int, int]], Tensor],
    view: Tensor,
    size: tuple[int, int],
    settings: EvalConfig,
) -> Tensor:
    """score(view [b, 3, h, w], size) -> [b, K, *size], over whole views or their windows: [B, K, *size]."""
    view = view.contiguous(memory_format=torch.channels_last)
    if settings.mode != "sliding":
        return score(view, size)
    averaged = _sliding(score, view, settings)
    return averaged if averaged.shape[2:] == size else _upsample(averaged, size)


def _sliding(
    score: Callable[[Tensor, tuple[int, int]], Tensor], view: Tensor, settings: EvalConfig
) -> Tensor:
    assert settings.window is not None
    high, wide = settings.window
    height, width = view.shape[2:]
    if height < high or width < wide:
        # After normalisation the mean colour is 0.
        view = F.pad(view, (0, max(0, wide - width), 0, max(0, high - height)))
    places = [
        (b, y, x)
        for b in range(view.shape[0])
        for y in window_starts(view.shape[2], high, settings.stride)
        for x in window_starts(view.shape[3], wide, settings.stride)
    ]
    total: Tensor | None = None
    count = torch.zeros(view.shape[2:], device=view.device)
    for first in range(0, len(places), settings.batch):
        some = places[first : first + settings.batch]
        windows = torch.stack([view[b, :, y : y + high, x : x + wide] for b, y, x in some])
        maps = score(windows.contiguous(memory_format=torch.channels_last), (high, wide))
        if total is None:
            total = maps.new_zeros(view.shape[0], maps.shape[1], *view.shape[2:])
        for (b, y, x), part in zip(some, maps, strict=True):
            total[b, :, y : y + high, x : x + wide] += part
            if b == 0:
                count[y : y + high, x : x + wide] += 1
    assert total is not None
    return total.div_(count)[:, :, :height, :width]


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned, in float32; under autocast, a network's maps have half precision."""
    maps = maps.float()
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)
