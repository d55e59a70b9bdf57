"""Normal numbers: distribution, dependence on (seed, step, purpose), equal draws at every place."""

from __future__ import annotations

import pytest
import torch

from prcl_fast.ops import Purpose, philox_normal, use_backend
from support.backends import run_everywhere

place = run_everywhere("philox_normal")
unwrapped = philox_normal


def test_every_place_draws_the_same_up_to_the_rounding_of_log_and_cos() -> None:
    seed = torch.tensor([-(0x1234 << 32) - 77, (5 << 32) + 9])
    got = philox_normal(seed, (7, 1000), Purpose.VIRTUAL_NEGATIVES)
    with use_backend("torch"):
        expected = unwrapped(seed, (7, 1000), Purpose.VIRTUAL_NEGATIVES)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=1e-12)


def test_opcheck_and_compile() -> None:
    seed = torch.tensor([4, 5])
    torch.library.opcheck(torch.ops.prcl_fast.philox_normal.default, (seed, 12, 3))

    def draw(seed: torch.Tensor) -> torch.Tensor:
        return unwrapped(seed, (3, 4), Purpose.VIRTUAL_NEGATIVES)

    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(seed), draw(seed))


def test_normal_has_the_moments_of_a_standard_normal() -> None:
    x = philox_normal(torch.tensor([3, 4]), (200, 500), Purpose.VIRTUAL_NEGATIVES).double()
    n = x.numel()
    # Standard errors of the first four moments of n independent draws: sqrt(1, 2, 15, 96) / sqrt(n).
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - expected) < 4.5 * (spread / n) ** 0.5
    assert torch.isfinite(x).all()
    # Neighbouring elements are independent.
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 4.5 / n**0.5


def test_normal_depends_on_seed_step_and_purpose_and_on_nothing_else() -> None:
    def draw(seed: int, step: int, purpose: Purpose) -> torch.Tensor:
        return philox_normal(torch.tensor([seed, step]), (64,), purpose)

    base = draw(1, 2, Purpose.VIRTUAL_NEGATIVES)
    torch.manual_seed(99)
    assert torch.equal(base, draw(1, 2, Purpose.VIRTUAL_NEGATIVES))
    others = (
        draw(2, 2, Purpose.VIRTUAL_NEGATIVES),
        draw(1, 3, Purpose.VIRTUAL_NEGATIVES),
        draw(1, 2, Purpose.ANCHORS),
    )
    for other in others:
        assert not torch.isclose(base, other).any()


@pytest.mark.parametrize(
    ("seed", "error", "match"),
    [
        (torch.tensor([1]), ValueError, "seed must have shape"),
        (torch.tensor([1.0, 2.0]), TypeError, "seed must be int64"),
    ],
)
def test_normal_refuses_a_seed_that_does_not_fit(
    seed: torch.Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        philox_normal(seed, (3,), Purpose.VIRTUAL_NEGATIVES)
