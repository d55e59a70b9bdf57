"""Trained networks that other runs start from: the main network of a run or checkpoint, or a network file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prcl_fast.config import ModelConfig
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.weights import network_content, save_network
from prcl_fast.runs.checkpoint import load_run
from prcl_fast.runs.checkpoint_file import is_checkpoint


@dataclass(frozen=True)
class TrainedNetwork:
    """The state of a trained network, and what is known of its origin."""

    path: Path  # the file
    origin: str
    state: dict[str, Tensor]
    num_classes: int
    classes: tuple[str, ...] | None
    model: ModelConfig | None = None  # None for a network file

    def other_classes(self, classes: Sequence[str]) -> str | None:
        """The difference between its classes and others in number, names or order; None without one."""
        if self.num_classes != len(classes):
            return f"{self.num_classes} classes there, {len(classes)} here"
        for index, (there, here) in enumerate(zip(self.classes or classes, classes, strict=True)):
            if there != here:
                return f"class {index} is {there!r} there, {here!r} here"
        return None


def is_run(path: Path) -> bool:
    """Whether a path is a folder or a checkpoint of this program."""
    return path.is_dir() or is_checkpoint(path)


def network_of_run(path: str | Path) -> TrainedNetwork:
    """The network that gave the mIoU of a run folder (best.pt, else last.pt) or checkpoint file.

    Raises:
        InputError: no such run or checkpoint, or a damaged one.
    """
    run = load_run(path, torch.device("cpu"))
    name, main = next(iter(run.networks.items()))
    network = next(module for module in main.modules() if isinstance(module, SegmentationNetwork))
    origin = f"the {name} of iteration {run.iteration}"
    state = network.state_dict()
    return TrainedNetwork(run.path, origin, state, len(run.classes), run.classes, run.config.model)


def network_of_file(content: object, path: Path) -> TrainedNetwork:
    """The network in the content of a network file. Raises InputError."""
    state, num_classes, classes = network_content(content, path)
    return TrainedNetwork(path, "a network file", state, num_classes, classes)


def export_network(path: str | Path, out: str | Path) -> None:
    """Writes the main network of a run or checkpoint as a network file. Raises InputError."""
    network = network_of_run(path)
    state = {key: tensor.contiguous().clone() for key, tensor in network.state.items()}
    save_network(state, network.num_classes, out, network.classes)


def other_architecture(there: ModelConfig, here: ModelConfig, keys: Sequence[str]) -> str | None:
    """The keys of `model` in which two configurations differ, as part of a message; None without one."""
    differing = [key for key in keys if getattr(there, key) != getattr(here, key)]
    if not differing:
        return None
    theirs = ", ".join(f"model.{key} {getattr(there, key)}" for key in differing)
    own = ", ".join(str(getattr(here, key)) for key in differing)
    return f"its network has {theirs}, this run's has {own}"
