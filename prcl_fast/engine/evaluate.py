"""Evaluation on a split: confusion matrix, IoU, and sigma^2 as a detector of errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from rich.table import Column, Table
from torch import Tensor, nn

from prcl_fast.config import DataConfig, EvalConfig
from prcl_fast.data.augment import normalize
from prcl_fast.data.source import IGNORE, Source
from prcl_fast.engine.inference import has_variance, inference, inference_settings, segmentation_of
from prcl_fast.engine.uncertainty import BINS, ErrorDetector, Uncertainty, histogram_by_error
from prcl_fast.errors import InputError, RunError
from prcl_fast.processes.collectives import rank, summed, world_size

# Images of equal size share a batch if they lie in one run of this many batches. Ranks take such runs in
# turn, so that every batch, and each rounding in it, is the same for every number of ranks.
_BATCHES_IN_RUN = 4


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Exact pixel counts of one network.

    A class that occurs neither in the truth nor in the prediction has no IoU (nan) and does not count in the
    mean. A class that is only predicted has IoU 0 and does count. Pixels without label are not counted.
    """

    confusion: np.ndarray  # int64 [C, C], row truth, column prediction
    uncertainty: Uncertainty | None = None  # of the same pixels; None without probability head

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union per class, 0 to 1: float64 [C], nan where undefined."""
        intersection = np.diag(self.confusion).astype(np.float64)
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - np.diag(self.confusion)
        return np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)

    @property
    def miou(self) -> float:
        """Mean IoU in percent over the classes that have one; nan where no pixel has a label."""
        iou = self.iou
        present = iou[~np.isnan(iou)]
        return 100 * float(present.mean()) if present.size else float("nan")

    def iou_by_class(self, classes: Sequence[str]) -> dict[str, float | None]:
        """IoU in percent by class name, None where undefined: ready for JSON."""
        return {
            name: None if np.isnan(iou) else 100 * float(iou)
            for name, iou in zip(classes, self.iou, strict=True)
        }


def evaluate(
    networks: Mapping[str, nn.Module],
    source: Source,
    data: DataConfig,
    settings: EvalConfig,
    device: torch.device,
    *,
    subset: str = "val",
    amp: str = "off",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Evaluates several networks on the same decoded images.

    Modes: `whole` takes every image at its own size; `center` cuts the centre of image and label to
    `settings.crop` (a smaller side stays as it is); `sliding` averages over windows of `settings.window`
    that cover the image, the last ones shifted inside. Logits are upsampled bilinearly with aligned corners
    to the evaluated size before the argmax. Images of equal size share a batch, in an order that depends only
    on the split.

    A collective: every rank must call it. Each rank evaluates some of the images, every image counts once,
    and all ranks get the sums. The same networks and settings give the same counts during training, after it,
    and on any number of ranks.

    Args:
        networks: name -> network as `SegmentationNetwork`, on `device`; their training modes are restored.
        subset: a key of `source.splits`.
        amp: "off", "bf16" or "fp16": autocast, as in `train.amp`.
        progress: called with (images done, images in all) of this rank.

    Raises:
        InputError: an empty subset, a label that does not fit its image, a network of other classes than
            the data, or a file that the source cannot read.
        RunError: on every rank: the output of a network is not finite.
    """
    if not source.splits[subset].names:
        raise InputError(f"data.{subset}: no image to evaluate on")
    settings = inference_settings(settings, data)
    runs = _runs(source.splits[subset].names, _BATCHES_IN_RUN * settings.batch)[rank() :: world_size()]
    classes = len(source.classes)
    counts = {name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in networks}
    histograms = {
        name: torch.zeros(2, 2, BINS, dtype=torch.int64, device=device)
        for name, network in networks.items()
        if has_variance(network)
    }
    unknown = {name: torch.zeros((), dtype=torch.int64, device=device) for name in networks}
    done = 0
    with inference(networks.values(), device, amp):
        for images, labels in _equal_batches(source, runs, settings, data.workers):
            pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255)
            pixels = normalize(pixels, data.mean, data.std)
            truth = torch.from_numpy(labels).to(device)
            for name, network in networks.items():
                found = segmentation_of(network, pixels, settings)
                if found.num_classes != classes:
                    raise InputError(
                        f"network {name}: it has {found.num_classes} classes, the data have {classes}"
                    )
                counts[name] += _confusion(truth, found.label, classes)
                unknown[name] += found.confidence.isfinite().logical_not().sum()
                if found.variance is not None:
                    for sums, values in zip(
                        histograms[name], (found.variance, 1 - found.confidence), strict=True
                    ):
                        sums += histogram_by_error(truth, found.label, values)
            done += len(images)
            if progress is not None:
                progress(done, sum(map(len, runs)))
    total = summed(torch.stack(list(counts.values()))).cpu().numpy()
    _check_finite(dict(zip(unknown, summed(torch.stack(list(unknown.values()))).tolist(), strict=True)))
    uncertainty = {
        name: Uncertainty(*map(ErrorDetector, summed(found).cpu().numpy()))
        for name, found in histograms.items()
    }
    return {name: Evaluation(count, uncertainty.get(name)) for name, count in zip(counts, total, strict=True)}


def format_table(results: Mapping[str, Evaluation], classes: Sequence[str]) -> Table:
    """A table of IoU in percent: a row per class with its percentage of the pixels, a column per network."""
    first = next(iter(results.values())).confusion
    pixels = 100 * first.sum(axis=1) / max(1, first.sum())
    table = Table("class", *_right("pixels %"), *_right(*(f"{name} IoU %" for name in results)))
    columns = [100 * result.iou for result in results.values()]
    for index, name in enumerate(classes):
        values = (column[index] for column in columns)
        cells = ("-" if np.isnan(value) else f"{value:.2f}" for value in values)
        table.add_row(name, f"{pixels[index]:.2f}", *cells, end_section=index == len(classes) - 1)
    table.add_row("mean", "", *(f"{result.miou:.2f}" for result in results.values()), style="bold")
    return table


def _check_finite(unknown: Mapping[str, int]) -> None:
    """Raises RunError for a network with pixels whose output is not finite: they have no class."""
    for name, pixels in unknown.items():
        if pixels:
            raise RunError(
                f"network {name}: its output is not finite at {pixels} pixels, as after a training that "
                "diverged"
            )


def _confusion(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """int64 [C, C] from [B, H, W] each, ignored pixels left out."""
    # Ignored pixels get a bin of their own: a boolean index would cost one more synchronisation.
    cell = torch.where(truth == IGNORE, classes * classes, truth.long() * classes + prediction)
    counts = torch.bincount(cell.flatten(), minlength=classes * classes + 1)
    return counts[:-1].view(classes, classes)


def _runs(names: Sequence[str], length: int) -> list[Sequence[str]]:
    return [names[first : first + length] for first in range(0, len(names), length)]


def _equal_batches(
    source: Source, runs: Sequence[Sequence[str]], settings: EvalConfig, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """uint8 [b, h, w, 3] and [b, h, w] of one size and one run, b <= settings.batch."""
    decoded = _decoded(source, [name for run in runs for name in run], settings, workers)
    for run in runs:
        groups: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
        for image, label in islice(decoded, len(run)):
            group = groups.setdefault(label.shape, [])
            group.append((image, label))
            if len(group) == settings.batch:
                yield _stack(groups.pop(label.shape))
        for members in groups.values():
            yield _stack(members)


def _stack(members: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([image for image, _ in members]), np.stack([label for _, label in members])


def _decoded(
    source: Source, names: Sequence[str], settings: EvalConfig, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image and label of every name in order, decoded ahead by threads; the decoders release the GIL."""

    def load(name: str) -> tuple[np.ndarray, np.ndarray]:
        image, label = source.image(name), source.label(name)
        if image.shape[:2] != label.shape:
            raise InputError(
                f"{name}: the label is {label.shape[0]} x {label.shape[1]} pixels, "
                f"the image {image.shape[0]} x {image.shape[1]}"
            )
        if settings.mode == "center":
            image, label = _center(image, settings.crop), _center(label, settings.crop)
        return image, label

    if workers == 0:
        yield from map(load, names)
        return
    pool = ThreadPoolExecutor(workers)
    ahead: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    try:
        for name in names:
            ahead.append(pool.submit(load, name))
            if len(ahead) > 2 * workers + settings.batch:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _center(array: np.ndarray, crop: Sequence[int] | None) -> np.ndarray:
    """The centre of [H, W, ...], each side at most that of `crop`."""
    assert crop is not None
    top, left = (max(0, (side - wanted) // 2) for side, wanted in zip(array.shape, crop, strict=False))
    return array[top : top + crop[0], left : left + crop[1]]


def _right(*headers: str) -> list[Column]:
    return [Column(header, justify="right") for header in headers]
