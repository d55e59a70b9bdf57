"""Augmentation: labels stay exact, image and label move together, no padding enters the image."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prcl_fast.config import AugmentConfig
from prcl_fast.data.augment import normalize, strong_augment, weak_augment
from prcl_fast.data.draws import (
    BOX_AREA,
    STRONG_NUMBERS,
    WEAK_NUMBERS,
    StrongDraws,
    WeakDraws,
    strong_draws,
    weak_draws,
)
from prcl_fast.data.random_streams import RandomStream, generator
from prcl_fast.data.source import IGNORE

FILL = [0.485, 0.456, 0.406]
OFF = AugmentConfig(scale=[1.0, 1.0], flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)


def geometry(scaled: tuple[int, int], start: tuple[int, int], flip: bool = False) -> WeakDraws:
    return WeakDraws(torch.tensor([scaled]), torch.tensor([start]), torch.tensor([flip]))


def random_pixels(count: int, height: int, width: int) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (count, height, width, 4), dtype=np.uint8)
    return torch.from_numpy(values)


def augmented(pixels: torch.Tensor, draws: WeakDraws, crop: tuple[int, int]):
    sizes = torch.tensor([pixels.shape[1:3]] * len(pixels))
    image, label, inside = weak_augment(pixels, sizes, draws, crop, FILL)
    return (image * 255).permute(0, 2, 3, 1), label, inside


def random_strong(count: int, augment: AugmentConfig, size: tuple[int, int] = (24, 32)) -> StrongDraws:
    uniform = np.random.default_rng(1).random((count, STRONG_NUMBERS))
    return strong_draws(uniform, size, augment)


# Weak augmentation


def test_no_scaling_and_a_full_crop_return_the_native_values_exactly():
    pixels = random_pixels(1, 20, 30)
    image, label, inside = augmented(pixels, geometry((20, 30), (0, 0)), (20, 30))
    assert torch.equal(image.round().byte(), pixels[..., :3])
    assert (image - image.round()).abs().max() < 1e-4
    assert torch.equal(label, pixels[..., 3])
    assert inside.all()


def test_a_flip_mirrors_exactly():
    pixels = random_pixels(1, 20, 30)
    image, label, _ = augmented(pixels, geometry((20, 30), (0, 0), flip=True), (20, 30))
    assert torch.equal(image.round().byte(), pixels[..., :3].flip(2))
    assert torch.equal(label, pixels[..., 3].flip(2))


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_without_scaling_is_a_slice(flip):
    pixels = random_pixels(1, 20, 30)
    image, label, inside = augmented(pixels, geometry((20, 30), (5, 7), flip), (8, 16))
    window = pixels[:, 5:13, 7:23]
    window = window.flip(2) if flip else window
    assert torch.equal(image.round().byte(), window[..., :3])
    assert torch.equal(label, window[..., 3])
    assert inside.all()


def test_outside_the_image_is_fill_255_and_not_inside():
    pixels = random_pixels(1, 10, 12)
    image, label, inside = augmented(pixels, geometry((10, 12), (-3, -4)), (20, 24))
    expected = torch.zeros(1, 20, 24, dtype=torch.bool)
    expected[:, 3:13, 4:16] = True
    assert torch.equal(inside, expected)
    assert (label[~inside] == IGNORE).all()
    assert torch.equal(label[:, 3:13, 4:16], pixels[..., 3])
    torch.testing.assert_close(image[~inside] / 255, torch.tensor(FILL).expand(int((~inside).sum()), 3))
    assert torch.equal(image[:, 3:13, 4:16].round().byte(), pixels[..., :3])


@pytest.mark.parametrize("scaled", [(10, 15), (20, 30), (30, 45), (37, 51), (61, 97), (13, 11)])
def test_scaling_equals_bilinear_images_and_nearest_exact_labels(scaled):
    pixels = random_pixels(1, 20, 30)
    image, label, _ = augmented(pixels, geometry(scaled, (0, 0)), scaled)
    planes = pixels.permute(0, 3, 1, 2)
    bilinear = F.interpolate(planes[:, :3].float(), scaled, mode="bilinear", align_corners=False)
    # In fractions, since pixel centres may fall on borders between pixels.
    rows, columns = (
        [math.floor(Fraction(2 * k + 1, 2) * native / size) for k in range(size)]
        for native, size in zip((20, 30), scaled, strict=True)
    )
    nearest = pixels[:, rows][:, :, columns, 3]
    torch.testing.assert_close(image.permute(0, 3, 1, 2), bilinear, atol=1e-3, rtol=0)
    assert torch.equal(label, nearest)


def test_a_crop_of_a_scaled_image_is_a_slice_of_it():
    pixels = random_pixels(1, 20, 30)
    whole, whole_label, _ = augmented(pixels, geometry((33, 50), (0, 0)), (33, 50))
    part, part_label, _ = augmented(pixels, geometry((33, 50), (4, 9)), (16, 24))
    assert torch.equal(part, whole[:, 4:20, 9:33])
    assert torch.equal(part_label, whole_label[:, 4:20, 9:33])


def test_padding_of_smaller_images_in_a_batch_never_enters():
    sizes = np.array([[20, 30], [11, 13]])
    pixels = torch.full((2, 20, 30, 4), 250, dtype=torch.uint8)
    pixels[0] = 10
    pixels[1, :11, :13] = 10
    for seed in range(20):
        draws = weak_draws(
            np.random.default_rng(seed).random((2, WEAK_NUMBERS)), sizes, (24, 24), AugmentConfig()
        )
        image, label, inside = weak_augment(pixels, torch.from_numpy(sizes), draws, (24, 24), FILL)
        values = (image * 255).permute(0, 2, 3, 1)[inside]
        assert values.min() > 9.99
        assert values.max() < 10.01
        assert set(label[inside].tolist()) == {10}


def test_image_and_label_move_together_under_random_transforms():
    # The label is a coarse map whose id is also the image's red value, in steps of 20 grey levels.
    coarse = torch.from_numpy(np.random.default_rng(3).integers(0, 12, (6, 5, 6), dtype=np.uint8))
    label = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    pixels = torch.stack([label * 20, label * 0, label * 0, label], dim=-1).contiguous()
    sizes = np.tile([80, 96], (6, 1))
    for seed in range(10):
        uniform = np.random.default_rng(seed).random((6, WEAK_NUMBERS))
        draws = weak_draws(uniform, sizes, (64, 72), AugmentConfig())
        image, moved, inside = weak_augment(pixels, torch.from_numpy(sizes), draws, (64, 72), FILL)
        assert torch.equal(moved == IGNORE, ~inside)
        red = image[:, 0] * 255 / 20
        # Interpolation mixes no ids at pixels whose neighbourhood has a single label.
        planes = moved.float()[:, None]
        constant = F.pad(F.max_pool2d(planes, 5, 1) == -F.max_pool2d(-planes, 5, 1), (2, 2, 2, 2))[:, 0]
        constant &= inside
        assert constant.float().mean() > 0.1
        assert (red[constant] - moved[constant]).abs().max() < 0.01


def test_images_are_channels_last_float_in_the_unit_range():
    pixels = random_pixels(2, 20, 30)
    draws = weak_draws(
        np.random.default_rng(0).random((2, 4)), np.tile([20, 30], (2, 1)), (16, 16), AugmentConfig()
    )
    image, label, _ = weak_augment(pixels, torch.tensor([[20, 30]] * 2), draws, (16, 16), FILL)
    assert image.shape == (2, 3, 16, 16)
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image.min() >= 0
    assert image.max() <= 1
    assert label.dtype == torch.uint8


def test_crops_reach_every_place_and_never_leave_a_large_image():
    uniform = np.random.default_rng(0).random((4000, WEAK_NUMBERS))
    draws = weak_draws(uniform, np.tile([20, 30], (4000, 1)), (18, 24), OFF)
    assert sorted(set(draws.start[:, 0].tolist())) == [0, 1, 2]
    assert sorted(set(draws.start[:, 1].tolist())) == [0, 1, 2, 3, 4, 5, 6]


def test_a_small_image_is_placed_anywhere_in_the_crop_but_wholly_inside():
    uniform = np.random.default_rng(0).random((4000, WEAK_NUMBERS))
    draws = weak_draws(uniform, np.tile([20, 30], (4000, 1)), (22, 24), OFF)
    assert sorted(set(draws.start[:, 0].tolist())) == [-2, -1, 0]


def test_scale_and_flip_follow_their_configuration():
    uniform = np.random.default_rng(0).random((4000, WEAK_NUMBERS))
    draws = weak_draws(
        uniform, np.tile([100, 200], (4000, 1)), (64, 64), AugmentConfig(scale=[0.5, 1.5], flip=0.25)
    )
    scale = draws.scaled.double() / torch.tensor([100, 200])
    assert 0.5 <= scale.min() < 0.52
    assert 1.48 < scale.max() <= 1.5
    assert (scale[:, 0] - scale[:, 1]).abs().max() <= 0.5 / 100 + 0.5 / 200
    assert abs(draws.flip.double().mean() - 0.25) < 0.03


# Strong augmentation


def test_switched_off_it_changes_nothing():
    image = torch.rand(4, 3, 24, 32)
    assert torch.equal(strong_augment(image, random_strong(4, OFF)), image)


def test_images_whose_draws_say_off_stay_exact_beside_others():
    image = torch.rand(40, 3, 24, 32)
    augment = AugmentConfig(jitter=0.5, grayscale=0.3, blur=0.5)
    changed = (strong_augment(image, random_strong(40, augment)) != image).flatten(1).any(dim=1)
    uniform = np.random.default_rng(1).random((40, STRONG_NUMBERS))
    chosen = (uniform[:, 0] < 0.5) | (uniform[:, 5] < 0.3) | (uniform[:, 6] < 0.5)
    assert 0 < chosen.sum() < 40
    assert changed.tolist() == chosen.tolist()


def test_brightness_contrast_and_saturation_compose_as_one_after_the_other():
    augment = AugmentConfig(jitter=1.0, hue=0.0, grayscale=0.0, blur=0.0)
    uniform = np.random.default_rng(2).random((5, STRONG_NUMBERS))
    # Values in the middle of the range, where no step clamps.
    image = 0.4 + 0.1 * torch.rand(5, 3, 16, 16, dtype=torch.float64)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[None, :, None, None]
    factors = 1 + 0.5 * (2 * torch.from_numpy(uniform[:, 1:4]) - 1)
    brightness, contrast, saturation = factors.T[..., None, None, None]
    expected = image * brightness
    mean_grey = (expected * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    expected = contrast * expected + (1 - contrast) * mean_grey
    expected = saturation * expected + (1 - saturation) * (expected * weights).sum(1, keepdim=True)
    actual = strong_augment(image.float(), strong_draws(uniform, (16, 16), augment))
    torch.testing.assert_close(actual, expected.clamp(0, 1).float(), atol=1e-5, rtol=0)


def test_hue_turns_the_chroma_plane_and_keeps_luma_and_greys():
    augment = AugmentConfig(
        jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.25, grayscale=0.0, blur=0.0
    )
    uniform = np.random.default_rng(5).random((6, STRONG_NUMBERS))
    drawn = strong_draws(uniform, (8, 8), augment)
    grey = torch.rand(6, 1, 8, 8).expand(6, 3, 8, 8)
    torch.testing.assert_close(strong_augment(grey, drawn), grey.contiguous(), atol=1e-5, rtol=0)
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    image = 0.45 + 0.1 * torch.rand(6, 3, 8, 8)
    before = torch.einsum("ij,bjhw->ibhw", yiq, image)
    after = torch.einsum("ij,bjhw->ibhw", yiq, strong_augment(image, drawn))
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=0)
    turn = torch.from_numpy(2 * np.pi * 0.25 * (2 * uniform[:, 4] - 1))[:, None, None]
    expected = torch.complex(before[1], before[2]) * torch.exp(1j * turn)
    torch.testing.assert_close(torch.complex(after[1], after[2]), expected.cfloat(), atol=1e-5, rtol=0)


def test_random_grey_gives_three_equal_channels():
    augment = AugmentConfig(jitter=0.0, grayscale=1.0, blur=0.0)
    grey = strong_augment(torch.rand(3, 3, 8, 8), random_strong(3, augment, (8, 8)))
    torch.testing.assert_close(grey[:, 0], grey[:, 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(grey[:, 0], grey[:, 2], atol=1e-6, rtol=0)


def test_blur_is_a_gaussian_of_the_drawn_sigma():
    augment = AugmentConfig(jitter=0.0, grayscale=0.0, blur=1.0, blur_sigma=[0.5, 2.0])
    uniform = np.random.default_rng(4).random((4, STRONG_NUMBERS))
    impulse = torch.zeros(4, 3, 41, 41)
    impulse[:, :, 20, 20] = 1
    blurred = strong_augment(impulse, strong_draws(uniform, (41, 41), augment))
    offset = torch.arange(-20, 21, dtype=torch.float64)
    for index in range(4):
        sigma = 0.5 + 1.5 * uniform[index, 7]
        gaussian = torch.exp(-(offset**2) / (2 * sigma**2))
        gaussian /= gaussian.sum()
        expected = gaussian[:, None] * gaussian
        # Kernels are cut off at three times the largest sigma, which omits at most 0.3% of the mass.
        torch.testing.assert_close(blurred[index, 0].double(), expected, atol=1e-3, rtol=0)
        assert abs(blurred[index, 0].sum() - 1) < 1e-5


def test_blur_keeps_a_constant_image_up_to_its_edges():
    augment = AugmentConfig(jitter=0.0, grayscale=0.0, blur=1.0)
    image = torch.full((2, 3, 9, 30), 0.37)
    torch.testing.assert_close(strong_augment(image, random_strong(2, augment, (9, 30))), image)


def test_strong_images_stay_in_the_unit_range():
    image = torch.rand(16, 3, 24, 32).contiguous(memory_format=torch.channels_last)
    augment = AugmentConfig(jitter=1.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5)
    strong = strong_augment(image, random_strong(16, augment))
    assert strong.isfinite().all()
    assert strong.min() >= 0
    assert strong.max() <= 1 + 1e-6


def test_boxes_lie_inside_and_have_the_wanted_area():
    uniform = np.random.default_rng(6).random((2000, STRONG_NUMBERS))
    uniform[:500, 10:12] = 0.0
    uniform[-500:, 10:12] = 1 - 1e-9
    top, bottom, left, right = strong_draws(uniform, (200, 300), AugmentConfig()).box.T
    assert top.min() == 0
    assert left.min() == 0
    assert bottom.max() == 200
    assert right.max() == 300
    assert not top[:500].any()
    assert not left[:500].any()
    assert (bottom[-500:] == 200).all()
    assert (right[-500:] == 300).all()
    area = (bottom - top) * (right - left) / (200 * 300)
    assert BOX_AREA[0] - 0.01 < area.min()
    assert area.max() < BOX_AREA[1] + 0.01
    assert area.max() - area.min() > 0.2


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_partner_is_another_image_and_each_is_a_partner_once(count):
    partner = strong_draws(np.zeros((count, STRONG_NUMBERS)), (8, 8), AugmentConfig()).partner
    assert sorted(partner.tolist()) == list(range(count))
    assert (partner != torch.arange(count)).all()


def test_partners_stay_together_when_a_batch_is_shared_out():
    def partner(count):
        return strong_draws(np.zeros((count, STRONG_NUMBERS)), (8, 8), AugmentConfig()).partner

    assert torch.equal(partner(8), torch.cat([partner(4), 4 + partner(4)]))
    assert torch.equal(partner(8), torch.cat([2 * part + partner(2) for part in range(4)]))


# Random numbers and normalisation


def test_streams_of_different_seeds_purposes_steps_and_ranks_differ():
    first = generator(0, RandomStream.STRONG).random(4)
    others = [
        generator(1, RandomStream.STRONG),
        generator(0, RandomStream.RANK),
        generator(0, RandomStream.STRONG, step=1),
        generator(0, RandomStream.STRONG, index=1),
    ]
    assert len({first.tobytes(), *(other.random(4).tobytes() for other in others)}) == 5
    assert np.array_equal(first, generator(0, RandomStream.STRONG).random(4))


def test_normalize_gives_zero_at_the_mean_and_keeps_channels_last():
    image = torch.rand(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    std = [0.229, 0.224, 0.225]
    expected = (image - torch.tensor(FILL)[:, None, None]) / torch.tensor(std)[:, None, None]
    normalized = normalize(image, FILL, std)
    torch.testing.assert_close(normalized, expected)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    fill = torch.tensor(FILL)[None, :, None, None].expand(1, 3, 2, 2)
    assert not normalize(fill, FILL, std).any()
