"""The probability head against recorded values, and its numerical edges."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from prcl_fast.models.heads import ProbabilityHead, RepresentationHead, SegmentationHead
from support.paths import GOLDEN


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key.startswith("head_")}


@pytest.fixture
def recorded_head(golden) -> ProbabilityHead:
    head = ProbabilityHead(24, 16)
    with torch.no_grad():
        head.fc1.copy_(golden["head_fc1"])
        head.fc2.copy_(golden["head_fc2"])
        head.gamma.copy_(golden["head_gamma"])
        head.beta.copy_(golden["head_beta"])
        head.bn1.weight.copy_(golden["head_bn1_weight"])
        head.bn1.bias.copy_(golden["head_bn1_bias"])
    return head


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_probability_head_gives_the_recorded_variances(golden, recorded_head, memory_format):
    var = recorded_head(golden["head_x"].contiguous(memory_format=memory_format))
    torch.testing.assert_close(var, golden["head_y_train"], rtol=0, atol=1e-6)


def test_probability_head_ignores_the_length_of_its_weight_rows(golden, recorded_head):
    with torch.no_grad():
        recorded_head.fc1 *= torch.linspace(0.5, 30, 16)[:, None]
        recorded_head.fc2 *= torch.linspace(20, 0.1, 16)[:, None]
    # Scaling the rows rounds them again: a few units in the last place of float32.
    torch.testing.assert_close(recorded_head(golden["head_x"]), golden["head_y_train"], rtol=0, atol=2e-6)


def test_variance_is_the_sigmoid_of_the_floored_logarithm():
    head = ProbabilityHead(4, 3).eval()
    x = torch.randn(2, 4, 5, 5)
    for beta in (-30.0, -14.0, -3.0, 0.0, 3.0, 12.0):
        with torch.no_grad():
            head.gamma.zero_()
            head.beta.fill_(beta)
        odds = np.exp(np.float64(beta)) + 1e-6
        expected = torch.full((2, 3, 5, 5), odds / (1 + odds))
        # 2e-6 relative: the logarithm of the floor, -13.8, is rounded to 1e-6 before it is exponentiated.
        torch.testing.assert_close(head(x), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("beta", [-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])
def test_extreme_logits_keep_variance_and_gradients_finite(beta):
    head = ProbabilityHead(4, 3)
    with torch.no_grad():
        head.beta.fill_(beta)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    var = head(x)
    var.sum().backward()
    # The floor 1e-6 / (1 + 1e-6) rounds to just below 1e-6.
    assert var.min() > 0.99e-6
    assert var.max() <= 1
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_variance_is_float32_and_close_under_autocast(golden, recorded_head):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        var = recorded_head(golden["head_x"])
    assert var.dtype == torch.float32
    # bfloat16 keeps 8 bits in the two products of 24 and 16 terms.
    torch.testing.assert_close(var, golden["head_y_train"], rtol=0, atol=0.03)


@pytest.mark.parametrize("training", [True, False])
def test_probability_head_compiles_to_one_graph(golden, recorded_head, training):
    recorded_head.train(training)
    eager, compiled = copy.deepcopy(recorded_head), recorded_head
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    results = []
    for head, function in ((eager, eager), (compiled, call)):
        var = function(golden["head_x"])
        var.square().sum().backward()
        results.append([var, *head.state_dict().values(), *(p.grad for p in head.parameters())])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)


def test_probability_head_counts_its_batches(golden, recorded_head):
    for _ in range(3):
        recorded_head(golden["head_x"])
    recorded_head.eval()(golden["head_x"])
    assert recorded_head.bn2.num_batches_tracked == 3


def test_probability_head_uses_its_running_statistics_in_evaluation(golden, recorded_head):
    for _ in range(200):
        recorded_head(golden["head_x"])
    # Running variances are the unbiased ones: n / (n - 1) with n = 126 pixels, so 0.4% on the logit.
    torch.testing.assert_close(
        recorded_head.eval()(golden["head_x"]), golden["head_y_train"], rtol=0, atol=0.01
    )


def test_second_normalisation_has_no_affine_part():
    state = ProbabilityHead(24, 16).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if not key.startswith("bn1")} == {
        "fc1": (16, 24),
        "fc2": (16, 16),
        "gamma": (1,),
        "beta": (1,),
        "bn2.running_mean": (16,),
        "bn2.running_var": (16,),
        "bn2.num_batches_tracked": (),
    }


@pytest.mark.parametrize("head", [SegmentationHead, RepresentationHead])
def test_convolutional_heads_see_three_by_three_pixels(head):
    torch.manual_seed(0)
    network = head(6, 8, 5).eval()
    x = torch.randn(1, 6, 7, 9)
    y = network(x)
    assert y.shape == (1, 5, 7, 9)
    x[:, :, 3, 4] += 1
    changed = (network(x) - y).abs().sum((0, 1)) > 0
    rows, columns = changed.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 4, 3, 5)
