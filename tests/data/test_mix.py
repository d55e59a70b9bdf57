"""Mixing: image, pseudo-label and confidence of a pixel come unchanged from the same image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prcl_fast.config import AugmentConfig
from prcl_fast.data.draws import STRONG_NUMBERS, StrongDraws, strong_draws
from prcl_fast.data.mix import mix
from prcl_fast.data.source import IGNORE

B, H, W = 5, 24, 36
SEEDS = range(6)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random values, with blocks of labels from 7 classes and 255, like pseudo-labels with padding."""
    rng = np.random.default_rng(seed)
    blocks = torch.from_numpy(rng.choice([0, 1, 2, 5, 9, 17, 200, IGNORE], (B, 4, 6)).astype(np.uint8))
    label = blocks.repeat_interleave(6, 1).repeat_interleave(6, 2)
    confidence = torch.from_numpy(rng.random((B, H, W), dtype=np.float32))
    return torch.from_numpy(rng.random((B, 3, H, W), dtype=np.float32)), label, confidence


def draws(seed: int) -> StrongDraws:
    rng = np.random.default_rng(100 + seed)
    return strong_draws(rng.random((B, STRONG_NUMBERS)), (H, W), AugmentConfig())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["cutmix", "classmix"])
def test_a_pixel_is_its_own_or_its_partners_in_all_three_at_once(kind, seed):
    (image, label, confidence), drawn = batch(seed), draws(seed)
    mixed = mix(image, label, confidence, drawn, kind)
    # All confidences differ and thus identify the origin of a pixel.
    pasted = mixed[2] == confidence[drawn.partner]
    assert torch.equal(mixed[2], torch.where(pasted, confidence[drawn.partner], confidence))
    assert torch.equal(mixed[1], torch.where(pasted, label[drawn.partner], label))
    assert torch.equal(mixed[0], torch.where(pasted[:, None], image[drawn.partner], image))
    assert pasted.flatten(1).any(dim=1).all()
    assert not pasted.all()


@pytest.mark.parametrize("seed", SEEDS)
def test_cutmix_pastes_the_drawn_box(seed):
    (image, label, confidence), drawn = batch(seed), draws(seed)
    mixed = mix(image, label, confidence, drawn, "cutmix")[0]
    for index, (top, bottom, left, right) in enumerate(drawn.box.tolist()):
        expected = image[index].clone()
        expected[:, top:bottom, left:right] = image[drawn.partner[index], :, top:bottom, left:right]
        assert torch.equal(mixed[index], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_classmix_pastes_whole_classes_half_of_them_rounded_up(seed):
    (image, label, confidence), drawn = batch(seed), draws(seed)
    mixed = mix(image, label, confidence, drawn, "classmix")
    pasted = mixed[2] == confidence[drawn.partner]
    for index in range(B):
        theirs = label[drawn.partner[index]]
        present = sorted(set(theirs.unique().tolist()) - {IGNORE})
        taken = set(theirs[pasted[index]].unique().tolist())
        assert len(taken) == (len(present) + 1) // 2
        assert torch.equal(pasted[index], torch.isin(theirs, torch.tensor(sorted(taken), dtype=torch.uint8)))
        by_score = sorted(present, key=lambda class_id: drawn.class_score[index, class_id])
        assert taken == set(by_score[: len(taken)])


def test_classmix_never_pastes_ignored_pixels():
    image, label, confidence = batch(0)
    label.fill_(IGNORE)
    mixed = mix(image, label, confidence, draws(0), "classmix")
    assert torch.equal(mixed[0], image)
    assert torch.equal(mixed[2], confidence)


def test_classmix_takes_every_class_at_some_time():
    (image, label, confidence), taken = batch(0), set()
    for seed in range(40):
        drawn = draws(seed)
        pasted = mix(image, label, confidence, drawn, "classmix")[2] == confidence[drawn.partner]
        taken |= set(label[drawn.partner][pasted].unique().tolist())
    assert taken == set(label.unique().tolist()) - {IGNORE}


@pytest.mark.parametrize("seed", SEEDS)
def test_cutout_erases_the_drawn_box(seed):
    (image, label, confidence), drawn = batch(seed), draws(seed)
    erased = mix(image, label, confidence, drawn, "cutout")
    for index, (top, bottom, left, right) in enumerate(drawn.box.tolist()):
        box = torch.zeros(H, W, dtype=torch.bool)
        box[top:bottom, left:right] = True
        color = image[index].mean(dim=(1, 2))
        torch.testing.assert_close(erased[0][index][:, box], color[:, None].expand(3, int(box.sum())))
        assert torch.equal(erased[0][index][:, ~box], image[index][:, ~box])
        assert (erased[1][index][box] == IGNORE).all()
        assert torch.equal(erased[1][index][~box], label[index][~box])
        assert not erased[2][index][box].any()
        assert torch.equal(erased[2][index][~box], confidence[index][~box])


def test_none_changes_nothing():
    image, label, confidence = batch(0)
    mixed = mix(image, label, confidence, draws(0), "none")
    assert all(torch.equal(a, b) for a, b in zip(mixed, (image, label, confidence), strict=True))


@pytest.mark.parametrize("kind", ["none", "cutout", "cutmix", "classmix"])
def test_inputs_stay_untouched_and_types_are_kept(kind):
    image, label, confidence = batch(0)
    copies = image.clone(), label.clone(), confidence.clone()
    mixed = mix(image, label, confidence, draws(0), kind)
    assert all(torch.equal(a, b) for a, b in zip(copies, (image, label, confidence), strict=True))
    assert [value.dtype for value in mixed] == [torch.float32, torch.uint8, torch.float32]
