"""MobileNetV2: torchvision's names and shapes, dilation, features of a plain network, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from prcl_fast.config import ModelConfig, parse_config
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.methods import build_method
from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.models.build import build_network
from prcl_fast.models.mobilenet import MobileNetV2
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.weights import load_backbone
from prcl_fast.planning.memory_estimate import MemoryEstimator, tensor_bytes
from support.tiny import tiny_tree

# torchvision's `inverted_residual_setting`, as it stands in mobilenetv2.py: t, c, n, s.
SETTING = [
    [1, 16, 1, 1],
    [6, 24, 2, 2],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    values = dict.fromkeys(
        (f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var")), (channels,)
    )
    return values | {f"{name}.num_batches_tracked": ()}


def torchvision_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's `mobilenet_v2().features`, written from its source."""
    shapes = {"features.0.0.weight": (32, 3, 3, 3)} | norm_shapes("features.0.1", 32)
    channels, index = 32, 1
    for t, c, n, _ in SETTING:
        for _ in range(n):
            block, hidden, place = f"features.{index}.conv", channels * t, 0
            if t != 1:
                shapes |= {f"{block}.0.0.weight": (hidden, channels, 1, 1)} | norm_shapes(
                    f"{block}.0.1", hidden
                )
                place = 1
            shapes |= {f"{block}.{place}.0.weight": (hidden, 1, 3, 3)}
            shapes |= norm_shapes(f"{block}.{place}.1", hidden)
            shapes |= {f"{block}.{place + 1}.weight": (c, hidden, 1, 1)}
            shapes |= norm_shapes(f"{block}.{place + 2}", c)
            channels, index = c, index + 1
    shapes |= {f"features.{index}.0.weight": (1280, channels, 1, 1)}
    return shapes | norm_shapes(f"features.{index}.1", 1280)


def torchvision_file(seed: int = 1) -> dict[str, Tensor]:
    """A file as torchvision publishes it: random values, classifier included."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in torchvision_shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
        elif len(shape) == 4:
            fan_in = shape[1] * shape[2] * shape[3]
            state[name] = torch.randn(shape, generator=random) * (2 / fan_in) ** 0.5
        elif name.endswith(("weight", "running_var")):
            state[name] = torch.rand(shape, generator=random) + 0.5
        else:
            state[name] = torch.randn(shape, generator=random) * 0.1
    return state | {"classifier.1.weight": torch.zeros(1000, 1280), "classifier.1.bias": torch.zeros(1000)}


class Residual(nn.Module):
    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def plain_mobilenet(state: dict[str, Tensor]) -> nn.Sequential:
    """The published network of output stride 32, built from PyTorch's layers with the values of `state`."""
    values = [
        value
        for name, value in state.items()
        if name.startswith("features.") and not name.startswith("features.18.")
    ]

    def layers(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(outputs)]

    blocks: list[nn.Module] = [nn.Sequential(*layers(3, 32, 3, 2, 1), nn.ReLU6())]
    channels = 32
    for t, c, n, s in SETTING:
        for number in range(n):
            stride, hidden = s if number == 0 else 1, channels * t
            body: list[nn.Module] = []
            if t != 1:
                body += [*layers(channels, hidden, 1, 1, 1), nn.ReLU6()]
            body += [*layers(hidden, hidden, 3, stride, hidden), nn.ReLU6(), *layers(hidden, c, 1, 1, 1)]
            block = nn.Sequential(*body)
            blocks.append(Residual(block) if stride == 1 and channels == c else block)
            channels = c
    network = nn.Sequential(*blocks)
    own = network.state_dict()
    assert len(own) == len(values)
    network.load_state_dict(dict(zip(own, values, strict=True)))
    return network.eval()


def small_network(**changes: Any) -> SegmentationNetwork:
    settings: dict[str, Any] = {"num_classes": 4, "width": 16, "representation_dim": 8, "probability": True}
    torch.manual_seed(0)
    return SegmentationNetwork("mobilenet_v2", **(settings | changes))


def test_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        state = MobileNetV2().state_dict()
    expected = {
        name: shape for name, shape in torchvision_shapes().items() if not name.startswith("features.18.")
    }
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    # 2 223 872 without its classifier, by torchvision's table, of which features.18 has 412 160.
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in MobileNetV2().parameters()) == 2_223_872 - 412_160


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(64, 64), (65, 47), (16, 31)])
def test_maps_have_the_promised_shapes(output_stride: int, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = MobileNetV2(output_stride)
        low, high = backbone(torch.empty(2, 3, *size))
    assert (backbone.low_channels, backbone.out_channels) == (24, 320)
    assert low.shape == (2, 24, -(-size[0] // 4), -(-size[1] // 4))
    assert high.shape == (2, 320, -(-size[0] // output_stride), -(-size[1] // output_stride))


@pytest.mark.parametrize(
    ("output_stride", "expected"),
    [
        # Strides and dilations of the depthwise convolutions of features.1 to features.17.
        (16, ([1, 2, 1, 2, 1, 1, 2] + [1] * 10, [1] * 14 + [2] * 3)),
        (8, ([1, 2, 1, 2, 1, 1] + [1] * 11, [1] * 7 + [2] * 7 + [4] * 3)),
    ],
)
def test_dilation_replaces_the_strides_beyond_the_output_stride(
    output_stride: int, expected: tuple[list[int], list[int]]
) -> None:
    with torch.device("meta"):
        backbone = MobileNetV2(output_stride)
    depthwise = [
        module for module in backbone.modules() if isinstance(module, nn.Conv2d) and module.groups > 1
    ]
    assert [module.stride[0] for module in depthwise] == expected[0]
    assert [module.dilation[0] for module in depthwise] == expected[1]


@pytest.mark.parametrize("output_stride", [8, 16])
def test_features_are_those_of_the_plain_network_at_its_pixels(output_stride: int) -> None:
    state = torchvision_file()
    plain = plain_mobilenet(state)
    backbone = MobileNetV2(output_stride).eval()
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    images = torch.randn(2, 3, 96, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        low, high = backbone(images)
        expected_low, expected_high = plain[:4](images), plain(images)
    step = 32 // output_stride
    assert expected_high.std() > 0.01
    # The same sums in another order, in float32 over 52 layers.
    for own, expected in ((low, expected_low), (high[:, :, ::step, ::step], expected_high)):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_activations_stop_at_6_and_batches_are_counted_together() -> None:
    backbone = MobileNetV2()
    kinds = {type(module) for module in backbone.modules() if not list(module.children())}
    assert kinds == {nn.Conv2d, BatchNorm2d, nn.ReLU6}
    network = small_network().train()
    network(torch.randn(2, 3, 32, 32))
    counters = [
        module.num_batches_tracked for module in network.backbone.modules() if isinstance(module, BatchNorm2d)
    ]
    assert len(counters) == 51
    assert all(counter == 1 for counter in counters)


def test_maps_keep_their_size_at_the_start() -> None:
    torch.manual_seed(0)
    backbone = MobileNetV2().eval()  # batch norm does nothing yet
    with torch.no_grad():
        low, high = backbone(torch.randn(2, 3, 64, 64))
    assert 0.1 < low.std() < 10
    assert 0.1 < high.std() < 10


def test_torchvisions_file_loads_strictly_without_its_classifier(tmp_path: Path) -> None:
    state = torchvision_file()
    torch.save(state, tmp_path / "mobilenet_v2.pth")
    model = ModelConfig(backbone="mobilenet_v2", width=16, dim=8)
    network = build_network(model, 4)
    load_backbone(network, tmp_path / "mobilenet_v2.pth")
    own = network.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.items())

    del state["features.3.conv.1.0.weight"]
    state["features.19.0.weight"] = torch.zeros(1)
    state["features.1.conv.2.bias"] = torch.zeros(17)
    torch.save(state, tmp_path / "bad.pth")
    network = small_network()
    before = network.backbone.state_dict()["features.0.0.weight"].clone()
    with pytest.raises(InputError) as caught:
        load_backbone(network, tmp_path / "bad.pth")
    for fault in (
        f"{tmp_path / 'bad.pth'}: does not fit the backbone, 3 keys at fault",
        "features.3.conv.1.0.weight missing",
        "features.19.0.weight unexpected",
        "features.1.conv.2.bias is [17], not [16]",
    ):
        assert fault in str(caught.value)
    assert torch.equal(network.backbone.state_dict()["features.0.0.weight"], before)


def test_a_resnets_file_does_not_fit(tmp_path: Path) -> None:
    torch.save(
        {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(1000, 512)}, tmp_path / "r.pth"
    )
    with pytest.raises(InputError, match=r"257 keys at fault: features\.0\.0\.weight missing"):
        load_backbone(small_network(), tmp_path / "r.pth")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stem", "deep", "stem: deep is for a ResNet; leave it out for mobilenet_v2"),
        ("base_width", 16, "base_width: 16 is for a ResNet; leave it out for mobilenet_v2"),
    ],
)
def test_what_a_mobilenet_has_not_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    tree = tiny_tree(tmp_path)
    tree["model"] = {"backbone": "mobilenet_v2", "width": 16, "dim": 8, key: value}
    with pytest.raises(InputError) as caught:
        parse_config(tree, "run.yaml")
    assert str(caught.value) == f"run.yaml: model.{message}"
    with pytest.raises(InputError, match=f"{key}: '?{value}'? is a ResNet's"):
        small_network(**{key: value})


def test_an_unknown_output_stride_is_named() -> None:
    with pytest.raises(InputError, match="output_stride: 32"):
        MobileNetV2(32)


def test_every_parameter_receives_a_gradient() -> None:
    network = small_network()
    logits, mu, var, *_ = network(torch.randn(2, 3, 48, 40))
    weight = torch.randn(8, 1, 1)
    (logits.logsumexp(1).sum() + (mu * weight).square().sum() + (var * weight).sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_two_steps_of_training_move_the_backbone(tmp_path: Path, amp: str) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["model"] = {"backbone": "mobilenet_v2", "width": 16, "dim": 8}
    tree["train"] |= {"iterations": 2, "eval_every": 2, "amp": amp}
    trainer = Trainer(parse_config(tree, "tiny"), Console(quiet=True))
    backbone = trainer.method.student.backbone
    before = {name: value.detach().clone() for name, value in backbone.named_parameters()}
    trainer.run()
    assert all(value.isfinite().all() for value in backbone.parameters())
    assert [name for name, value in backbone.named_parameters() if torch.equal(value, before[name])] == []


def test_the_memory_estimate_knows_the_network(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["model"] = {"backbone": "mobilenet_v2", "width": 16, "dim": 8}
    config = parse_config(tree, "tiny")
    estimator = MemoryEstimator(config, 6, torch.device("cpu"))
    student = build_method(config, 6).student
    state = [*student.parameters(), *student.buffers()]
    assert estimator.states().student == tensor_bytes(state)
    one, two = (estimator.one_pass(n, n, accumulates=False) for n in (1, 2))
    assert 0 < one.saved < two.saved <= two.peak
