"""Prediction on image files: class ids, overlay and variance map, each at the image's own size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from prcl_fast.config import Config
from prcl_fast.data.augment import normalize
from prcl_fast.data.sources.images import IMAGE_SUFFIXES, read_image, save_index_png
from prcl_fast.engine.inference import inference, inference_settings, segmentation_of
from prcl_fast.errors import InputError
from prcl_fast.files.writing import make_folder, replacing
from prcl_fast.processes.collectives import rank, world_size
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
    inputs: Sequence[str | Path],
    out: str | Path,
    device: torch.device,
    *,
    raw: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Written]:
    """Predicts image files and the image files directly inside folders; yields each one when it is written.

    For each image `NAME.png` (ids, palette), `NAME_overlay.png` (half image, half colours) and, with a
    probability head, `NAME_variance.png`: viridis from the image's smallest to its largest mean sigma^2, both
    stored in the PNG as text "variance_min" and "variance_max". `raw` adds `NAME_variance.npy`, float32.

    Each rank predicts some of the images.

    Args:
        network: a key of `run.networks`; None takes the first.
        progress: called with (images done, images in all) of this rank.

    Raises:
        InputError: no such network or file, an unreadable image, two inputs of one name, an output that would
            replace an input, or one that cannot be written. Names are checked before anything is written.
    """
    name = next(iter(run.networks)) if network is None else network
    if name not in run.networks:
        raise InputError(f"network: {run.path} has no {name}, only {', '.join(run.networks)}")
    images, out = find_images(inputs), Path(out)
    _check_outputs(images, out)
    images = images[rank() :: world_size()]
    if not images:
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read_image, images[0])
        for done, path in enumerate(images, start=1):
            image = ahead.result()
            if done < len(images):
                ahead = pool.submit(read_image, images[done])
            prediction = predict_image(run.networks[name], image, run.config, device)
            written = write_prediction(out, path, image, prediction, run.palette, raw=raw)
            if progress is not None:
                progress(done, len(images))
            yield written


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """The files themselves, and the image files directly inside folders in order of their names.

    Raises:
        InputError: an input that does not exist, a folder without images, or no input at all.
    """
    images: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            try:
                files = sorted(path.iterdir())
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
            inside = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
            if not inside:
                raise InputError(f"{path}: no image in this folder (its subfolders are not searched)")
            images += inside
        elif path.exists():
            images.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    if not images:
        raise InputError("images: none given")
    return images


def write_prediction(
    out: Path, path: Path, image: np.ndarray, prediction: Prediction, palette: np.ndarray, *, raw: bool
) -> Written:
    """Writes the files of one image, each whole or not at all. Raises WriteError."""
    index, overlay, variance, numbers = _outputs(out, path)
    save_index_png(index, prediction.label, palette)
    blend = (image.astype(np.uint16) + palette[prediction.label] + 1) // 2
    _save_png(overlay, blend.astype(np.uint8), {})
    if prediction.variance is None:
        return Written(path, (index, overlay), None)
    low, high = float(prediction.variance.min()), float(prediction.variance.max())
    texts = {"variance_min": f"{low:.9g}", "variance_max": f"{high:.9g}"}
    _save_png(variance, colour_variance(prediction.variance, low, high), texts)
    if not raw:
        return Written(path, (index, overlay, variance), (low, high))
    with replacing(numbers) as file:
        np.save(file, prediction.variance)
    return Written(path, (index, overlay, variance, numbers), (low, high))


def colour_variance(variance: np.ndarray, low: float, high: float) -> np.ndarray:
    """float [H, W] -> uint8 [H, W, 3]: viridis from `low` (dark blue) to `high` (yellow)."""
    scaled = np.clip((variance - low) / (high - low if high > low else 1.0), 0, 1)
    colours: np.ndarray = colormaps[VARIANCE_COLOURS](scaled, bytes=True)[..., :3]
    return colours


def _outputs(out: Path, image: Path) -> tuple[Path, Path, Path, Path]:
    endings = (".png", "_overlay.png", "_variance.png", "_variance.npy")
    index, overlay, variance, numbers = (out / f"{image.stem}{ending}" for ending in endings)
    return index, overlay, variance, numbers


def _check_outputs(images: Sequence[Path], out: Path) -> None:
    """Raises InputError where a file would be written twice or over an input, or `out` cannot be a folder."""
    inputs = {path.resolve() for path in images}
    owner: dict[Path, Path] = {}
    for path in images:
        for output in _outputs(out, path):
            if output in owner:
                raise InputError(
                    f"{path}: {output.name} would be written for {owner[output]} too; rename one"
                )
            if output.resolve() in inputs:
                raise InputError(f"{path}: its output {output} would replace an input; choose another --out")
            owner[output] = path
    make_folder(out, "out")


def _save_png(path: Path, pixels: np.ndarray, texts: dict[str, str]) -> None:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
