"""Import of checkpoints of the PRCL authors' public training scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prcl_fast.errors import InputError
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.weights import check_keys, read_file, save_network, tensors_of

# The structures agree: the import renames the leading part of each key.
RENAMED = {
    "resnet_": "backbone.",
    "ASPP.convs.4.1.": "decoder.aspp.pooling.conv.",
    "ASPP.convs.4.2.": "decoder.aspp.pooling.bn.",
    "ASPP.convs.": "decoder.aspp.branches.",
    "ASPP.project.0.": "decoder.aspp.project.",
    "ASPP.project.1.": "decoder.aspp.bn.",
    "project.": "decoder.low_level.",
    "classifier.": "classifier.",
    "representation.": "representation.",
}
BACKBONES = {6: "resnet50", 23: "resnet101"}  # by the number of blocks in layer3


def convert_authors_checkpoint(source: str | Path, out: str | Path) -> None:
    """Converts a checkpoint of the authors' PRCL code to a network file of this package.

    The averaged network "ema", with which they report scores, becomes the network; "uncer_head" becomes its
    probability head. A checkpoint without "uncer_head" (of their ReCo script) gives a network without that
    head. Checkpoints do not store the output stride; the authors' is 16.

    Args:
        source: their `best_model.pth`, of a ResNet-50 or ResNet-101 with the plain stem.
        out: file to write, for `prcl_fast.models.weights.load_network`.

    Raises:
        InputError: the file is unreadable or no such checkpoint, or a key is missing, unexpected or of
            another shape; also for their deep-stem network, whose dilations differ from this package's.
    """
    source = Path(source)
    content = read_file(source)
    if not isinstance(content, Mapping) or "ema" not in content:
        raise InputError(
            f"{source}: has no entry 'ema', so this is no checkpoint of the authors' training scripts"
        )
    given = {_rename(key, source): value for key, value in tensors_of(content["ema"], source).items()}
    if "uncer_head" in content:
        head = tensors_of(content["uncer_head"], source)
        given.update({f"probability.{key}": value for key, value in head.items()})

    network = _expected_network(given, probability="uncer_head" in content, source=source)
    check_keys(network.state_dict(), given, source, "the authors' network")
    save_network(given, network.num_classes, out)


def _rename(key: str, source: Path) -> str:
    for theirs, ours in RENAMED.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    raise InputError(f"{source}: 'ema' holds the unknown key {key}")


def _expected_network(given: Mapping[str, Tensor], *, probability: bool, source: Path) -> SegmentationNetwork:
    """The network of the checkpoint on the meta device, for its names and shapes."""
    if "backbone.conv1.0.weight" in given:
        raise InputError(f"{source}: deep-stem checkpoints cannot be converted, their dilations differ")
    blocks = {match[1] for key in given if (match := re.match(r"backbone\.layer3\.(\d+)\.", key))}
    if len(blocks) not in BACKBONES:
        raise InputError(
            f"{source}: {len(blocks)} blocks in layer3, neither ResNet-50 (6) nor ResNet-101 (23)"
        )
    classifier, representation = given.get("classifier.3.bias"), given.get("representation.3.bias")
    if classifier is None:
        raise InputError(f"{source}: 'ema' has no classifier.3.bias")
    with torch.device("meta"):
        return SegmentationNetwork(
            BACKBONES[len(blocks)],
            num_classes=classifier.numel(),
            representation_dim=None if representation is None else representation.numel(),
            probability=probability,
        )
