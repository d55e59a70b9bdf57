"""Backbones, decoder and the whole network: shapes, names, dilation, memory format, parameter groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

from prcl_fast.config import ModelConfig
from prcl_fast.errors import InputError
from prcl_fast.models.build import build_network
from prcl_fast.models.conv3x3 import Conv3x3
from prcl_fast.models.deeplab import ASPP, ImagePooling
from prcl_fast.models.network import BACKBONES, SegmentationNetwork
from prcl_fast.models.resnet import ResNet

# torchvision's ResNets without fc: entries of the state dict, parameters, channels of layer1 and layer4.
TORCHVISION = {
    18: (120, 11_176_512, 64, 512),
    34: (216, 21_284_672, 64, 512),
    50: (318, 23_508_032, 256, 2048),
    101: (624, 42_500_160, 256, 2048),
}


def small_network(backbone="resnet18", **changes) -> SegmentationNetwork:
    settings = {"num_classes": 5, "width": 32, "representation_dim": 24, "probability": True}
    torch.manual_seed(0)
    return SegmentationNetwork(backbone, **(settings | changes))


@pytest.mark.parametrize("depth", TORCHVISION)
def test_plain_resnet_has_torchvision_entries_and_parameters(depth):
    with torch.device("meta"):
        resnet = ResNet(depth)
    entries, parameters, low_channels, out_channels = TORCHVISION[depth]
    assert len(resnet.state_dict()) == entries
    assert sum(p.numel() for p in resnet.parameters()) == parameters
    assert (resnet.low_channels, resnet.out_channels) == (low_channels, out_channels)


def test_plain_resnet_has_torchvision_names_and_shapes():
    with torch.device("meta"):
        basic, bottleneck = ResNet(18).state_dict(), ResNet(50).state_dict()
    expected_basic = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.num_batches_tracked": (),
        "layer4.1.conv2.weight": (512, 512, 3, 3),
        "layer4.1.bn2.bias": (512,),
    }
    expected_bottleneck = {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.2.conv1.weight": (64, 256, 1, 1),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "layer4.2.bn3.running_var": (2048,),
    }
    for state, expected in ((basic, expected_basic), (bottleneck, expected_bottleneck)):
        assert {key: tuple(state[key].shape) for key in expected} == expected
    assert "layer1.0.downsample.0.weight" not in basic
    assert not any(key.startswith("fc.") for key in bottleneck)


def test_deep_stem_has_three_convolutions_and_128_channels():
    with torch.device("meta"):
        state = ResNet(50, stem="deep").state_dict()
    expected = {
        "conv1.0.weight": (64, 3, 3, 3),
        "conv1.1.weight": (64,),
        "conv1.3.weight": (64, 64, 3, 3),
        "conv1.4.running_var": (64,),
        "conv1.6.weight": (128, 64, 3, 3),
        "bn1.weight": (128,),
        "layer1.0.conv1.weight": (64, 128, 1, 1),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected
    stem_keys = {key for key in state if key.startswith("conv1.") and key.endswith("weight")}
    assert stem_keys == {f"conv1.{i}.weight" for i in (0, 1, 3, 4, 6)}


@pytest.mark.parametrize("depth", TORCHVISION)
@pytest.mark.parametrize("stem", ["plain", "deep"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_backbone_maps_have_the_promised_shapes_on_odd_sizes(depth, stem, output_stride):
    with torch.device("meta"):
        resnet = ResNet(depth, stem, output_stride)
        low, high = resnet(torch.empty(2, 3, 65, 47))
    assert low.shape == (2, resnet.low_channels, 17, 12)
    assert high.shape == (2, resnet.out_channels, -(-65 // output_stride), -(-47 // output_stride))


def test_stride_8_replaces_the_strides_of_the_last_two_stages_by_dilation():
    with torch.device("meta"):
        resnet = ResNet(18, output_stride=8)
    found = {
        name: (module.stride[0], module.dilation[0])
        for name, module in resnet.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name.startswith(("layer3", "layer4"))
    }
    assert found == {
        "layer3.0.conv1": (1, 1),
        "layer3.0.conv2": (1, 2),
        "layer3.0.downsample.0": (1, 1),
        "layer3.1.conv1": (1, 2),
        "layer3.1.conv2": (1, 2),
        "layer4.0.conv1": (1, 2),
        "layer4.0.conv2": (1, 4),
        "layer4.0.downsample.0": (1, 1),
        "layer4.1.conv1": (1, 4),
        "layer4.1.conv2": (1, 4),
    }


@pytest.mark.parametrize("depth", [18, 50])
def test_dilation_keeps_the_strided_network_at_its_pixels(depth):
    torch.manual_seed(0)
    coarse = ResNet(depth, output_stride=16).eval()
    fine = ResNet(depth, output_stride=8).eval()
    fine.load_state_dict(coarse.state_dict())
    images = torch.randn(1, 3, 80, 66)
    with torch.no_grad():
        expected, dense = coarse(images)[1], fine(images)[1]
    # Same products in another order: float32 rounding over 17 or 50 layers.
    torch.testing.assert_close(dense[:, :, ::2, ::2], expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_backbone_starts_with_kaiming_weights():
    torch.manual_seed(0)
    weight = ResNet(18).layer4[0].conv1.weight  # [512, 256, 3, 3]: variance 2 / (512 * 9), by its outputs
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"depth": 19}, "depth"), ({"stem": "wide"}, "stem"), ({"output_stride": 32}, "output_stride")],
)
def test_unknown_backbone_argument_is_named(arguments, named):
    with pytest.raises(InputError, match=named):
        ResNet(**({"depth": 18} | arguments))


def test_aspp_projects_the_concatenation_of_its_five_branches():
    torch.manual_seed(0)
    aspp = ASPP(12, (6, 12, 18), 8).eval()
    x = torch.randn(2, 12, 9, 7)
    with torch.no_grad():
        branches = [branch(x) for branch in aspp.branches] + [aspp.pooling(x).expand(-1, -1, 9, 7)]
        expected = F.relu(aspp.bn(aspp.project(torch.cat(branches, dim=1))))
        torch.testing.assert_close(aspp(x), expected)
    assert expected.std() > 0


@pytest.mark.parametrize(("output_stride", "rates"), [(16, [6, 12, 18]), (8, [12, 24, 36])])
def test_aspp_rates_double_at_stride_8(output_stride, rates):
    network = small_network(output_stride=output_stride)
    assert [branch[0].dilation[0] for branch in network.decoder.aspp.branches][1:] == rates


def test_image_pooling_trains_on_one_image_with_the_running_statistics():
    torch.manual_seed(0)
    pooling = ImagePooling(6, 4)
    pooling.bn.running_mean += 0.5
    one, two = torch.randn(1, 6, 5, 5), torch.randn(2, 6, 5, 5)
    trained = pooling(one)
    assert pooling.bn.num_batches_tracked == 0
    torch.testing.assert_close(trained, pooling.eval()(one))
    pooling.train()(two)
    assert pooling.bn.num_batches_tracked == 1
    assert not torch.allclose(pooling.bn.running_mean, torch.full((4,), 0.5))


@pytest.mark.parametrize(("width", "low"), [(256, 48), (128, 24), (64, 16), (32, 16)])
def test_low_level_projection_scales_with_the_width(width, low):
    with torch.device("meta"):
        network = small_network(width=width)
    assert network.decoder.low_level[0].out_channels == low
    assert network.decoder.out_channels == low + width


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(64, 64), (45, 33), (16, 31)])
def test_network_output_has_a_quarter_of_any_size(backbone, output_stride, size):
    with torch.device("meta"):
        network = SegmentationNetwork(
            backbone,
            output_stride=output_stride,
            num_classes=5,
            width=32,
            representation_dim=24,
            probability=True,
        )
        output = network(torch.empty(2, 3, *size))
    h, w = -(-size[0] // 4), -(-size[1] // 4)
    assert output.logits.shape == (2, 5, h, w)
    assert output.mu.shape == output.var.shape == (2, 24, h, w)


@pytest.mark.parametrize(("depth", "stem"), [(18, "plain"), (50, "deep")])
def test_a_narrow_backbone_has_every_width_in_proportion(depth: int, stem: str) -> None:
    whole, narrow = ResNet(depth, stem).state_dict(), ResNet(depth, stem, base_width=16).state_dict()
    assert whole.keys() == narrow.keys()
    for name, tensor in whole.items():
        shape = [
            size if size in (1, 3, 7) and place else size // 4 for place, size in enumerate(tensor.shape)
        ]
        assert list(narrow[name].shape) == shape, name
    low, high = ResNet(depth, stem, base_width=16)(torch.randn(2, 3, 64, 48))
    assert (low.shape[1], high.shape[1]) == ((16, 128) if depth == 18 else (64, 512))


def test_training_on_a_single_image_works():
    output = small_network()(torch.randn(1, 3, 45, 33))
    assert all(part.isfinite().all() for part in (output.logits, output.mu, output.var))


def test_every_parameter_receives_a_gradient():
    network = small_network()
    logits, mu, var, *_ = network(torch.randn(2, 3, 48, 40))
    weight = torch.randn(24, 1, 1)
    (logits.logsumexp(1).sum() + (mu * weight).square().sum() + (var * weight).sum()).backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_representations_can_be_skipped_or_left_out():
    images = torch.randn(2, 3, 32, 32)
    network = small_network().eval()
    full, short = network(images), network(images, representations=False)
    torch.testing.assert_close(short.logits, full.logits)
    assert full.mu is not None
    assert short.mu is None
    assert short.var is None
    without = small_network(representation_dim=None, probability=False)
    assert without(images).mu is None
    assert not any(name.startswith(("representation", "probability")) for name in without.state_dict())
    assert list(without.probability_parameters()) == []
    with pytest.raises(InputError, match="probability"):
        small_network(representation_dim=None)


def test_parameter_groups_are_a_partition():
    network = small_network()
    groups = [
        list(network.backbone_parameters()),
        list(network.head_parameters()),
        list(network.probability_parameters()),
    ]
    flat = [id(p) for group in groups for p in group]
    assert len(flat) == len(set(flat))
    assert set(flat) == {id(p) for p in network.parameters()}
    assert {id(p) for p in groups[0]} == {id(p) for p in network.backbone.parameters()}
    assert {id(p) for p in groups[2]} == {id(p) for p in network.probability.parameters()}


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_channels_last_survives_every_module(backbone):
    network = small_network(backbone).to(memory_format=torch.channels_last)
    broken = []

    def check(name):
        def hook(_module, _inputs, output):
            if isinstance(output, torch.Tensor) and not output.is_contiguous(
                memory_format=torch.channels_last
            ):
                broken.append(name)

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(check(name))
    network(torch.randn(2, 3, 45, 33).to(memory_format=torch.channels_last))
    assert broken == []


def test_autocast_gives_bfloat16_logits_and_mean_but_float32_variance():
    network = small_network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(torch.randn(2, 3, 32, 32))
    assert output.logits.dtype == output.mu.dtype == torch.bfloat16
    assert output.var.dtype == torch.float32


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_network_traces_without_a_graph_break(backbone):
    network = small_network(backbone)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(images).var, network(images).var)


def test_build_network_follows_the_configuration():
    model = ModelConfig(backbone="resnet34", stem="deep", output_stride=8, width=32, dim=12)
    network = build_network(model, 7, representation=True, probability=False)
    output = network(torch.randn(2, 3, 32, 32))
    assert output.logits.shape == (2, 7, 8, 8)
    assert output.mu.shape == (2, 12, 8, 8)
    assert output.var is None
    assert "backbone.conv1.6.weight" in network.state_dict()
    assert "backbone.layer3.5.conv1.weight" in network.state_dict()
    assert network.backbone(torch.randn(2, 3, 32, 32))[1].shape[2:] == (4, 4)


@pytest.mark.parametrize(("height", "width", "dilation"), [(3, 5, 1), (4, 4, 2), (2, 3, 1)])
def test_a_convolution_on_few_pixels_is_the_same_sum(height, width, dilation, monkeypatch):
    layer = Conv3x3(32, 48, dilation=dilation).double().to(memory_format=torch.channels_last)
    products = []
    as_product = Conv3x3._as_product
    monkeypatch.setattr(Conv3x3, "_as_product", lambda *args: products.append(1) or as_product(*args))
    image = torch.randn(2, 32, height, width, dtype=torch.float64).to(memory_format=torch.channels_last)
    ways = []
    for function in (layer, lambda x: F.conv2d(x, layer.weight, None, 1, dilation, dilation)):
        x = image.clone().requires_grad_()
        y = function(x)
        layer.weight.grad = None
        y.square().sum().backward()
        ways.append((y.detach(), x.grad, layer.weight.grad))
    assert products == [1]
    assert ways[0][0].is_contiguous(memory_format=torch.channels_last)
    for own, expected in zip(*ways, strict=True):
        torch.testing.assert_close(own, expected)
    layer(torch.randn(5, 32, height, width, dtype=torch.float64))
    assert products == [1] * (1 + (5 * height * width <= 32))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("height", "width", "dilation"), [(2, 3, 6), (4, 4, 4), (3, 9, 4), (9, 3, 4), (1, 1, 1)]
)
def test_a_kernel_without_the_rows_and_columns_on_padding_is_the_same_sum(height, width, dilation, stride):
    layer = Conv3x3(5, 7, stride, dilation).double().to(memory_format=torch.channels_last)
    image = torch.randn(2, 5, height, width, dtype=torch.float64).to(memory_format=torch.channels_last)
    ways = []
    for function in (layer, lambda x: F.conv2d(x, layer.weight, None, stride, dilation, dilation)):
        x = image.clone().requires_grad_()
        y = function(x)
        layer.weight.grad = None
        y.square().sum().backward()
        ways.append((y.detach(), x.grad, layer.weight.grad))
    for own, expected in zip(*ways, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_a_program_exported_from_a_small_image_holds_for_every_size(backbone: str) -> None:
    network = small_network(backbone).eval()
    sizes = {2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(network, (torch.randn(1, 3, 64, 64),), dynamic_shapes={"x": sizes}).module()
    for height, width in ((64, 64), (32, 48), (101, 200)):
        image = torch.randn(1, 3, height, width)
        torch.testing.assert_close(program(image).logits, network(image).logits)
        torch.testing.assert_close(program(image).var, network(image).var)
