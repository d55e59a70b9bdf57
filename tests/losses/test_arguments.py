"""Arguments of the losses: what does not fit is named, with the expected and the given shape."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from prcl_fast.losses import (
    FeatureBank,
    ProbabilisticContrast,
    PrototypePredictor,
    lambda_c,
    odds_logits,
    one_prototype_per_class,
    poly_lr,
    prototypical_contrast,
    start_counting,
    supervised_loss,
    unsupervised_loss,
)
from prcl_fast.ops.arguments import check_variance

C, D = 4, 8
SIZE = (2, 8, 9)
INTS = torch.int64


def scene() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "mu": torch.randn(2, D, 8, 9, generator=generator),
        "var": 0.1 + torch.rand(2, D, 8, 9, generator=generator),
        "label": torch.randint(0, C, SIZE, generator=generator),
        "valid": torch.ones(SIZE, dtype=torch.bool),
        "confidence": torch.rand(SIZE, generator=generator),
        "seed": torch.tensor([5, 0]),
    }


Case = tuple[dict[str, Any], type[Exception], str]
WRONG: dict[str, Case] = {
    "mu of another D": (
        {"mu": torch.ones(2, 4, 8, 9), "var": torch.ones(2, 4, 8, 9)},
        ValueError,
        r"mu must have shape [B, 8, h, w]; got [2, 4, 8, 9]",
    ),
    "mu without a batch": (
        {"mu": torch.ones(8, 8, 9)},
        ValueError,
        "mu must have shape [B, 8, h, w]; got [8, 8, 9]",
    ),
    "a numpy mu": ({"mu": torch.ones(2, 8, 8, 9).numpy()}, TypeError, "mu must be a tensor; got ndarray"),
    "an integer mu": (
        {"mu": torch.ones(2, 8, 8, 9, dtype=INTS)},
        TypeError,
        "mu must be float32, bfloat16, float16, float64; got int64",
    ),
    "an empty batch": (
        {"mu": torch.ones(0, 8, 8, 9), "var": torch.ones(0, 8, 8, 9)},
        ValueError,
        "mu must hold between 1 and 2^31 - 1 pixels; got 0",
    ),
    "no var": ({"var": None}, TypeError, "var must be a tensor"),
    "var at another resolution": (
        {"var": torch.ones(2, 8, 4, 5)},
        ValueError,
        "var must have shape [2, 8, 8, 9]; got [2, 8, 4, 5]",
    ),
    "one var a pixel": ({"var": torch.ones(2, 1, 8, 9)}, ValueError, "var must have shape [2, 8, 8, 9]; got"),
    "a float64 var": (
        {"var": torch.ones(2, 8, 8, 9, dtype=torch.float64)},
        TypeError,
        "var must be float32; got float64",
    ),
    "labels of the image's size": (
        {"label": torch.zeros(2, 32, 36, dtype=INTS)},
        ValueError,
        "label must have shape [2, 8, 9]; got [2, 32, 36]",
    ),
    "float labels": (
        {"label": torch.zeros(SIZE)},
        TypeError,
        "label must be int64, int32, int16, int8, uint8; got float32",
    ),
    "a float valid": ({"valid": torch.ones(SIZE)}, TypeError, "valid must be bool; got float32"),
    "valid of another shape": (
        {"valid": torch.ones(2, 9, 8, dtype=torch.bool)},
        ValueError,
        "valid must have shape [2, 8, 9]; got [2, 9, 8]",
    ),
    "valid on another device": (
        {"valid": torch.ones(SIZE, dtype=torch.bool, device="meta")},
        ValueError,
        "valid is on meta but mu is on cpu",
    ),
    "confidence with a channel": (
        {"confidence": torch.ones(2, 1, 8, 9)},
        ValueError,
        "confidence must have shape [2, 8, 9]; got [2, 1, 8, 9]",
    ),
    "an integer confidence": (
        {"confidence": torch.ones(SIZE, dtype=INTS)},
        TypeError,
        "confidence must be float32, bfloat16, float16, float64; got int64",
    ),
    "a plain number as seed": ({"seed": 3}, TypeError, "seed must be a tensor; got int"),
    "a seed of three": ({"seed": torch.tensor([1, 2, 3])}, ValueError, "seed must have shape [2]; got [3]"),
    "a float seed": ({"seed": torch.tensor([1.0, 2.0])}, TypeError, "seed must be int64; got float32"),
    "a log-variance": (
        {"var": torch.full((2, 8, 8, 9), -3.0)},
        ValueError,
        "var must be positive; its smallest value is -3; a log-variance goes through exp() first",
    ),
    "a variance of 0": ({"var": torch.zeros(2, 8, 8, 9)}, ValueError, "its smallest value is 0"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("representation", ["probabilistic", "deterministic"])
def test_the_contrast_names_what_does_not_fit_and_keeps_its_state(case: str, representation: str) -> None:
    changed, kind, message = WRONG[case]
    options: dict[str, Any] = {"anchors": 16, "negatives": 32}
    if representation == "deterministic":
        if "mu" not in changed and "var" in changed:
            pytest.skip("var is ignored")
        options |= {"representation": representation, "virtual_negatives": 0}
    contrast = ProbabilisticContrast(C, D, **options)
    before = {name: value.clone() for name, value in contrast.state_dict().items()}
    with pytest.raises(kind, match=re.escape(message)):
        contrast(**{**scene(), **changed})
    assert all(torch.equal(value, before[name]) for name, value in contrast.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((1, D), ValueError, "num_classes must be at least 2; got 1"),
        ((C, -1), ValueError, "dim must be at least 1; got -1"),
        ((C, 8.0), TypeError, "dim must be an integer; got float"),
        ((C, D, {"tau": 1.0}), TypeError, "settings must be a ContrastConfig; got dict"),
    ],
)
def test_the_contrast_names_a_wrong_setting(
    arguments: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        ProbabilisticContrast(*arguments)


def test_the_check_of_the_variances_waits_for_no_device() -> None:
    check_variance("var", torch.full((4,), -1.0, device="meta"))  # its values cannot be read
    check_variance("var", torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="var must be positive; its smallest value is -1"):
        check_variance("var", torch.full((4,), -1.0))


def _predictor() -> PrototypePredictor:
    return PrototypePredictor(C, 2, D, temperature=0.1, decay=0.9)


def _label(*size: int) -> Tensor:
    return torch.zeros(*size, dtype=INTS)


CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "supervised: labels without a batch": (
        lambda: supervised_loss(torch.ones(2, C, 4, 4), _label(8, 8)),
        ValueError,
        "target must have shape",
    ),
    "supervised: numpy logits": (
        lambda: supervised_loss(torch.ones(2, C, 4, 4).numpy(), _label(2, 8, 8)),  # type: ignore[arg-type]
        TypeError,
        "logits must be a tensor; got ndarray",
    ),
    "unsupervised: confidence of the logits": (
        lambda: unsupervised_loss(torch.ones(2, C, 4, 4), _label(2, 8, 8), torch.ones(2, 4, 4), 0.9),
        ValueError,
        "confidence must have shape [2, 8, 8]; got [2, 4, 4]",
    ),
    "unsupervised: a list of pseudo-labels": (
        lambda: unsupervised_loss(torch.ones(2, C, 4, 4), [[0]], torch.ones(2, 8, 8), 0.9),  # type: ignore[arg-type]
        TypeError,
        "pseudo_label must be a tensor; got list",
    ),
    "unsupervised: a threshold in percent": (
        lambda: unsupervised_loss(torch.ones(2, C, 4, 4), _label(2, 8, 8), torch.ones(2, 8, 8), 95),
        ValueError,
        "delta_u must be between 0 and 1; got 95",
    ),
    "counting: float labels": (
        lambda: start_counting(torch.ones(2, 8, 8)),
        TypeError,
        "label must be uint8, int64; got float32",
    ),
    "counting: pseudo-labels alone": (
        lambda: start_counting(_label(2, 8, 8), _label(2, 8, 8)),
        TypeError,
        "pseudo_label and confidence must be given together",
    ),
    "lambda_c: a plain number": (
        lambda: lambda_c(0.1, 3, 10),  # type: ignore[arg-type]
        TypeError,
        "iteration must be a tensor; got int",
    ),
    "poly_lr: no iterations": (
        lambda: poly_lr(0.1, torch.tensor(3), 0),
        ValueError,
        "total must be at least 1; got 0",
    ),
    "prototypical: features of another size": (
        lambda: prototypical_contrast(
            torch.ones(2, D, 4, 4),
            _label(2, 8, 8),
            torch.ones(2, 8, 8, dtype=torch.bool),
            6,
            torch.tensor([0, 0]),
            tau=0.1,
            num_anchors=4,
            num_negatives=4,
            normalize=True,
        ),
        ValueError,
        "prototype must have shape [2, 4, 4]; got [2, 8, 8]",
    ),
    "odds: integers": (
        lambda: odds_logits(torch.ones(3, dtype=INTS)),
        TypeError,
        "score must be a floating tensor; got torch.int64",
    ),
    "one prototype a class: channels that do not divide": (
        lambda: one_prototype_per_class([torch.ones(2, 7, 4, 4)], C, torch.tensor([0, 0])),
        ValueError,
        "scores[0] must have a multiple of 4 channels, the same for each; got [2, 7, 4, 4]",
    ),
    "predictor: a decay above 1": (
        lambda: PrototypePredictor(C, 2, D, temperature=0.1, decay=1.5),
        ValueError,
        "decay must be between 0 and 1; got 1.5",
    ),
    "predictor: a temperature of 0": (
        lambda: PrototypePredictor(C, 2, D, temperature=0, decay=0.9),
        ValueError,
        "temperature must be positive; got 0",
    ),
    "predictor: features of another width": (
        lambda: _predictor()(torch.ones(2, 4, 3, 3)),
        ValueError,
        "features must have shape [B, 8, h, w]; got [2, 4, 3, 3]",
    ),
    "predictor: prototypes of another number": (
        lambda: _predictor().initialize(torch.ones(C, 3, D), torch.ones(C, dtype=torch.bool)),
        ValueError,
        "prototypes must have shape [4, 2, 8]; got [4, 3, 8]",
    ),
    "predictor: a float mask": (
        lambda: _predictor().update(torch.ones(2, D, 3, 3), _label(2, 3, 3), torch.ones(2, 3, 3)),
        TypeError,
        "valid must be bool; got float32",
    ),
    "bank: no size": (lambda: FeatureBank(C, D, size=0), ValueError, "size must be at least 1; got 0"),
    "bank: another number of maps": (
        lambda: FeatureBank(C, D, D, size=8).add(
            torch.ones(2, D, 3, 3),
            _label(2, 3, 3),
            torch.ones(2, 3, 3, dtype=torch.bool),
            torch.tensor([0, 0]),
        ),
        ValueError,
        "maps must be 2 tensors; got 1",
    ),
    "bank: labels of another size": (
        lambda: FeatureBank(C, D, size=8).add(
            torch.ones(2, D, 3, 3),
            _label(2, 4, 4),
            torch.ones(2, 4, 4, dtype=torch.bool),
            torch.tensor([0, 0]),
        ),
        ValueError,
        "label must have shape [2, 3, 3]; got [2, 4, 4]",
    ),
    "bank: a draw without seed": (
        lambda: FeatureBank(C, D, size=8).draw(3, None),  # type: ignore[arg-type]
        TypeError,
        "seed must be a tensor; got NoneType",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_every_loss_names_what_does_not_fit(case: str) -> None:
    call, kind, message = CALLS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()
