"""Micro-batches that fit into memory, and the time of a run with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prcl_fast.config import Config
from prcl_fast.planning.memory_estimate import MemoryEstimator, PassBytes, StateBytes
from prcl_fast.planning.step_timer import StepMeasurement, StepTimer

MARGIN = 0.9  # of the free memory; the rest allows for variation between steps
# Freed memory that malloc keeps, as a fraction of a pass's bytes; measured on Linux: 0.3 to 0.5.
_HELD_BACK = {"cpu": 0.4, "cuda": 0.0}
_MOST_PIXELS = 2**31 - 1  # of a micro-batch: ops index pixels in 32 bits
_MOST_IMAGES = 4096  # of a micro-batch: bounds the search


@dataclass(frozen=True)
class Micro:
    """A micro-batch and the memory of training with it."""

    labeled: int  # images
    unlabeled: int
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of training with the configured micro-batch."""

    states: StateBytes
    gradients: int
    one_pass: PassBytes
    overhead: int  # of allocator and libraries, from measured steps; 0 without a measurement
    total: int  # states + one_pass.peak + overhead
    free: int | None  # None: not known
    limit: int | None  # MARGIN * free
    fits: bool | None


@dataclass(frozen=True)
class TimePlan:
    """Time of steps and of the whole run, without data loading, evaluation and checkpoints."""

    measured: list[StepMeasurement]
    rough: bool  # measured on the first step alone, or far from the measured sizes
    accumulate: int  # as configured, or the remedy's
    pass_seconds: float
    update_seconds: float
    step_seconds: float  # accumulate * pass_seconds + update_seconds
    run_seconds: float


@dataclass(frozen=True)
class Remedy:
    """Overrides with which a batch fits on this device."""

    labeled: int  # images of a step
    unlabeled: int
    accumulate: int | None  # None: no number makes it fit
    micro: Micro  # the micro-batch with `accumulate`, else the smallest one
    overrides: list[str]


class BatchPlanner:
    """Plans the micro-batches of one configuration.

    A size is a multiple of the smallest micro-batch in the configured proportion, such as 1 + 1 for 8 + 8.
    """

    def __init__(self, config: Config, estimator: MemoryEstimator, free: int | None) -> None:
        self.config, self.estimator, self.free = config, estimator, free
        self.limit = None if free is None else int(MARGIN * free)
        self.measured: list[StepMeasurement] = []
        self._states = estimator.states()
        self._needs_unlabeled = config.method.needs_unlabeled
        train = config.train
        self.batch = (train.batch_labeled, train.batch_unlabeled)
        self._least_unlabeled = 2 if config.method.mixes_pairs else 1
        shares = math.gcd(*self.batch)
        self._share = (self.batch[0] // shares, self.batch[1] // shares)
        self._configured = shares // train.accumulate
        self._smallest = -(-self._least_unlabeled // self._share[1])

    def measure(self, timer: StepTimer, seconds: float) -> None:
        """Measures steps at the smallest size and, if time and memory allow, at the configured one."""
        first = timer.measure(*self._images(self._smallest), seconds / 3)
        self.measured = [first]
        one_step = first.pass_seconds + first.update_seconds
        left = seconds - (first.steps + 1) * one_step
        # Time for a first step and a timed one, if time is proportional to the number of images.
        affordable = int(left / (2 * one_step) * self._smallest)
        count = min(max(self._configured, 2 * self._smallest), affordable)
        if count > self._smallest and (self.limit is None or self._bytes(count) <= self.limit):
            self.measured.append(timer.measure(*self._images(count), left))

    def memory(self) -> MemoryPlan:
        """Memory with the configured micro-batch."""
        images = self._images(self._configured)
        one_pass = self.estimator.one_pass(*images, accumulates=self.config.train.accumulate > 1)
        total = self._bytes(self._configured)
        return MemoryPlan(
            states=self._states,
            gradients=self.estimator.gradients(),
            one_pass=one_pass,
            overhead=self._overhead(one_pass),
            total=total,
            free=self.free,
            limit=self.limit,
            fits=None if self.limit is None else total <= self.limit,
        )

    def time(self, accumulate: int) -> TimePlan | None:
        """Time of a run with `accumulate` passes a step."""
        if not self.measured:
            return None
        images = sum(self._images(math.gcd(*self.batch) // accumulate))
        seen = [(m.labeled + m.unlabeled, m.pass_seconds) for m in self.measured]
        one_pass = _line(seen, images)
        update = self.measured[-1].update_seconds
        step = accumulate * one_pass + update
        return TimePlan(
            measured=self.measured,
            rough=self.measured[-1].steps == 1 or images > 2 * seen[-1][0],
            accumulate=accumulate,
            pass_seconds=one_pass,
            update_seconds=update,
            step_seconds=step,
            run_seconds=step * self.config.train.iterations,
        )

    def smallest_fits(self) -> bool:
        """Whether the smallest micro-batch fits; true if free memory is not known."""
        return self.limit is None or self._bytes(self._smallest) <= self.limit

    def largest(self) -> Micro | None:
        """The largest micro-batch that fits, in the configured proportion.

        Memory is the maximum of linear functions of the number of images, one for each moment of a step, and
        so it is convex: the line through two sizes is an upper bound between them and a lower bound beyond.
        """
        if self.limit is None or not self.smallest_fits():
            return None
        height, width = self.config.data.crop
        most = min(_MOST_PIXELS // (height * width), _MOST_IMAGES) // sum(self._images(1))
        low, high = self._smallest, min(max(self._configured, 2 * self._smallest), most)
        if self._bytes(high) <= self.limit:
            low, high = high, min(self._reach(low, high, self.limit), most)
        if self._bytes(high) <= self.limit:
            low = high
        while low < (count := self._reach(low, high, self.limit)) < high:
            low, high = (count, high) if self._bytes(count) <= self.limit else (low, count)
        return self._micro(*self._images(low), self.config.train.accumulate > 1)

    def remedy(self, labeled: int, unlabeled: int) -> Remedy:
        """The smallest number of passes with which a step of these images fits."""
        train = self.config.train
        parts = [
            part
            for part in range(1, math.gcd(labeled, unlabeled) + 1)
            if labeled % part == 0 and unlabeled % part == 0 and unlabeled // part >= self._least_unlabeled
        ]
        for accumulate in parts:
            used = unlabeled // accumulate if self._needs_unlabeled else 0
            micro = self._micro(labeled // accumulate, used, accumulate > 1)
            if self.limit is None or micro.bytes <= self.limit:
                break
        else:
            return Remedy(labeled, unlabeled, None, micro, [])
        values = {"batch_labeled": labeled, "batch_unlabeled": unlabeled, "accumulate": accumulate}
        overrides = [f"train.{key}={value}" for key, value in values.items() if value != getattr(train, key)]
        return Remedy(labeled, unlabeled, accumulate, micro, overrides)

    def _images(self, count: int) -> tuple[int, int]:
        return count * self._share[0], count * self._share[1] if self._needs_unlabeled else 0

    def _bytes(self, count: int) -> int:
        return self._micro(*self._images(count), self.config.train.accumulate > 1).bytes

    def _reach(self, low: int, high: int, limit: int) -> int:
        """The size at which the line through two sizes reaches the limit."""
        if low == high:
            return low
        slope = (self._bytes(high) - self._bytes(low)) / (high - low)
        return low + int((limit - self._bytes(low)) / slope)

    def _micro(self, labeled: int, unlabeled: int, accumulates: bool) -> Micro:
        one_pass = self.estimator.one_pass(labeled, unlabeled, accumulates=accumulates)
        return Micro(labeled, unlabeled, self._states.total + one_pass.peak + self._overhead(one_pass))

    def _overhead(self, one_pass: PassBytes) -> int:
        """Bytes of real steps beyond the estimate, on the line through the measured sizes.

        Beyond the measured sizes it grows at least by the fraction of memory that malloc keeps, which small
        sizes do not show.
        """
        seen = []
        for found in self.measured:
            if found.peak_bytes is not None:
                largest = self.estimator.one_pass(found.labeled, found.unlabeled, accumulates=False)
                beyond = found.peak_bytes - self._states.total - largest.peak
                seen.append((found.labeled + found.unlabeled, max(0, beyond)))
        if not seen:
            return 0
        share = _HELD_BACK[self.estimator.device.type] * max(0, one_pass.peak - largest.peak)
        return int(
            max(_line(seen, one_pass.labeled + one_pass.unlabeled), seen[-1][1] + share if share else 0)
        )


def _line(points: Sequence[tuple[int, float]], x: int) -> float:
    """The value at x on the rising line through one point and 0, or through two points; at least 0."""
    (x1, y1), (x2, y2) = points[0], points[-1]
    slope = max(0.0, (y2 - y1) / (x2 - x1)) if x2 != x1 else y2 / x2
    return max(0.0, y2 + slope * (x - x2))
