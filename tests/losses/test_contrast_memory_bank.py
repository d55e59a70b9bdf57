"""Memory bank of the contrast: mu and sigma^2 of earlier pixels as further negatives [IJCV, 5.3]."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.losses import contrast as contrast_module
from prcl_fast.ops import probabilistic_info_nce

C, D = 3, 4


def seed(step: int) -> Tensor:
    return torch.tensor([7, step])


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
    bank.add((batch["mu"], batch["var"]), batch["label"], batch["valid"], batch["seed"])
    mean, variance, known = bank.draw(6, batch["seed"])
    (*drawn, _), options = calls[-1]
    assert torch.equal(options.pop("virtual_known"), known)
    assert torch.equal(options.pop("virtual_var"), variance)
    bank_options = {"virtual_var": variance, "virtual_known": known}
    assert torch.equal(loss, probabilistic_info_nce(*drawn, mean, **options, **bank_options))
    assert loss > probabilistic_info_nce(*drawn, None, **options)
    # They equal mu and sigma^2 of pixels of the class in some step.
    for c in range(C):
        seen = torch.cat([_pixels(scene(step), c) for step in range(4)])
        rows = torch.cat([mean[c], variance[c]], dim=1)
        assert all((row == seen).all(1).any() for row in rows)
    assert not mean.requires_grad
    assert not variance.requires_grad
    assert contrast.diagnostics["chance_level"] == torch.log1p(torch.tensor(8.0 + 2 * 6))


def _pixels(batch: dict[str, Tensor], c: int) -> Tensor:
    """[n, 2D]: mu and sigma^2 of a class's valid pixels."""
    both = torch.cat([batch["mu"], batch["var"]], dim=1).detach()
    return both.movedim(1, -1)[(batch["label"] == c) & batch["valid"]]


def test_the_bank_speaks_for_classes_that_are_absent_from_the_batch() -> None:
    """Eq. (15): C~_g is the negative classes of the whole data set."""
    contrast = make()
    for step in range(1, 4):
        contrast(**scene(step))
    batch = scene(0)  # without the last class
    assert not ((batch["label"] == C - 1) & batch["valid"]).any()
    other = copy.deepcopy(contrast)
    assert other.bank is not None
    other.bank.features[C - 1, :, 0] += 0.5
    assert contrast(**batch) != other(**batch)
    alone = batch | {"label": torch.where(batch["label"] == 1, 255, batch["label"])}  # class 0 is left
    assert contrast(**alone) > 0.1


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
    "options",
    [{"virtual_negatives": 4}, {"representation": "deterministic"}],
    ids=["virtual", "deterministic"],
)
def test_a_bank_beside_virtual_negatives_or_without_variances_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="memory_bank: takes the place of virtual_negatives"):
        make(**options)
