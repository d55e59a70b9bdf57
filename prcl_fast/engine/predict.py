"""Prediction on image files: class ids, overlay and variance map, each at the size of the image."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from prcl_fast.config import Config
from prcl_fast.data.augment import normalize
from prcl_fast.data.sources.images import read_image, save_index_png, save_png
from prcl_fast.engine.inference import inference, inference_settings, segmentation_of
from prcl_fast.engine.predict_inputs import MARK, InputImage, Inputs, check_outputs
from prcl_fast.engine.rank_facts import check_same_prediction
from prcl_fast.errors import InputError, RunError, WriteError
from prcl_fast.files.writing import replacing
from prcl_fast.processes.collectives import broadcast_text, rank, summed, world_size
from prcl_fast.processes.output import locked_output
from prcl_fast.runs.checkpoint import LoadedRun

VARIANCE_COLOURS = "viridis"


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction of a network for one image."""

    label: np.ndarray  # uint8 [H, W]
    confidence: np.ndarray  # float32 [H, W], the largest class probability
    variance: np.ndarray | None  # float32 [H, W], mean of sigma^2 over D; None without probability head


@dataclass(frozen=True)
class Written:
    """The files of one image, and the range of variance in its map."""

    image: Path
    files: tuple[Path, ...]
    variance_range: tuple[float, float] | None


@dataclass(frozen=True)
class Unreadable:
    """An image without prediction, and the line that names it and the reason."""

    image: Path
    reason: str


def predict_image(network: nn.Module, image: np.ndarray, config: Config, device: torch.device) -> Prediction:
    """Segments one image, by whole image or windows according to `config.eval` (center counts as whole).

    Args:
        network: as `SegmentationNetwork`, on `device`.
        image: uint8 [H, W, 3], RGB.
    """
    settings = inference_settings(config.eval, config.data)
    with inference([network], device, config.train.amp):
        pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float().div_(255)
        pixels = normalize(pixels, config.data.mean, config.data.std)
        found = segmentation_of(network, pixels, settings)
    return Prediction(
        found.label[0].cpu().numpy(),
        found.confidence[0].cpu().numpy(),
        None if found.variance is None else found.variance[0].cpu().numpy(),
    )


def predict_files(
    run: LoadedRun,
    network: str | None,
    inputs: Inputs,
    out: str | Path,
    device: torch.device,
    *,
    raw: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Written | Unreadable]:
    """Predicts image files; yields each one when it is written, or when it turns out to be unreadable.

    For each image `NAME.png` (ids, palette), `NAME_overlay.png` (half image, half colours) and, with a
    probability head, `NAME_variance.png`: viridis from the image's smallest to its largest mean sigma^2, both
    stored in the PNG as text "variance_min" and "variance_max". `raw` adds `NAME_variance.npy`, float32.
    The outputs of the images of a folder are in the same subfolders of `out`.

    Each rank predicts some of the images.

    Args:
        network: a key of `run.networks`; None takes the first.
        progress: called with (images done, images in all) of this rank.

    Raises:
        InputError: no such network, two inputs with one output, an output that would replace an input or a
            foreign file, or one that cannot be written. Names are checked before anything is written.
        RunError: the output of the network is not finite.
    """
    name = next(iter(run.networks)) if network is None else network
    if name not in run.networks:
        raise InputError(f"network: {run.path} has no {name}, only {', '.join(run.networks)}")
    out = Path(out)
    check_same_prediction(run, name, inputs.images, out, raw=raw)
    check_outputs(inputs.images, out)
    with locked_output(out, "out"):
        yield from _predict(run, run.networks[name], inputs.images, out, device, raw=raw, progress=progress)
        broadcast_text("")  # rank 0 holds the lock until every rank has written


def _predict(
    run: LoadedRun,
    network: nn.Module,
    images: Sequence[InputImage],
    out: Path,
    device: torch.device,
    *,
    raw: bool,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Written | Unreadable]:
    images = images[rank() :: world_size()]
    if not images:
        return

    def read(image: InputImage) -> np.ndarray:
        return read_image(image.path, run.config.data.max_pixels)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, images[0])
        for done, image in enumerate(images, start=1):
            due = ahead
            if done < len(images):
                ahead = pool.submit(read, images[done])
            found: Written | Unreadable
            try:
                pixels = due.result()
            except InputError as error:
                found = Unreadable(image.path, str(error))
            else:
                prediction = predict_image(network, pixels, run.config, device)
                _check_finite(prediction, run, image)
                found = _written(out, image, pixels, prediction, run.palette, raw=raw)
            if progress is not None:
                progress(done, len(images))
            yield found


def _written(
    out: Path, image: InputImage, pixels: np.ndarray, found: Prediction, palette: np.ndarray, *, raw: bool
) -> Written | Unreadable:
    """Writes one prediction; a name that is too long with the outputs' endings is the image's own fault."""
    try:
        return write_prediction(out, image, pixels, found, palette, raw=raw)
    except WriteError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return Unreadable(image.path, f"{image.path}: its outputs cannot be written: the name is too long")


def _check_finite(prediction: Prediction, run: LoadedRun, image: InputImage) -> None:
    values = [prediction.confidence] + ([] if prediction.variance is None else [prediction.variance])
    if not all(np.isfinite(value).all() for value in values):
        raise RunError(
            f"{run.path}: the output of this network for {image.path} is not finite, as after training that "
            "diverged; take another checkpoint"
        )


def check_all_predicted(unreadable: int, inputs: Inputs, device: torch.device) -> None:
    """A collective; every rank calls it after its last image.

    Args:
        unreadable: number of images of this rank without prediction.

    Raises:
        RunError: on every rank, if any rank has such an image.
    """
    count = int(summed(torch.tensor(unreadable, device=device)))
    if count:
        raise RunError(f"{count} of {len(inputs.images)} images have no prediction; they are named above")


def write_prediction(
    out: Path,
    image: InputImage,
    pixels: np.ndarray,
    prediction: Prediction,
    palette: np.ndarray,
    *,
    raw: bool,
) -> Written:
    """Writes the files of one image, each whole or not at all, the longest names first. Raises WriteError."""
    index, overlay, variance, numbers = image.outputs(out)
    files, limits = [index, overlay], None
    if prediction.variance is not None:
        low, high = limits = float(prediction.variance.min()), float(prediction.variance.max())
        texts = MARK | {"variance_min": f"{low:.9g}", "variance_max": f"{high:.9g}"}
        save_png(variance, Image.fromarray(colour_variance(prediction.variance, low, high)), texts)
        files.append(variance)
        if raw:
            with replacing(numbers) as file:
                np.save(file, prediction.variance)
            files.append(numbers)
    blend = (pixels.astype(np.uint16) + palette[prediction.label] + 1) // 2
    save_png(overlay, Image.fromarray(blend.astype(np.uint8)), MARK)
    save_index_png(index, prediction.label, palette, MARK)
    return Written(image.path, tuple(files), limits)


def colour_variance(variance: np.ndarray, low: float, high: float) -> np.ndarray:
    """float [H, W] -> uint8 [H, W, 3]: viridis from `low` (dark blue) to `high` (yellow)."""
    from matplotlib import colormaps

    scaled = np.clip((variance - low) / (high - low if high > low else 1.0), 0, 1)
    colours: np.ndarray = colormaps[VARIANCE_COLOURS](scaled, bytes=True)[..., :3]
    return colours
