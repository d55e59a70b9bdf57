"""Import of the PRCL authors' checkpoints, on synthetic ones with their names and shapes."""

from __future__ import annotations

import pytest
import torch

from prcl_fast.errors import InputError
from prcl_fast.models.convert import convert_authors_checkpoint
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.weights import load_network

# Names and shapes in the authors' checkpoints, one of each kind.
AUTHORS_EMA = {
    "resnet_conv1.weight": (64, 3, 7, 7),
    "resnet_bn1.running_mean": (64,),
    "resnet_layer1.0.downsample.0.weight": (256, 64, 1, 1),
    "resnet_layer4.2.bn3.num_batches_tracked": (),
    "ASPP.convs.0.0.weight": (256, 2048, 1, 1),
    "ASPP.convs.3.0.weight": (256, 2048, 3, 3),
    "ASPP.convs.3.1.bias": (256,),
    "ASPP.convs.4.1.weight": (256, 2048, 1, 1),
    "ASPP.convs.4.2.running_var": (256,),
    "ASPP.project.0.weight": (256, 1280, 1, 1),
    "ASPP.project.1.weight": (256,),
    "project.0.weight": (48, 256, 1, 1),
    "project.1.running_mean": (48,),
    "classifier.0.weight": (256, 304, 3, 3),
    "classifier.1.weight": (256,),
    "classifier.3.weight": (21, 256, 1, 1),
    "classifier.3.bias": (21,),
    "representation.0.weight": (256, 304, 3, 3),
    "representation.3.bias": (256,),
}
AUTHORS_HEAD = {
    "fc1": (256, 304),
    "fc2": (256, 256),
    "gamma": (1,),
    "beta": (1,),
    "bn1.weight": (256,),
    "bn1.running_mean": (256,),
    "bn2.running_var": (256,),
}
PREFIXES = [
    ("backbone.", "resnet_"),
    ("decoder.aspp.pooling.conv.", "ASPP.convs.4.1."),
    ("decoder.aspp.pooling.bn.", "ASPP.convs.4.2."),
    ("decoder.aspp.branches.", "ASPP.convs."),
    ("decoder.aspp.project.", "ASPP.project.0."),
    ("decoder.aspp.bn.", "ASPP.project.1."),
    ("decoder.low_level.", "project."),
    ("classifier.", "classifier."),
    ("representation.", "representation."),
]


def authors_name(ours: str) -> str:
    prefix, theirs = next(pair for pair in PREFIXES if ours.startswith(pair[0]))
    return theirs + ours.removeprefix(prefix)


def checkpoint_of(network: SegmentationNetwork) -> dict:
    head, ema = {}, {}
    for key, value in network.state_dict().items():
        if key.startswith("probability."):
            head[key.removeprefix("probability.")] = value
        else:
            ema[authors_name(key)] = value
    return {
        "epoch": 7,
        "ema": ema,
        "model": {key: torch.zeros(1) for key in ema},
        "uncer_head": head,
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"power": 0.9, "last_epoch": 7},
    }


def light_checkpoint_of(backbone: str, num_classes: int) -> dict:
    """The authors' network; every tensor repeats one number, so that its file is small."""
    with torch.device("meta"):
        network = SegmentationNetwork(
            backbone, num_classes=num_classes, representation_dim=256, probability=True
        )
    checkpoint = checkpoint_of(network)
    for entry in ("ema", "uncer_head"):
        checkpoint[entry] = {
            key: torch.zeros((), dtype=value.dtype).expand(value.shape)
            for key, value in checkpoint[entry].items()
        }
    return checkpoint


@pytest.fixture
def light_checkpoint() -> dict:
    return light_checkpoint_of("resnet50", 21)


def failure(checkpoint: object, tmp_path) -> str:
    torch.save(checkpoint, tmp_path / "best_model.pth")
    with pytest.raises(InputError) as caught:
        convert_authors_checkpoint(tmp_path / "best_model.pth", tmp_path / "out.pth")
    assert "\n" not in str(caught.value)
    assert "best_model.pth" in str(caught.value)
    assert not (tmp_path / "out.pth").exists()
    return str(caught.value)


def test_synthetic_checkpoint_has_the_authors_names_and_shapes(light_checkpoint):
    for entry, expected in (("ema", AUTHORS_EMA), ("uncer_head", AUTHORS_HEAD)):
        given = light_checkpoint[entry]
        assert {key: tuple(given[key].shape) for key in expected} == expected


def test_converted_network_computes_what_the_original_did(tmp_path):
    torch.manual_seed(0)
    original = SegmentationNetwork(
        "resnet50", num_classes=21, representation_dim=256, probability=True
    ).eval()
    torch.save(checkpoint_of(original), tmp_path / "best_model.pth")
    convert_authors_checkpoint(tmp_path / "best_model.pth", tmp_path / "network.pth")

    torch.manual_seed(1)
    loaded = SegmentationNetwork("resnet50", num_classes=21, representation_dim=256, probability=True).eval()
    images = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        expected = original(images)
        assert not torch.equal(loaded(images).logits, expected.logits)
        load_network(loaded, tmp_path / "network.pth")
        for ours, theirs in zip(loaded(images)[:3], expected[:3], strict=True):
            assert torch.equal(ours, theirs)


def test_checkpoint_without_probability_or_representation_head_converts(light_checkpoint, tmp_path):
    del light_checkpoint["uncer_head"]
    light_checkpoint["ema"] = {
        key: value for key, value in light_checkpoint["ema"].items() if not key.startswith("representation")
    }
    torch.save(light_checkpoint, tmp_path / "best_model.pth")
    convert_authors_checkpoint(tmp_path / "best_model.pth", tmp_path / "out.pth")
    with torch.device("meta"):
        network = SegmentationNetwork("resnet50", num_classes=21)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["network"].keys() == network.state_dict().keys()
    assert written["num_classes"] == 21


def test_resnet101_is_recognised_by_its_blocks(tmp_path):
    checkpoint = light_checkpoint_of("resnet101", 19)
    torch.save(checkpoint, tmp_path / "best_model.pth")
    convert_authors_checkpoint(tmp_path / "best_model.pth", tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert "backbone.layer3.22.conv2.weight" in written["network"]
    assert written["num_classes"] == 19


def test_missing_unexpected_and_misshapen_keys_are_named(light_checkpoint, tmp_path):
    ema = light_checkpoint["ema"]
    light_checkpoint["ema"] = {key: value for key, value in ema.items() if key != "project.0.weight"}
    assert "decoder.low_level.0.weight missing" in failure(light_checkpoint, tmp_path)
    light_checkpoint["ema"] = ema | {"predictor.0.weight": torch.zeros(1)}
    assert "unknown key predictor.0.weight" in failure(light_checkpoint, tmp_path)
    light_checkpoint["ema"] = ema | {"resnet_bn1.bias": torch.zeros(3)}
    assert "backbone.bn1.bias is [3], not [64]" in failure(light_checkpoint, tmp_path)


def test_their_convolutional_uncertainty_head_is_refused(light_checkpoint, tmp_path):
    light_checkpoint["uncer_head"] = {
        "uncertainty.0.weight": torch.zeros(256, 304, 3, 3),
        "gamma": torch.ones(1),
    }
    assert "probability.fc1 missing" in failure(light_checkpoint, tmp_path)


def test_other_networks_and_files_are_refused(light_checkpoint, tmp_path):
    deep = light_checkpoint["ema"] | {"resnet_conv1.0.weight": torch.zeros(64, 3, 3, 3)}
    assert "deep-stem" in failure(light_checkpoint | {"ema": deep}, tmp_path)
    shallow = {key: value for key, value in light_checkpoint["ema"].items() if "layer3.5" not in key}
    assert "5 blocks in layer3" in failure(light_checkpoint | {"ema": shallow}, tmp_path)
    assert "no entry 'ema'" in failure(light_checkpoint["ema"], tmp_path)
    with pytest.raises(InputError, match="no such"):
        convert_authors_checkpoint(tmp_path / "absent.pth", tmp_path / "out.pth")
