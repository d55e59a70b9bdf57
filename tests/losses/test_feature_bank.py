"""The memory bank: a ring buffer of each class's latest features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prcl_fast.losses import FeatureBank, feature_bank
from prcl_fast.ops import Purpose, philox_normal, sample_anchors
from support.processes import Pair, pair
from support.recording import Recording

C, D = 3, 4


def seed(step: int) -> Tensor:
    return torch.tensor([7, step])


def one_pixel_each(step: int, classes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Features that encode step and class; one valid pixel of each class among invalid ones."""
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
            # A step may add two rows of a class, but with one pixel it adds one.
            rings[c][count[c] % size] = 10.0 * (step + 1) + c
            count[c] += 1
        assert bank.features[..., 0].tolist() == rings
        assert bank.count.tolist() == count
    assert (bank.features == bank.features[..., :1]).all()
    assert count == [7, 4, 0]


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
        kept = bank.features[c, : min(400, int(bank.count[c]))]
        assert {tuple(row) for row in kept.tolist()} == allowed
    assert not bank.features[:, 400].any()


def distributions(step: int) -> dict[str, Tensor]:
    """Class 2 has 3 valid pixels, class 0 about 30; class 1 is absent at first."""
    generator = torch.Generator().manual_seed(step)
    label = torch.randint(0, 2 if step else 1, (2, 5, 6), generator=generator)
    label[0, 0, :3] = 2
    label[1, 4, 3:] = 255
    valid = torch.rand(2, 5, 6, generator=generator) < 0.8
    valid[0, 0, :3] = True
    return {
        "mu": torch.randn(2, D, 5, 6, generator=generator),
        "var": 0.1 + torch.rand(2, D, 5, 6, generator=generator),
        "label": label,
        "valid": valid,
        "seed": seed(step),
    }


def add(bank: FeatureBank, batch: dict[str, Tensor]) -> None:
    bank.add((batch["mu"], batch["var"]), batch["label"], batch["valid"], batch["seed"])


def test_means_and_variances_are_kept_and_drawn_as_a_plain_transcription_says() -> None:
    """The bank of table 7 [IJCV]: mu and sigma^2 of pixels of every class, the oldest replaced first."""
    size, rows, number = 21, 6, 40
    bank = FeatureBank(C, D, D, size=size, rows=rows)
    kept: list[list[tuple[float, ...]]] = [[] for _ in range(C)]
    for step in range(8):
        batch = distributions(step)
        add(bank, batch)
        label, valid = batch["label"], batch["valid"]
        drawn = sample_anchors(label, valid, valid, C, rows, batch["seed"] ^ 0x42414E4B)
        for c in range(C):
            places = [(b, y, x) for b in range(2) for y in range(5) for x in range(6)]
            own = [place for place in places if label[place] == c and valid[place]]
            for index in drawn[c].tolist()[: len(own)]:
                b, y, x = places[index]
                assert (b, y, x) in own
                kept[c].append((*batch["mu"][b, :, y, x].tolist(), *batch["var"][b, :, y, x].tolist()))
        assert bank.count.tolist() == [len(ring) for ring in kept]
        for c, ring in enumerate(kept):
            assert sorted(map(tuple, bank.features[c, : len(ring[-size:])].tolist())) == sorted(ring[-size:])

        mean, variance, known = bank.draw(number, batch["seed"])
        normal = philox_normal(batch["seed"] ^ 0x44524157, (C, number, 1), Purpose.VIRTUAL_NEGATIVES)
        assert known.tolist() == [len(ring) > 0 for ring in kept]
        for c, ring in enumerate(kept):
            for v in range(number):
                expected = (0.0,) * 2 * D
                if ring:
                    uniform = 0.5 * (1 + math.erf(float(normal[c, v, 0]) / math.sqrt(2)))
                    held = min(len(ring), size)
                    place = min(int(uniform * held), held - 1)
                    newest = (len(ring) - 1 - place) // size  # times that the place was written anew
                    expected = ring[place + newest * size]
                assert (*mean[c, v].tolist(), *variance[c, v].tolist()) == expected
    assert [len(ring) for ring in kept] == [48, 42, 24]
    assert len(kept[2]) > size  # it went round


def test_a_row_that_is_not_finite_is_left_out() -> None:
    """A step that is not finite must not affect later steps."""
    bank = FeatureBank(C, D, D, size=21, rows=6)
    batch = distributions(1)
    batch["mu"][:, 1] = torch.where(batch["label"] == 0, torch.nan, batch["mu"][:, 1])
    batch["var"][0, 0, 0, :3] = torch.inf
    add(bank, batch)
    assert bank.count.tolist() == [0, 6, 0]
    assert bank.features.isfinite().all()


def test_nothing_waits_for_the_host() -> None:
    bank, eager = (FeatureBank(C, D, D, size=21) for _ in range(2))
    inputs = distributions(0)

    def step() -> tuple[Tensor, ...]:
        add(bank, inputs)
        return bank.draw(5, inputs["seed"])

    recording = Recording(step)
    for number in range(3):
        if number:
            for name, value in distributions(number).items():
                inputs[name].copy_(value)
            recording.replay()
        add(eager, distributions(number))
        expected = eager.draw(5, seed(number))
        assert all(torch.equal(a, b) for a, b in zip(recording.outputs, expected, strict=True))
    assert torch.equal(bank.features, eager.features)
    assert bank.count.max() > 0


def _bank_after(rank: int, steps: int) -> tuple[Tensor, ...]:
    bank = FeatureBank(C, D, D, size=21, rows=6)
    for step in range(steps):
        add(bank, distributions(10 * step + rank))
    return bank.features, bank.count, *bank.draw(5, seed(0))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("pair")) as processes:
        yield processes


def test_two_processes_hold_the_same_bank(two: Pair) -> None:
    first, second = two(_bank_after, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[1].tolist() == [24, 21, 24]  # the first process's first batch has no class 1
    rows = {tuple(row) for row in first[0][2, :21].tolist()}
    seen = [
        tuple(torch.cat([batch["mu"], batch["var"]], dim=1)[0, :, 0, x].tolist())
        for step in range(4)
        for rank in range(2)
        for batch in [distributions(10 * step + rank)]
        for x in range(3)
    ]
    assert rows <= set(seen)


@pytest.mark.parametrize(
    ("size", "rows"), [(1, 1), (9, 1), (40, 5), (512, 64), (8192, 64), (30000, 234), (65536, 512)]
)
def test_rows_of_a_step_grow_with_the_bank(size: int, rows: int) -> None:
    with torch.device("meta"):
        bank = FeatureBank(21, 256, 256, size=size)
    assert bank.rows == rows
    assert bank.nbytes == 21 * ((size + 1) * 512 * 4 + 8)


def test_the_bank_of_table_7_takes_the_memory_that_the_table_prints() -> None:
    with torch.device("meta"):
        banks = [FeatureBank(21, 256, 256, size=size) for size in (30000, 65536)]
    assert [round(bank.nbytes / 2**30, 2) for bank in banks] == [1.20, 2.63]


@pytest.mark.parametrize("maps", [1, 3])
def test_other_maps_than_the_banks_are_refused(maps: int) -> None:
    batch = distributions(0)
    with pytest.raises(ValueError, match=r"maps must be 2 tensors; got"):
        FeatureBank(C, D, D, size=4).add([batch["mu"]] * maps, batch["label"], batch["valid"], batch["seed"])


def filled(size: int, kept: int) -> FeatureBank:
    """Class 0 holds 1, 2, ..., `kept`; class 1 one feature; class 2 none."""
    bank = FeatureBank(C, 1, size=size)
    bank.features[0, :kept, 0] = torch.arange(1.0, kept + 1)
    bank.features[1, 0] = -1.0
    bank.count.copy_(torch.tensor([kept, 1, 0]))
    return bank


@pytest.mark.parametrize(("size", "kept"), [(24, 16), (16, 16)])
def test_draws_are_uniform_over_the_rows_that_are_kept(size: int, kept: int) -> None:
    drawn, known = filled(size, kept).draw(16000, seed(0))
    assert known.tolist() == [True, True, False]
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
    assert bank.draw(1000, seed(0))[0][0].unique().tolist() == list(range(1, 17))


def test_draws_are_a_function_of_seed_and_step() -> None:
    bank = filled(16, 16)
    first = bank.draw(32, seed(0))[0]
    assert torch.equal(first, bank.draw(32, seed(0))[0])
    assert not torch.equal(first, bank.draw(32, seed(1))[0])
    assert not torch.equal(first, bank.draw(32, torch.tensor([8, 0]))[0])


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
    assert first.count.tolist() == second.count.tolist() == [2, 1, 0]
    assert first.features[0, :, 0].tolist() == [10, 20, 0, 0, 0, 0]
    assert first.features[1, :, 0].tolist() == [21, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="size must be at least 2, one row of every process; got 1"):
        add(0, keep, size=1)
