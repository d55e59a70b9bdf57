"""The first prototypes of PCR, from a network trained on the labeled images alone.

Source: Algorithm 2 of Xu et al., "Semi-supervised Semantic Segmentation with Prototype-based Consistency
Regularization" (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.config import Config
from prcl_fast.config.files import plain_path
from prcl_fast.config.methods import PCRConfig, SupervisedConfig
from prcl_fast.data.augment import normalize
from prcl_fast.data.pixel_draws import DrawnPixels, draw_pixels
from prcl_fast.data.source import Source
from prcl_fast.data.sources.splits import read_split
from prcl_fast.engine.inference import inference
from prcl_fast.errors import InputError, naming
from prcl_fast.methods import PCR, Method
from prcl_fast.methods.pcr import SAMPLES, prototype_features
from prcl_fast.processes.collectives import rank, summed, world_size
from prcl_fast.runs.checkpoint import LoadedRun, load_run
from prcl_fast.runs.trained_network import other_architecture

_KEY = "method.prototypes_from"
# The keys of `model` that determine a network's features.
_ARCHITECTURE = ("backbone", "stem", "output_stride", "base_width", "width")


def trained_network(config: Config, classes: Sequence[str], device: torch.device) -> LoadedRun | None:
    """The run of Algorithm 2, step 1, that `method.prototypes_from` names; None where none is needed.

    None is needed by another method, and without the key. For a run folder, last.pt is used; it must be of
    the last iteration.

    Raises:
        InputError: the run or checkpoint is missing, damaged or unfinished, or has another method than
            supervised, other classes, another architecture or other labeled images.
    """
    method = config.method
    if not isinstance(method, PCRConfig) or method.prototypes_from is None:
        return None
    path = method.prototypes_from
    folder = path.is_dir()
    with naming(_KEY):
        run = load_run(path / "last.pt" if folder else path, device)
    its = run.config
    where = f"{_KEY}: {run.path}"
    if not isinstance(its.method, SupervisedConfig):
        raise InputError(
            f"{where}: trained by method {its.method.name}; prototypes come from one of method supervised"
        )
    if folder and run.iteration < its.train.iterations:
        raise InputError(
            f"{where}: is at iteration {run.iteration} of {its.train.iterations}; let it end first, or name "
            "the checkpoint file"
        )
    if run.classes != tuple(classes):
        raise InputError(
            f"{where}: trained on other classes ({', '.join(run.classes)}) than the data have "
            f"({', '.join(classes)})"
        )
    other = other_architecture(its.model, config.model, _ARCHITECTURE)
    if other is not None:
        raise InputError(f"{where}: {other}")
    if _other_labels(its, config):
        raise InputError(
            f"{where}: trained on the labels of {its.data.labeled}, other images than those of data.labeled "
            f"{config.data.labeled}"
        )
    return run


def initialize_prototypes(
    method: Method,
    run: LoadedRun,
    source: Source,
    config: Config,
    device: torch.device,
    *,
    say: Callable[[str], None],
    alive: Callable[[str], None],
) -> None:
    """Algorithm 2, steps 2 and 3: K-means over features of labeled pixels as `run`'s network has them.

    The paper interpolates the features to the image's size and samples "a certain amount" of pixels of each
    class. Here up to `SAMPLES` pixels a class are drawn first, from all labeled images at their own size, and
    the features are interpolated at these pixels only. This gives the same features in [C, SAMPLES, D]
    numbers, whatever the number and size of the images. A collective: every rank must call it, and each
    reads some of the images.

    Args:
        method: a PCR, whose prototypes are set.
        say: takes a line about the origin of the prototypes.
        alive: takes a text after every image.

    Raises:
        InputError: an image or label that cannot be read, or features that are not finite.
    """
    assert isinstance(method, PCR)
    network = next(iter(run.networks.values()))
    names = source.splits["labeled"].names
    drawn = draw_pixels(((source.label(name), None) for name in names), SAMPLES, config.seed)
    # The number of each pixel among those of its class.
    slot = np.zeros(len(drawn.group), dtype=np.int64)
    for name in np.unique(drawn.group):
        own = drawn.group == name
        slot[own] = np.arange(own.sum())
    classes, _, dim = method.predictor.prototypes.shape
    features = torch.zeros(classes, SAMPLES, dim, device=device)
    images = np.unique(drawn.image)[rank() :: world_size()]
    with inference([network], device, config.train.amp):
        for done, index in enumerate(images, start=1):
            here = drawn.image == index
            found = _features_at(network, method, source.image(names[index]), drawn, here, config, device)
            group, place = (torch.from_numpy(x[here]).to(device) for x in (drawn.group, slot))
            features[group, place] = found
            alive(f"making prototypes, image {done} of {len(images)}")
    features = summed(features)
    if not features.isfinite().all():
        raise InputError(f"{_KEY}: {run.path}: the features of this network are not finite")
    count = torch.from_numpy(np.bincount(drawn.group, minlength=classes)).to(device)
    method.make_prototypes(features, count)
    say(
        f"prototypes: K-means over the features of {len(drawn.group)} labeled pixels, of {run.path}, "
        f"iteration {run.iteration}"
    )


def _features_at(
    network: nn.Module,
    method: PCR,
    image: np.ndarray,
    drawn: DrawnPixels,
    here: np.ndarray,
    config: Config,
    device: torch.device,
) -> Tensor:
    """[n, D]: the features of image uint8 [H, W, 3] at the n pixels `here`, bilinear with corners aligned."""
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float().div_(255)
    pixels = normalize(pixels, config.data.mean, config.data.std)
    output = network(pixels.contiguous(memory_format=torch.channels_last), representations=False)
    maps = prototype_features(output, method.predictor).float()
    # -1 and 1 are the centres of the outermost pixels.
    places = [
        2 * position[here] / max(1, side - 1) - 1
        for position, side in ((drawn.column, image.shape[1]), (drawn.row, image.shape[0]))
    ]
    grid = torch.from_numpy(np.stack(places, axis=-1)).to(device, maps.dtype)[None, None]
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled[0, :, 0].T


def _other_labels(theirs: Config, own: Config) -> bool:
    """Whether both lists of labeled images exist and name different images."""
    there, here = theirs.data.labeled, own.data.labeled
    if there is None or here is None or plain_path(there) == plain_path(here) or not there.is_file():
        return False
    return set(read_split(there).names) != set(read_split(here).names)
