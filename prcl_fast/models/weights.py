"""Weights files: strict reading, in which a missing, unexpected or misshapen key is an error, and writing.

Two kinds of file are read: backbone weights with torchvision's key names, and whole networks in this
package's format, {"format": "prcl_fast-network", "version": 1, "num_classes": C, "classes": names or None,
"network": state_dict}.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
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
HEADS = ("classifier", "representation", "probability")


def load_backbone(network: SegmentationNetwork, path: str | Path) -> None:
    """Loads ImageNet weights with torchvision's key names into the backbone.

    A wrapping "state_dict" or "model" entry, and a "module." or "backbone." prefix of all keys, are removed.
    The classifier (`classifier_keys` of the backbone, such as fc.*) is left out. BN batch counters may be
    missing.

    Raises:
        InputError: the file is missing or unreadable, or a key is missing, unexpected or has another shape.
    """
    load_backbone_state(network, read_file(path), path)


def load_backbone_state(network: SegmentationNetwork, content: object, path: str | Path) -> None:
    """`load_backbone` from a file's content. Raises InputError."""
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


def load_network(network: SegmentationNetwork, path: str | Path) -> None:
    """Loads a whole network with its heads from this package's format.

    Raises:
        InputError: the file is missing, unreadable, of another format or version or for another number of
            classes, or a key is missing, unexpected or of another shape.
    """
    state, num_classes, _ = network_content(read_file(path), path)
    if num_classes != network.num_classes:
        raise InputError(f"{path}: made for {num_classes} classes, this network has {network.num_classes}")
    check_keys(network.state_dict(), state, path, "the network")
    network.load_state_dict(state, strict=False)


def is_network(content: object) -> bool:
    """Whether the content of a file is a whole network in this package's format."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def network_content(
    content: object, path: str | Path
) -> tuple[dict[str, Tensor], int, tuple[str, ...] | None]:
    """State dict, number of classes and, if stored, names of the classes of a file's content.

    Raises:
        InputError: it is no whole network in this package's format and version, or damaged.
    """
    if not isinstance(content, Mapping) or not is_network(content):
        raise InputError(f"{path}: is no {FORMAT} file")
    version, number, names = (content.get(key) for key in ("version", "num_classes", "classes"))
    if type(version) is not int or version != VERSION:
        raise InputError(
            f"{path}: {FORMAT} version {shortened(version)}, this program reads version {VERSION}"
        )
    if type(number) is not int or number < 1:
        raise InputError(f"{path}: made for {shortened(number)} classes")
    if names is not None and not (
        isinstance(names, list) and len(names) == number and all(isinstance(name, str) for name in names)
    ):
        raise InputError(f"{path}: wrong names of classes: {shortened(names)}")
    return tensors_of(content.get("network"), path), number, None if names is None else tuple(names)


def load_trained(
    network: SegmentationNetwork, given: Mapping[str, Tensor], path: str | Path, *, same_classes: bool
) -> list[str]:
    """Loads backbone and decoder from the state of another trained network, and each head that agrees.

    A head is loaded where all its keys and shapes agree; the classifier only if the classes are the same.

    Returns:
        The network's heads that were not loaded.

    Raises:
        InputError: backbone or decoder do not fit, or a value is not finite.
    """
    own = network.state_dict()
    taken = _part(given, ("backbone", "decoder"))
    check_keys(_part(own, ("backbone", "decoder")), taken, path, "backbone and decoder")
    anew = []
    for head in HEADS:
        expected, found = _part(own, (head,)), _part(given, (head,))
        if not expected:
            continue
        shapes = {key: tensor.shape for key, tensor in found.items()}
        agree = shapes == {key: tensor.shape for key, tensor in expected.items()}
        if not agree or (head == "classifier" and not same_classes):
            anew.append(head)
            continue
        check_keys(expected, found, path, f"the head {head}")
        taken |= found
    network.load_state_dict(taken, strict=False)
    return anew


def save_network(
    state: Mapping[str, Tensor], num_classes: int, path: str | Path, classes: Sequence[str] | None = None
) -> None:
    """Writes a network's state dict in this package's own format, whole or not at all.

    Args:
        classes: the names of the classes in the order of their ids, if they are known.

    Raises:
        WriteError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_classes": num_classes,
        "classes": None if classes is None else list(classes),
        "network": dict(state),
    }
    archive = io.BytesIO()  # PyTorch's own writer answers a full disk with a C++ error
    torch.save(content, archive)
    write_bytes(Path(path), archive.getbuffer())


def read_file(path: str | Path) -> Any:
    """The content of a file on the CPU, read without running any code in it.

    NumPy's numbers and arrays beside the tensors, such as a score, become placeholders.

    Raises:
        InputError: the file is missing, corrupt, compressed or of another format, or contains other objects
            than tensors, plain values and NumPy's; the message names their class.
    """
    check_torch_file(path)
    try:
        with torch.serialization.safe_globals([(_Placeholder, name) for name in _NUMPY]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes raise different exceptions at each level (zip, pickle, storage).
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise InputError(
                f"{path}: contains an object of {refused[1]}, which is not read, as that would run code; "
                "save the state dict alone with torch.save"
            ) from error
        raise InputError(f"{path}: not a readable weights file ({type(error).__name__})") from error


class _Placeholder:
    """Stands for NumPy's types, dtypes and reconstruction functions, whose own code is not run."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_NUMPY = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


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

    Args:
        expected: only its shapes and dtypes are read: it may be on the meta device.

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
    faults += [
        f"{key} is {given[key].dtype}, not {expected[key].dtype}"
        for key in expected
        if key in given and _kind(given[key]) != _kind(expected[key])
    ]
    if faults:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(
            f"{path}: does not fit {what}, {len(faults)} keys at fault: {', '.join(faults[:SHOWN])}{more}"
        )
    spoilt = [key for key in expected if key in given and not given[key].isfinite().all()]
    if spoilt:
        more = f" (and {len(spoilt) - 1} more)" if len(spoilt) > 1 else ""
        raise InputError(f"{path}: {spoilt[0]} has values that are not finite{more}")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _part(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The entries of some of a network's modules."""
    return {key: value for key, value in state.items() if key.partition(".")[0] in names}
