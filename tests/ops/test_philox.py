"""The counter-based generator: known answers and exact bounds."""

from __future__ import annotations

import pytest
import torch

from prcl_fast.reference.philox import NEGATIVES, bounded, philox_4x32, philox_words

ONES = 0xFFFFFFFF


# The known-answer vectors published with the generator (Random123, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    got = philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in got) == words


def test_words_place_element_purpose_step_and_seed_in_counter_and_key() -> None:
    seed, step, element = -(0x1234 << 32) - 77, (5 << 32) + 9, 123_456
    got = philox_words(torch.tensor([seed, step]), torch.tensor(element), NEGATIVES)
    expected = philox_4x32(
        tuple(map(torch.tensor, (element, 2, 9, 5))),
        tuple(map(torch.tensor, (seed & ONES, (seed >> 32) & ONES))),
    )
    assert [int(word) for word in got] == [int(word) for word in expected]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 21, 100_003, 2**31 - 1, 2**31])
def test_bounded_is_the_exact_high_half_of_the_product(n: int) -> None:
    # The last two lie on either side of a third of 2^64, where the low word decides.
    highs = [0, 1, 7, 2**31 - 1, 2**31, ONES - 1, ONES, 0x55555555, 0x55555555]
    lows = [0, 1, 2**31, ONES, 0x9E3779B9, 3, ONES, 0x55555555, 0x55555556]
    got = bounded(torch.tensor(highs), torch.tensor(lows), torch.tensor(n))
    assert got.tolist() == [((high << 32 | low) * n) >> 64 for high, low in zip(highs, lows, strict=True)]
