"""Weights files: strict loading, clear errors, whole-network round trip."""

from __future__ import annotations

import pickle

import pytest
import torch

from prcl_fast.errors import InputError
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.resnet import ResNet
from prcl_fast.models.weights import load_backbone, load_network, save_network


@pytest.fixture
def network() -> SegmentationNetwork:
    torch.manual_seed(0)
    return SegmentationNetwork("resnet18", num_classes=4, width=16, representation_dim=8, probability=True)


@pytest.fixture(scope="module")
def imagenet() -> dict[str, torch.Tensor]:
    """A backbone as torchvision stores it, classifier included."""
    torch.manual_seed(1)
    state = dict(ResNet(18).state_dict())
    return state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def assert_loaded(network: SegmentationNetwork, imagenet: dict[str, torch.Tensor]) -> None:
    for key, value in network.backbone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, imagenet[key]), key


def failure(load, network, path) -> str:
    with pytest.raises(InputError) as caught:
        load(network, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.backbone.{key}": value for key, value in state.items()}},
    ],
)
def test_backbone_weights_load_from_every_known_wrapping(network, imagenet, tmp_path, wrap):
    torch.save(wrap(imagenet), tmp_path / "resnet18.pth")
    load_backbone(network, tmp_path / "resnet18.pth")
    assert_loaded(network, imagenet)


def test_backbone_weights_may_lack_batch_counters(network, imagenet, tmp_path):
    state = {key: value for key, value in imagenet.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    load_backbone(network, tmp_path / "old.pth")
    assert_loaded(network, imagenet)


def test_faulty_keys_are_listed_and_nothing_is_loaded(network, imagenet, tmp_path):
    state = dict(imagenet)
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["bn1.bias"] = torch.zeros(65)
    torch.save(state, tmp_path / "bad.pth")
    before = network.backbone.conv1.weight.clone()
    message = failure(load_backbone, network, tmp_path / "bad.pth")
    assert "3 keys at fault" in message
    assert "layer1.0.conv1.weight missing" in message
    assert "layer9.weight unexpected" in message
    assert "bn1.bias is [65], not [64]" in message
    assert torch.equal(network.backbone.conv1.weight, before)


def test_long_lists_of_faulty_keys_are_cut(network, tmp_path):
    torch.save(ResNet(34).state_dict(), tmp_path / "resnet34.pth")
    message = failure(load_backbone, network, tmp_path / "resnet34.pth")
    assert message.count("unexpected") == 8
    assert "96 keys at fault" in message
    assert message.endswith("and 88 more")


def test_deep_stem_weights_do_not_fit_a_plain_stem(network, tmp_path):
    torch.save(ResNet(18, stem="deep").state_dict(), tmp_path / "stem.pth")
    assert "conv1.weight missing" in failure(load_backbone, network, tmp_path / "stem.pth")


@pytest.mark.parametrize("load", [load_backbone, load_network])
def test_missing_and_corrupt_files_are_named(network, imagenet, tmp_path, load):
    path = tmp_path / "weights.pth"
    assert "no such" in failure(load, network, path)
    path.write_bytes(b"not weights at all")
    assert "not a readable weights file" in failure(load, network, path)
    torch.save(imagenet, path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "not a readable weights file" in failure(load, network, path)


class _Surprise:
    def __reduce__(self):
        return (print, ("code in a weights file has run",))


def test_code_in_a_weights_file_is_not_run(network, tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv1.weight": _Surprise()}, protocol=2))
    failure(load_backbone, network, tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{"conv1.weight": 3}, [torch.zeros(1)], {}])
def test_other_contents_are_refused(network, tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    failure(load_backbone, network, tmp_path / "other.pth")


def test_whole_network_returns_bit_for_bit(network, tmp_path):
    path = tmp_path / "new" / "network.pth"
    save_network(network.state_dict(), network.num_classes, path)
    assert [file.name for file in path.parent.iterdir()] == ["network.pth"]
    torch.manual_seed(9)
    other = SegmentationNetwork("resnet18", num_classes=4, width=16, representation_dim=8, probability=True)
    load_network(other, path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())


def test_whole_network_of_other_classes_format_version_or_heads_is_refused(network, imagenet, tmp_path):
    path = tmp_path / "network.pth"
    save_network(network.state_dict(), 4, path)
    other = SegmentationNetwork("resnet18", num_classes=6, width=16, representation_dim=8, probability=True)
    assert "made for 4 classes, this network has 6" in failure(load_network, other, path)
    headless = SegmentationNetwork("resnet18", num_classes=4, width=16)
    assert "representation.0.weight unexpected" in failure(load_network, headless, path)
    torch.save({"format": "prcl_fast-network", "version": 2, "num_classes": 4, "network": {}}, path)
    assert "version 2" in failure(load_network, network, path)
    torch.save(imagenet, path)
    assert "no prcl_fast-network file" in failure(load_network, network, path)


def test_unwritable_target_is_named(network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/network\.pth"):
        save_network(network.state_dict(), 4, tmp_path / "file" / "network.pth")
