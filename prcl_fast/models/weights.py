"""Weights files: strict reading, in which a missing, unexpected or misshapen key is an error, and writing.

Two kinds of file are read: backbone weights with torchvision's key names, and whole networks in this
package's format, {"format": "prcl_fast-network", "version": 1, "num_classes": C, "network": state_dict}.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prcl_fast.config.messages import shortened
from prcl_fast.errors import InputError
from prcl_fast.files.torch_file import check_torch_file
from prcl_fast.files.writing import write_bytes
from prcl_fast.models.network import SegmentationNetwork

FORMAT = "prcl_fast-network"
VERSION = 1
WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "backbone.")
SHOWN = 8


def load_weights(network: SegmentationNetwork, path: str | Path) -> None:
    """Loads a file of either kind: the whole network, or its backbone.

    Raises:
        InputError: see `load_network` and `load_backbone`.
    """
    content = read_file(path)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        _load_network(network, content, path)
    else:
        _load_backbone(network, content, path)


def load_backbone(network: SegmentationNetwork, path: str | Path) -> None:
    """Loads ImageNet weights with torchvision's key names into the backbone.

    A wrapping "state_dict" or "model" entry, and a "module." or "backbone." prefix of all keys, are removed.
    The classifier (`classifier_keys` of the backbone, such as fc.*) is left out. BN batch counters may be
    missing.

    Raises:
        InputError: the file is missing or unreadable, or a key is missing, unexpected or has another shape.
    """
    _load_backbone(network, read_file(path), path)


def load_network(network: SegmentationNetwork, path: str | Path) -> None:
    """Loads a whole network with its heads from this package's format.

    Raises:
        InputError: the file is missing, unreadable, of another format or version or for another number of
            classes, or a key is missing, unexpected or of another shape.
    """
    _load_network(network, read_file(path), path)


def save_network(state: Mapping[str, Tensor], num_classes: int, path: str | Path) -> None:
    """Writes a network's state dict in this package's own format, whole or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    content = {"format": FORMAT, "version": VERSION, "num_classes": num_classes, "network": dict(state)}
    archive = io.BytesIO()  # PyTorch's own writer answers a full disk with a C++ error
    torch.save(content, archive)
    write_bytes(Path(path), archive.getbuffer())


def read_file(path: str | Path) -> Any:
    """The content of a file on the CPU, read without running any code in it.

    Raises:
        InputError: the file is missing, corrupt or compressed, or contains other objects than tensors and
            plain values.
    """
    check_torch_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes raise different exceptions at each level (zip, pickle, storage).
    except Exception as error:
        raise InputError(f"{path}: not a readable weights file ({type(error).__name__})") from error


def tensors_of(content: object, path: str | Path) -> dict[str, Tensor]:
    """`content` as a state dict.

    Raises:
        InputError: it is no mapping from names to dense tensors with data.
    """
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: holds no state dict")
    for key, value in content.items():
        if not isinstance(key, str) or not key.isprintable() or not isinstance(value, Tensor):
            raise InputError(f"{path}: {shortened(key)} is no tensor, so this is no state dict")
        if value.is_meta or value.layout is not torch.strided:
            raise InputError(f"{path}: {shortened(key)} is a tensor without data, or a sparse one")
    return dict(content)


def check_keys(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], path: str | Path, what: str
) -> None:
    """Compares names, shapes and kinds of numbers. Values must be finite; BN batch counters may be missing.

    Raises:
        InputError: one line with the number of wrong keys and the first of them.
    """
    faults = [
        f"{key} missing" for key in expected if key not in given and not key.endswith("num_batches_tracked")
    ]
    faults += [f"{key} unexpected" for key in given if key not in expected]
    faults += [
        f"{key} is {list(given[key].shape)}, not {list(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    common = [key for key in expected if key in given and given[key].shape == expected[key].shape]
    faults += [
        f"{key} is {given[key].dtype}, not {expected[key].dtype}"
        for key in common
        if given[key].is_floating_point() != expected[key].is_floating_point()
    ]
    faults += [f"{key} is not finite" for key in common if not given[key].isfinite().all()]
    if faults:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(
            f"{path}: does not fit {what}, {len(faults)} keys at fault: {', '.join(faults[:SHOWN])}{more}"
        )


def _load_backbone(network: SegmentationNetwork, content: object, path: str | Path) -> None:
    if isinstance(content, Mapping):
        for wrapper in WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    given = tensors_of(content, path)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in given):
            given = {key.removeprefix(prefix): value for key, value in given.items()}
    classifier = network.backbone.classifier_keys
    given = {key: value for key, value in given.items() if not key.startswith(classifier)}
    check_keys(network.backbone.state_dict(), given, path, "the backbone")
    network.backbone.load_state_dict(given, strict=False)


def _load_network(network: SegmentationNetwork, content: object, path: str | Path) -> None:
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise InputError(f"{path}: is no {FORMAT} file")
    version, classes = content.get("version"), content.get("num_classes")
    if not isinstance(version, int) or version != VERSION:
        raise InputError(
            f"{path}: {FORMAT} version {shortened(version)}, this program reads version {VERSION}"
        )
    if not isinstance(classes, int) or classes != network.num_classes:
        raise InputError(
            f"{path}: made for {shortened(classes)} classes, this network has {network.num_classes}"
        )
    given = tensors_of(content.get("network"), path)
    check_keys(network.state_dict(), given, path, "the network")
    network.load_state_dict(given, strict=False)
