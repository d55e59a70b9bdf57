"""Pseudo-labels: argmax and confidence of the upsampled softmax."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from prcl_fast.ops import pseudo_label
from support.backends import run_everywhere

place = run_everywhere("pseudo_label")


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("size", [(33, 41), (5, 6), (3, 9), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_and_confidence_equal_equation_1(dtype: torch.dtype, size: tuple[int, int]) -> None:
    x = logits(3, 7, 5, 6, dtype=dtype)
    label, confidence = pseudo_label(x, size)
    full = F.interpolate(x.double(), size, mode="bilinear", align_corners=True)
    probability = full.softmax(1)
    highest, argmax = probability.max(1)
    assert label.dtype == torch.uint8
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence.double(), highest, rtol=1e-5, atol=0)
    top = full.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4  # below it, float32 may round either way
    assert clear.float().mean() > 0.99
    assert torch.equal(label[clear].long(), argmax[clear])


@pytest.mark.parametrize("classes", [1, 2, 3, 21, 40, 200])
def test_any_number_of_classes_and_any_strides(classes: int) -> None:
    x = logits(2, classes, 4, 7)
    strided = x.contiguous(memory_format=torch.channels_last)
    label, confidence = pseudo_label(x, (11, 18))
    highest, argmax = (
        F.interpolate(x.double(), (11, 18), mode="bilinear", align_corners=True).softmax(1).max(1)
    )
    torch.testing.assert_close(confidence.double(), highest, rtol=1e-5, atol=0)
    assert (label.long() == argmax).float().mean() > 0.99
    strided_label, strided_confidence = pseudo_label(strided, (11, 18))
    assert (strided_label == label).float().mean() > 0.99
    torch.testing.assert_close(strided_confidence, confidence, rtol=1e-5, atol=0)


def test_one_class_and_equal_logits() -> None:
    label, confidence = pseudo_label(torch.zeros(1, 1, 2, 2), (4, 4))
    assert (label == 0).all()
    assert (confidence == 1).all()
    label, confidence = pseudo_label(torch.zeros(1, 4, 2, 2), (4, 4))
    assert (label == 0).all()
    torch.testing.assert_close(confidence, torch.full((1, 4, 4), 0.25))


def test_256_classes_fit_into_uint8_and_257_are_refused() -> None:
    x = torch.zeros(1, 256, 2, 2)
    x[:, 255] = 9
    assert (pseudo_label(x, (3, 3))[0] == 255).all()
    with pytest.raises(ValueError, match="between 1 and 256 classes"):
        pseudo_label(torch.zeros(1, 257, 2, 2), (3, 3))


def test_more_pixels_than_an_index_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size must hold between 1 and 2\^31 - 1 pixels"):
        pseudo_label(torch.zeros(1, 2, 4, 4, device="meta"), (46341, 46341))


def test_huge_logits_stay_finite_and_carry_no_gradient() -> None:
    _, confidence = pseudo_label((1e4 * logits(2, 5, 4, 4)).requires_grad_(), (9, 9))
    assert torch.isfinite(confidence).all()
    assert not confidence.requires_grad


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="logits must have shape"):
        pseudo_label(torch.zeros(3, 4, 4), (8, 8))
    with pytest.raises(TypeError, match="logits must be"):
        pseudo_label(torch.zeros(1, 3, 4, 4, dtype=torch.int64), (8, 8))
    with pytest.raises(ValueError, match="size must be at least 1"):
        pseudo_label(torch.zeros(1, 3, 4, 4), (0, 8))
    with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
        pseudo_label(torch.zeros(1, 3, 4, 4), (8,))


def test_opcheck_and_compile() -> None:
    x = logits(2, 5, 4, 4)
    torch.library.opcheck(torch.ops.prcl_fast.pseudo_label.default, (x, 9, 7))
    compiled = torch.compile(pseudo_label, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, (9, 7)), pseudo_label(x, (9, 7)), strict=True):
        assert torch.equal(got, expected)
