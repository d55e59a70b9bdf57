"""The candidates of `bench step`: the same work in each, and augmentation with Pillow."""

from __future__ import annotations

import contextlib
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.ops.eager import random_anchors, random_negatives
from bench.step.data import candidate_config
from bench.step.plain import PlainTraining
from bench.step.published import PublishedTraining
from bench.step.published_pil import classmix, geometric, photometric, to_picture, to_tensor
from bench.step.setup import LOSSES
from bench.step.worker import CANDIDATES, OurTraining
from prcl_fast.config import Config, override_config, parse_config
from prcl_fast.data.source import IGNORE
from prcl_fast.ops import use_backend
from support.tiny import tiny_tree

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Images come as they are, and each of the few images is in each batch.
IDENTITY = (
    "data.augment.scale=[1.0, 1.0]",
    "data.augment.flip=0",
    "data.synthetic.labeled=2",
    "data.synthetic.unlabeled=2",
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The tiny run with the settings common to all candidates of the benchmark."""
    tree = tiny_tree(tmp_path / "run")
    tree["method"]["prototype"] = "local"
    tree["data"]["scan"] = False
    return parse_config(tree, "test")


@pytest.mark.parametrize("name", ["published", "eager", "ours"])
def test_every_candidate_trains(config: Config, name: str) -> None:
    kind, overrides = CANDIDATES[name]
    with contextlib.closing(kind(candidate_config(config, name, overrides))) as training:
        before = [parameter.detach().clone() for parameter in training.student.parameters()]
        for _ in range(2):
            losses = {key: float(value) for key, value in training.step().items()}
            assert set(LOSSES) <= losses.keys()
            assert all(math.isfinite(value) for value in losses.values())
            assert losses["loss_supervised"] > 0
            assert losses["loss_contrast"] > 0
        for old, new in zip(before, training.student.parameters(), strict=True):
            assert not torch.equal(old, new)


@pytest.mark.parametrize("kind", [PublishedTraining, PlainTraining])
def test_weights_and_parameter_groups_are_ours_and_the_teacher_follows(config: Config, kind: Any) -> None:
    ours, other = OurTraining(candidate_config(config, "ours", ())), kind(config)
    with contextlib.closing(ours), contextlib.closing(other):
        expected = ours.trainer.method.student.state_dict()
        found = other.student.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)
        ours_groups = [len(list(group["params"])) for group in ours.trainer.method.parameter_groups()]
        groups = other.optimizer.param_groups
        assert [len(group["params"]) for group in groups] == ours_groups
        optim = config.optim
        assert [group["base_lr"] for group in groups] == [optim.lr, optim.lr, config.probability_lr]

        other.step()
        before = {name: value.clone() for name, value in other.teacher.state_dict().items()}
        student = other.student.state_dict()
        assert all(torch.equal(before[name], student[name]) for name in before)
        other.step()
        student, teacher = other.student.state_dict(), other.teacher.state_dict()
        for name, value in teacher.items():
            half = (before[name] + student[name]) / 2 if value.is_floating_point() else student[name]
            torch.testing.assert_close(value, half)


def test_published_has_our_supervised_loss_on_the_same_images(config: Config) -> None:
    config = override_config(config, [*IDENTITY, "method.forward=separate"])
    ours, published = OurTraining(candidate_config(config, "ours", ())), PublishedTraining(config)
    with contextlib.closing(ours), contextlib.closing(published):
        expected, found = ours.step(), published.step()
    assert found["loss_supervised"] == pytest.approx(float(expected["loss_supervised"]), rel=1e-4)


def test_published_passes_the_unlabeled_images_through_unchanged_without_augmentation(config: Config) -> None:
    off = ("data.augment.jitter=0", "data.augment.grayscale=0", "data.augment.blur=0")
    published = PublishedTraining(override_config(config, [*IDENTITY, *off]))
    with contextlib.closing(published):
        image, _ = next(published.unlabeled)
        label = torch.randint(0, 6, (2, 64, 64))
        confidence = torch.rand(2, 64, 64)
        for strong in (False, True):
            found = published._through_pil(image, label, confidence, scale=(1.0, 1.0), strong=strong)
            for value, expected in zip(found, (image, label, confidence), strict=True):
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_eager_has_our_losses_on_the_same_batch_with_the_same_draws(config: Config) -> None:
    config = override_config(config, ["method.delta_u=0.2"])
    ours, eager = OurTraining(candidate_config(config, "ours", ())), PlainTraining(config)
    with contextlib.closing(ours), contextlib.closing(eager):
        batch = next(ours.batches)
        found = eager.losses(batch, seed=batch.seed)
        with use_backend("torch"):
            expected = ours.trainer.step(iter([batch]))
    assert float(expected["loss_unsupervised"]) > 0
    for name in LOSSES:
        assert float(found[name].detach()) == pytest.approx(float(expected[name]), rel=1e-3), name


def test_random_draws_are_pixels_of_their_classes() -> None:
    torch.manual_seed(0)
    label = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8)
    label[label == 3] = IGNORE
    valid = (torch.rand(label.shape) < 0.8) & (label != IGNORE)
    hard = valid & (label != 4)
    anchors = random_anchors(label, hard, 5, 200)
    for number in range(5):
        pixels = (hard & (label == number)).flatten().nonzero()[:, 0]
        if number in (3, 4):
            assert (anchors[number] == -1).all()
        else:
            assert set(anchors[number].tolist()) == set(pixels.tolist())

    probability = torch.zeros(5, 5)
    probability[0, 1], probability[0, 4] = 0.25, 0.75
    negatives = random_negatives(probability, label, valid, 40, 50)
    assert negatives.shape == (5, 40, 50)
    assert (negatives[1:] == -1).all()
    drawn = label.flatten()[negatives[0].flatten()]
    assert valid.flatten()[negatives[0].flatten()].all()
    assert set(drawn.tolist()) == {1, 4}
    assert float((drawn == 4).float().mean()) == pytest.approx(0.75, abs=0.05)


# Pillow's augmentation.


def test_pictures_survive_the_way_to_a_tensor_and_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(
        np.array(to_picture(to_tensor(Image.fromarray(pixels), MEAN, STD), MEAN, STD)), pixels
    )


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.5), (2.0, 2.0)])
def test_picture_label_and_confidence_go_the_same_way(scale: tuple[float, float]) -> None:
    random.seed(0)
    # Large squares: the label is read off the colour away from their edges.
    label = np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4), np.ones((16, 16), dtype=np.uint8))
    picture = Image.fromarray(np.repeat(label[..., None] * 10, 3, axis=2))
    maps = [(Image.fromarray(label), IGNORE), (Image.fromarray(label.astype(np.float32)), -1.0)]
    flips = set()
    for _ in range(10):
        found, (label_map, confidence_map) = geometric(
            picture, maps, scale=scale, crop=(48, 40), flip=0.5, fill=(1.0, 1.0, 1.0)
        )
        assert (found.height, found.width) == (48, 40)
        classes, certain = np.array(label_map), np.array(confidence_map)
        inside = classes != IGNORE
        assert np.array_equal(certain[inside], classes[inside].astype(np.float32))
        assert (certain[~inside] == -1).all()
        assert inside.all() == (scale[0] >= 1)
        same = np.abs(np.array(found)[..., 0] - classes * 10.0)[inside] < 1
        assert same.mean() > 0.6  # away from the edges
        flips.add(bool(classes[0, inside[0]][0] > classes[0, inside[0]][-1]))
    assert flips == {True, False}


def test_strong_augmentation_changes_colours_and_can_be_switched_off(config: Config) -> None:
    random.seed(0)
    augment = config.data.augment
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    off = augment.model_copy(update={"jitter": 0.0, "grayscale": 0.0, "blur": 0.0})
    assert np.array_equal(np.array(photometric(picture, off)), pixels)
    grey = np.array(photometric(picture, off.model_copy(update={"grayscale": 1.0})))
    assert (grey[..., 0] == grey[..., 1]).all()
    blurred = np.array(photometric(picture, off.model_copy(update={"blur": 1.0, "blur_sigma": [2.0, 2.0]})))
    assert blurred.std() < 0.5 * pixels.std()
    assert not np.array_equal(np.array(photometric(picture, off.model_copy(update={"jitter": 1.0}))), pixels)


def test_classmix_pastes_half_of_the_classes_of_another_image() -> None:
    torch.manual_seed(0)
    random.seed(0)
    label = torch.stack([torch.arange(12).repeat(12, 1) // 3 + 4 * image for image in range(3)])
    label[0, :, :3] = IGNORE
    image = label[:, None].expand(-1, 3, -1, -1).float()
    mixed, mixed_label, mixed_confidence = classmix(image, label, label.float())
    assert torch.equal(mixed[:, 0].long(), mixed_label)
    assert torch.equal(mixed_confidence.long(), mixed_label)
    for own in range(3):
        pasted = mixed_label[own] != label[own]
        others = mixed_label[own][pasted].unique()
        assert len({int(x) // 4 for x in others}) == 1
        assert IGNORE not in others
        assert len(others) == 2  # of four classes, or of three
