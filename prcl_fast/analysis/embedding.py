"""Representations, variances and predictions of drawn pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.methods import PCRConfig
from prcl_fast.data.augment import normalize
from prcl_fast.data.pixel_draws import DrawnPixels
from prcl_fast.data.source import IGNORE, Source
from prcl_fast.engine.inference import inference
from prcl_fast.errors import InputError
from prcl_fast.models.network import at_resolution

Progress = Callable[[int, int], None]
MU, FEATURES, ASPP = "mu", "features", "aspp"
# The meaning of `Embedding.kind`, stored in analysis.json.
MEANING = {
    MU: "mu of the representation head",
    FEATURES: "no representation head: the decoder's joined features, which the segmentation head reads",
    ASPP: "the ASPP's output, upsampled, of which the run's prototypes are made",
}
_STRIDE = 4  # of the decoder's maps


@dataclass(frozen=True, eq=False)
class Embedding:
    """Outputs of a network at P drawn pixels, at the decoder's resolution."""

    representation: np.ndarray  # float32 [P, D], not normalised
    variance: np.ndarray | None  # float32 [P, D], sigma^2; None without a probability head
    prediction: np.ndarray  # int64 [P]
    kind: str  # MU, FEATURES or ASPP


def label_maps(source: Source, names: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the true classes of each image twice, as the classes to draw by and as the truth: [h, w]."""
    for name in names:
        label = source.label(name)
        label = label_at_resolution(label, tuple(-(-side // _STRIDE) for side in label.shape))
        yield label, label


def prediction_maps(
    network: nn.Module,
    source: Source,
    names: Sequence[str],
    config: Config,
    device: torch.device,
    *,
    labeled: bool,
    progress: Progress,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields the predicted classes of each image and, with `labeled`, the true ones: [h, w].

    With `labeled`, predictions at unlabeled pixels are IGNORE.
    """
    with inference([network], device, config.train.amp):
        for done, name in enumerate(names, start=1):
            output = network(_pixels(source.image(name), config, device), representations=False)
            predicted = output.logits[0].argmax(dim=0).cpu().numpy()
            truth = label_at_resolution(source.label(name), predicted.shape) if labeled else None
            yield (predicted if truth is None else np.where(truth == IGNORE, IGNORE, predicted)), truth
            progress(done, len(names))


def embed(
    network: nn.Module,
    source: Source,
    names: Sequence[str],
    drawn: DrawnPixels,
    config: Config,
    device: torch.device,
    progress: Progress,
) -> Embedding:
    """Runs the network on every image with a drawn pixel, one at a time, whole and at its own size.

    Args:
        network: a `SegmentationNetwork` on `device`.
        names: the images that `drawn.image` indexes.
        drawn: at least one pixel.

    Raises:
        InputError: an image that cannot be read, or a representation that is not finite.
    """
    representations: list[Tensor] = []
    variances: list[Tensor] = []
    predictions: list[Tensor] = []
    kind = MU
    images = np.unique(drawn.image)
    with inference([network], device, config.train.amp):
        for done, index in enumerate(images, start=1):
            output = network(_pixels(source.image(names[index]), config, device))
            here = drawn.image == index
            rows, columns = (torch.from_numpy(x[here]).to(device) for x in (drawn.row, drawn.column))
            if isinstance(config.method, PCRConfig) and config.method.features == "aspp":
                kind, maps = ASPP, output.features[:, -config.model.width :]
            elif output.mu is None:
                kind, maps = FEATURES, output.features
            else:
                maps = output.mu
            representations.append(maps[0, :, rows, columns].T.float().cpu())
            if output.var is not None:
                variances.append(output.var[0, :, rows, columns].T.float().cpu())
            predictions.append(output.logits[0, :, rows, columns].argmax(dim=0).cpu())
            progress(done, len(images))
    representation = torch.cat(representations).numpy()
    if not np.isfinite(representation).all():
        raise InputError("the representations of this network are not finite")
    return Embedding(
        representation,
        torch.cat(variances).numpy() if variances else None,
        torch.cat(predictions).numpy(),
        kind,
    )


def label_at_resolution(full: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """[H, W] -> [h, w]: the value nearest to each aligned-corner position, as in training."""
    return at_resolution(torch.from_numpy(full)[None], torch.Size(size))[0].numpy()


def _pixels(image: np.ndarray, config: Config, device: torch.device) -> Tensor:
    """uint8 [H, W, 3] -> [1, 3, H, W], as the network expects it."""
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float().div_(255)
    pixels = normalize(pixels, config.data.mean, config.data.std)
    return pixels.contiguous(memory_format=torch.channels_last)
