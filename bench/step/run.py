"""The candidates' turns and the result: a dict of `kind`, `machine`, `options`, `same_for_all` and `rows`.

Candidates run in the order of CANDIDATES, whatever the order of the rows: ours first, the published step
last, because it takes by far the longest on a GPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench import machine
from bench.ops.harness import percentile
from bench.step.data import candidate_config
from bench.step.setup import method_of
from bench.step.worker import CANDIDATES, Report, Worker
from prcl_fast.config import Config, dump_config
from prcl_fast.errors import InputError

KIND = "bench.step 1"
PUBLISHED_SECONDS = 30.0
_WARMUP_SHARE = 0.5  # longest warm-up, as a fraction of these seconds


@dataclass(frozen=True)
class Plan:
    """The candidates, their configuration and their turns.

    Attributes:
        title: of tables and figures.
        device: cpu or cuda.
        candidates: names in CANDIDATES.
        rounds: turns of each candidate.
        steps: of a turn.
        warmup: steps of each candidate before its first turn.
        one_at_a_time: whether a candidate's process ends before the next one's begins.
        published_seconds: with one_at_a_time, the time in which turns of the published step begin.
    """

    title: str
    config: Config
    device: str
    candidates: tuple[str, ...]
    rounds: int
    steps: int
    warmup: int
    one_at_a_time: bool
    published_seconds: float = PUBLISHED_SECONDS


@dataclass
class _Outcome:
    ran: bool = False
    times: list[float] = field(default_factory=list)
    report: Report | None = None
    failure: str | None = None

    def add(self, worker: Worker) -> None:
        self.ran = True
        self.times += worker.times
        self.report = worker.report or self.report
        self.failure = self.failure or worker.failure


def measure(
    plan: Plan,
    progress: Callable[[str], None],
    finished: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Runs the candidates in turns.

    Args:
        progress: called with a line of progress.
        finished: called with the result so far when a candidate's process has ended.

    Raises:
        InputError: the configuration has a setting that a candidate does not support.
    """
    method = method_of(plan.config)
    if method.anchors_per_set != 1:
        raise InputError(
            f"method.anchors_per_set: {method.anchors_per_set}; the candidate ours-shared16 measures it"
        )
    outcomes = {name: _Outcome() for name in plan.candidates}
    result = {
        "kind": KIND,
        "machine": machine.describe(plan.device),
        "options": _options(plan) | {"load_before": os.getloadavg()[0]},
        "same_for_all": _same_for_all(plan),
        "rows": [],
    }

    def ended(name: str, worker: Worker) -> None:
        outcomes[name].add(worker)
        result["rows"] = [_row(plan, name, outcome) for name, outcome in outcomes.items()]
        finished(result)

    run = _one_after_the_other if plan.one_at_a_time else _interleaved
    run(plan, progress, ended)
    return result


def _interleaved(plan: Plan, progress: Callable[[str], None], ended: Callable[[str, Worker], None]) -> None:
    """All processes live at once and take turns; each round begins with another candidate."""
    workers: dict[str, Worker] = {}
    names = _in_order(plan)
    try:
        for name in names:
            progress(f"{name}: {plan.warmup} steps to warm up")
            workers[name] = _start(plan, name)
        for turn in range(plan.rounds):
            progress(f"round {turn + 1} of {plan.rounds}")
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                workers[name].run(plan.steps)
        for name, worker in workers.items():
            worker.finish()
            ended(name, worker)
    finally:
        for worker in workers.values():
            worker.stop()


def _one_after_the_other(
    plan: Plan, progress: Callable[[str], None], ended: Callable[[str, Worker], None]
) -> None:
    """One process at a time: all candidates make half of their turns, then all make the other half.

    The published step runs once, after all others.
    """
    others = [name for name in _in_order(plan) if name != "published"]
    failed = set()
    for rounds in (plan.rounds - plan.rounds // 2, plan.rounds // 2):
        for name in others:
            if rounds == 0 or name in failed:
                continue
            progress(f"{name}: {plan.warmup} steps to warm up, {rounds} rounds")
            with _ending(_start(plan, name)) as worker:
                for _ in range(rounds):
                    worker.run(plan.steps)
                worker.finish()
            ended(name, worker)
            if worker.failure is not None:
                failed.add(name)
    if "published" in plan.candidates:
        progress(f"published: turns that begin within {plan.published_seconds:.0f} s")
        with _ending(_start(plan, "published")) as worker:
            end = time.monotonic() + plan.published_seconds
            for turn in range(plan.rounds):
                if turn > 0 and time.monotonic() >= end:
                    break
                worker.run(1)
            worker.finish()
        ended("published", worker)


def _in_order(plan: Plan) -> list[str]:
    return sorted(plan.candidates, key=list(CANDIDATES).index)


@contextlib.contextmanager
def _ending(worker: Worker) -> Iterator[Worker]:
    try:
        yield worker
    finally:
        worker.stop()


def _is_short(plan: Plan, name: str) -> bool:
    return plan.one_at_a_time and name == "published"


def _start(plan: Plan, name: str) -> Worker:
    config = candidate_config(plan.config, name, CANDIDATES[name][1])
    seconds = _WARMUP_SHARE * plan.published_seconds if _is_short(plan, name) else math.inf
    return Worker.start(name, config, plan.warmup, seconds)


def _options(plan: Plan) -> dict[str, Any]:
    config = plan.config
    train, model, crop = config.train, config.model, config.data.crop
    tree = dump_config(config)
    del tree["output"], tree["eval"]
    return {
        "title": plan.title,
        "what": f"{model.backbone}, {train.batch_labeled} + {train.batch_unlabeled} images, "
        f"crop {crop[0]} x {crop[1]}",
        "rounds": plan.rounds,
        "steps_a_round": plan.steps,
        "warmup_steps": plan.warmup,
        "one_at_a_time": plan.one_at_a_time,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "the runtime's default"),
        "config": tree,
        "changes": {name: list(CANDIDATES[name][1]) for name in plan.candidates},
    }


def _same_for_all(plan: Plan) -> list[str]:
    """Remarks on the conditions that all candidates share."""
    method, data = method_of(plan.config), plan.config.data
    workers = f"by {data.workers} data workers" if data.workers else "in the training process itself"
    all_pixels = ""
    if method.delta_w == 0 and method.delta_s == 1:
        all_pixels = (
            ": every pixel with a label or pseudo-label is valid and hard, so that the contrast has work for "
            "every class, though the networks are not pretrained"
        )
    return [
        f"delta_w {method.delta_w:g} and delta_s {method.delta_s:g}{all_pixels}",
        f"{method.anchors} anchors a class, {method.negatives} negatives an anchor, "
        f"{method.virtual_negatives} virtual negatives a class, tau {method.temperature:g}, local prototypes",
        f"images are decoded {workers}",
        "published is in float32 as published"
        + (" (its convolutions in TF32, as PyTorch has it by default)" if plan.device == "cuda" else "")
        + "; the others in "
        + {"off": "float32", "bf16": "bfloat16 autocast"}[plan.config.train.amp],
        *(
            [f"published is timed after all others, for {plan.published_seconds:g} s at most"]
            if _is_short(plan, "published")
            else []
        ),
    ]


def _row(plan: Plan, name: str, outcome: _Outcome) -> dict[str, Any]:
    times, report = outcome.times, outcome.report
    if outcome.failure is not None or not times or report is None:
        times, report = [], None
    median = percentile(times, 50) if times else None
    train = plan.config.train
    return {
        "candidate": name,
        "ms": median,
        "ms_20": percentile(times, 20) if times else None,
        "ms_80": percentile(times, 80) if times else None,
        "rounds": len(times),
        "steps_a_round": 1 if _is_short(plan, name) else plan.steps,
        "warmup_steps": None if report is None else report.warmup_steps,
        "every_ms": times,
        "images_per_second": None
        if median is None
        else 1e3 * (train.batch_labeled + train.batch_unlabeled) / median,
        "peak_bytes": None if report is None else report.peak_bytes,
        "reserved_bytes": None if report is None else report.reserved_bytes,
        "base_bytes": None if report is None else report.base_bytes,
        "parameters": None if report is None else report.parameters,
        "busy": None if report is None else report.busy,
        "parts_ms": None if report is None else report.parts_ms,
        "losses": None if report is None else _finite(report.losses),
        "note": outcome.failure or ("" if outcome.ran else "not run yet"),
    }


def _finite(losses: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN."""
    return {name: value if abs(value) < float("inf") else str(value) for name, value in losses.items()}
