"""The initial weights of a run, by the key `model.weights`: a backbone, a trained network, or another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prcl_fast.config import Config
from prcl_fast.errors import InputError, naming
from prcl_fast.methods import Method
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.weights import is_network, load_backbone_state, load_trained, read_file
from prcl_fast.runs.trained_network import (
    TrainedNetwork,
    is_run,
    network_of_file,
    network_of_run,
    other_architecture,
)

_KEY = "model.weights"
# The keys of `model` that determine names and shapes of backbone and decoder.
_SHAPES = ("backbone", "stem", "base_width", "width")


def load_initial_weights(
    method: Method, config: Config, classes: Sequence[str], say: Callable[[str], None]
) -> None:
    """Loads `model.weights` into every network of a new method; nothing to do without the key.

    A file with torchvision's key names initialises the backbone. A run folder, a checkpoint or a network file
    initialises backbone and decoder, and each head that agrees in shape; the classifier only for the same
    classes in the same order. Of two networks that supervise each other, the second takes its backbone alone:
    two equal networks would stay equal.

    Args:
        classes: names of the data's classes.
        say: takes a line about a trained network and the heads that start anew.

    Raises:
        InputError: the file cannot be read, or its network has another architecture.
    """
    path = config.model.weights
    if path is None:
        return
    with naming(_KEY):
        if is_run(path):
            trained = network_of_run(path)
        else:
            content = read_file(path)
            if not is_network(content):
                for network in _networks(method):
                    load_backbone_state(network, content, path)
                return
            trained = network_of_file(content, path)
        say(_loaded(method, trained, config, classes))


def _networks(method: Method) -> list[SegmentationNetwork]:
    """All networks of a method, which are built alike."""
    return [module for module in method.modules() if isinstance(module, SegmentationNetwork)]


def _loaded(method: Method, trained: TrainedNetwork, config: Config, classes: Sequence[str]) -> str:
    """Loads a trained network into those of a method; returns a line about it."""
    if trained.model is not None:
        other = other_architecture(trained.model, config.model, _SHAPES)
        if other is not None:
            raise InputError(f"{trained.path}: {other}")
    difference = trained.other_classes(classes)
    first, *others = method.learners()
    for network in _networks(method):
        if network not in others:
            anew = load_trained(network, trained.state, trained.path, same_classes=difference is None)
    for network in others:
        network.backbone.load_state_dict(first.backbone.state_dict())
    parts = []
    if "classifier" in anew:
        anew.remove("classifier")
        parts.append(f"{difference or 'a classifier of another kind'}: the classifier starts anew")
    if anew:
        names = " and ".join(anew)
        starts = "it starts" if len(anew) == 1 else "they start"
        parts.append(f"no {names} of these shapes there: {starts} anew")
    line = f"{_KEY}: {trained.path}: {'; '.join(parts) or f'{trained.origin}, with its heads'}"
    return (
        f"{line}; the second network takes the backbone alone, to differ from the first" if others else line
    )
