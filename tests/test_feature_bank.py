"""The memory bank: a ring of each class's latest features, and the contrast that draws negatives from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from prcl_fast.losses import FeatureBank, ProbabilisticContrast, feature_bank
from prcl_fast.losses import contrast as contrast_module
from prcl_fast.ops import probabilistic_info_nce

C, D = 3, 4


def seed(step: int) -> Tensor:
    return torch.tensor([7, step])


def one_pixel_each(step: int, classes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Features that say their step and class; one pixel of each class, and others that are not to be kept."""
    label = torch.full((1, 2, 4), 255)
    valid = torch.ones_like(label, dtype=torch.bool)
    for c in classes:
        label[0, 1, c] = c
    label[0, 0, 1], valid[0, 0, 1] = classes[0], False
    features = torch.full((1, D, 2, 4), 1e6)
    features[0, :, 1] = 10.0 * (step + 1) + torch.arange(4)
    return features, label, valid


def test_a_ring_keeps_the_latest_features_of_each_class_in_order() -> None:
    size = 5
    bank = FeatureBank(C, D, size=size, rows=2)
    rings, count = [[0.0] * (size + 1) for _ in range(C)], [0] * C
    for step in range(7):
        classes = (0, 1) if step % 3 else (0,)  # class 1 now and then, class 2 never
        bank.add(*one_pixel_each(step, classes), seed(step))
        for c in classes:
            for _ in range(2):  # a step adds two rows, here twice the one pixel
                rings[c][count[c] % size] = 10.0 * (step + 1) + c
                count[c] += 1
        assert bank.features[..., 0].tolist() == rings
        assert bank.count.tolist() == count
    assert (bank.features == bank.features[..., :1]).all()
    assert count == [14, 8, 0]


def test_rows_are_drawn_from_all_of_a_classes_valid_pixels_and_no_others() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, D, 5, 6, generator=draw)
    label = torch.randint(0, C + 1, (2, 5, 6), generator=draw)  # C: none
    valid = torch.rand(2, 5, 6, generator=draw) < 0.7
    bank = FeatureBank(C, D, size=400, rows=8)
    for step in range(50):
        bank.add(features.to(torch.bfloat16), label, valid, seed(step))
    assert bank.features.dtype == torch.float32
    rows = features.to(torch.bfloat16).float().movedim(1, -1)
    for c in range(C):
        allowed = {tuple(row) for row in rows[(label == c) & valid].tolist()}
        assert {tuple(row) for row in bank.features[c, :400].tolist()} == allowed
    assert not bank.features[:, 400].any()


def filled(size: int, kept: int) -> FeatureBank:
    """Class 0 holds 1, 2, ..., `kept`; class 1 one feature; class 2 none."""
    bank = FeatureBank(C, 1, size=size)
    bank.features[0, :kept, 0] = torch.arange(1.0, kept + 1)
    bank.features[1, 0] = -1.0
    bank.count.copy_(torch.tensor([kept, 1, 0]))
    return bank


@pytest.mark.parametrize(("size", "kept"), [(24, 16), (16, 16)])
def test_draws_are_uniform_over_the_rows_that_are_kept(size: int, kept: int) -> None:
    drawn = filled(size, kept).draw(16000, seed(0))
    assert drawn.shape == (C, 16000, 1)
    times = torch.bincount(drawn[0, :, 0].long(), minlength=kept + 1)
    assert times[0] == 0
    assert len(times) == kept + 1
    # 1000 times each, with a standard deviation of 31.
    assert ((times[1:] - 16000 / kept).abs() < 5 * (16000 / kept) ** 0.5).all()
    assert (drawn[1] == -1).all()
    assert not drawn[2].any()


def test_draws_after_the_ring_went_round_take_every_row() -> None:
    bank = filled(16, 16)
    bank.count[0] = 100
    assert bank.draw(1000, seed(0))[0].unique().tolist() == list(range(1, 17))


def test_draws_are_a_function_of_seed_and_step() -> None:
    bank = filled(16, 16)
    first = bank.draw(32, seed(0))
    assert torch.equal(first, bank.draw(32, seed(0)))
    assert not torch.equal(first, bank.draw(32, seed(1)))
    assert not torch.equal(first, bank.draw(32, torch.tensor([8, 0])))


@pytest.mark.parametrize("rows", [0, 5])
def test_rows_beyond_the_size_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows must be between 1 and size 4; got {rows}"):
        FeatureBank(C, D, size=4, rows=rows)


def test_processes_share_the_rows_of_a_step_and_hold_the_same_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes by hand: class 0 on both, class 1 on the second alone."""
    inputs = [one_pixel_each(0, (0,)), one_pixel_each(1, (0, 1))]
    sent: list[Tensor] = []

    def add(rank: int, travel: Any, size: int = 5) -> FeatureBank:
        monkeypatch.setattr(feature_bank, "world_size", lambda: 2)
        monkeypatch.setattr(feature_bank, "rank", lambda: rank)
        monkeypatch.setattr(feature_bank, "start_sum", lambda values: lambda: travel(values))
        bank = FeatureBank(C, D, size=size, rows=min(4, size))
        bank.add(*inputs[rank], seed(rank))
        return bank

    def keep(values: Tensor) -> Tensor:
        sent.append(values.clone())
        return values

    for rank in range(2):
        add(rank, keep)
    first, second = (add(rank, lambda _: sent[0] + sent[1]) for rank in range(2))
    assert torch.equal(first.features, second.features)
    assert first.count.tolist() == second.count.tolist() == [4, 2, 0]
    assert first.features[0, :, 0].tolist() == [10, 10, 20, 20, 0, 0]
    assert first.features[1, :, 0].tolist() == [21, 21, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="size must be at least 2, one row of every process; got 1"):
        add(0, keep, size=1)


def scene(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "mu": torch.randn(2, D, 6, 7, generator=draw).requires_grad_(),
        "var": (0.1 + torch.rand(2, D, 6, 7, generator=draw)).requires_grad_(),
        "label": torch.randint(0, C if step else C - 1, (2, 6, 7), generator=draw),
        "valid": torch.rand(2, 6, 7, generator=draw) < 0.8,
        "confidence": torch.rand(2, 6, 7, generator=draw),
        "seed": seed(step),
    }


def make(**options: Any) -> ProbabilisticContrast:
    options = {"memory_bank": 40, "bank_negatives": 6, "virtual_negatives": 0} | options
    return ProbabilisticContrast(C, D, tau=0.3, anchors=8, negatives=8, **options)


@pytest.mark.parametrize("prototype", ["global", "local"])
def test_the_contrast_takes_its_further_negatives_from_the_bank(
    monkeypatch: pytest.MonkeyPatch, prototype: str
) -> None:
    calls = []

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append((args, options))
        return probabilistic_info_nce(*args, **options)

    monkeypatch.setattr(contrast_module, "probabilistic_info_nce", spy)
    contrast = make(prototype=prototype)
    for step in range(3):
        contrast(**scene(step))
    batch = scene(3)
    bank = copy.deepcopy(contrast.bank)
    assert bank is not None
    loss = contrast(**batch)
    bank.add(batch["mu"], batch["label"], batch["valid"], batch["seed"])
    virtual = bank.draw(6, batch["seed"])
    (*drawn, _), options = calls[-1]
    assert torch.equal(loss, probabilistic_info_nce(*drawn, virtual, **options))
    assert loss > probabilistic_info_nce(*drawn, None, **options)
    # They are means that pixels of the class had in some step.
    for c in range(C):
        seen = torch.cat([_means(scene(step), c) for step in range(4)])
        assert all((row == seen).all(1).any() for row in virtual[c])
    assert not virtual.requires_grad
    assert contrast.diagnostics["chance_level"] == torch.log1p(torch.tensor(8.0 + 2 * 6))


def _means(batch: dict[str, Tensor], c: int) -> Tensor:
    return batch["mu"].detach().movedim(1, -1)[(batch["label"] == c) & batch["valid"]]


def test_the_banks_state_is_saved_and_loaded() -> None:
    contrast, other = make(), make()
    for step in range(2):
        contrast(**scene(step))
    state = contrast.state_dict()
    assert {"bank.features", "bank.count"} <= state.keys()
    other.load_state_dict(state)
    assert torch.equal(contrast(**scene(2)), other(**scene(2)))
    assert torch.equal(contrast.bank.features, other.bank.features)


@pytest.mark.parametrize(
    "options", [{"virtual_negatives": 4}, {"deterministic": True}], ids=["virtual", "deterministic"]
)
def test_a_bank_beside_virtual_negatives_or_without_variances_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="memory_bank must be 0 beside virtual_negatives"):
        make(**options)
