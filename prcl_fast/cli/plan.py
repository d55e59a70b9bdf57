"""`prcl plan CONFIG [key.path=value ...]`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from prcl_fast.cli.arguments import ConfigFile, Overrides
from prcl_fast.console import print_table, say
from prcl_fast.console.text import duration
from prcl_fast.files.json_text import json_text

if TYPE_CHECKING:
    from prcl_fast.config.paper import Difference
    from prcl_fast.planning.batch_plan import MemoryPlan, Micro, Remedy, TimePlan
    from prcl_fast.planning.plan import Plan


def plan_command(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: bytes, seconds, images.")
    ] = False,
) -> None:
    """Estimate memory, time and the largest batch of a run.

    The differences from the paper's settings are listed, too. A few real steps on random images are timed on
    this device, for at most about a minute. The data set is not needed, and nothing is written.
    """
    from prcl_fast.config import load_config
    from prcl_fast.planning.plan import make_plan

    plan = make_plan(load_config(config, overrides or ()))
    if as_json:
        say(json_text(dataclasses.asdict(plan)))
    else:
        _print(plan)


def _print(plan: Plan) -> None:
    crop = " x ".join(map(str, plan.crop))
    say(f"{plan.method}: {plan.backbone}, {plan.num_classes} classes, crop {crop}, on {plan.device}")
    say(
        f"{plan.iterations} iterations of {plan.batch_labeled} + {plan.batch_unlabeled} images (labeled + "
        f"unlabeled), in {plan.accumulate} {'pass' if plan.accumulate == 1 else 'passes'}"
    )
    title = f"Memory with {plan.memory.one_pass.labeled} + {plan.memory.one_pass.unlabeled} images a pass"
    print_table(title, ["", "MiB"], _memory_rows(plan.memory), right=(1,))
    if plan.time is None:
        say("Time: not measured, because even the smallest batch does not fit")
    else:
        print_table("Time", ["", "images", ""], _time_rows(plan, plan.time), right=(1, 2))
        say("measured on random images: without loading data, evaluation and checkpoints")
        if plan.time.rough:
            say("a rough estimate: more or larger steps would have taken too long to measure")
    for line in _batch_lines(plan):
        say(line)
    if plan.paper is None:
        say("paper: has no such data set, so no settings are compared")
    elif not plan.differences:
        say(f"{plan.paper} paper: no setting differs")
    else:
        rows = [(d.key, d.here, d.there, _origin(d, plan.paper), d.meaning) for d in plan.differences]
        title = (
            f"Differences from PRCL in the {plan.paper} paper; public code: the value is from its authors' "
            "code, not from its text; ours: from neither"
        )
        print_table(title, ["key", "here", "there", "source", "what it means"], rows)
    for note in plan.notes:
        say(f"note: {note}")


def _origin(difference: Difference, paper: str) -> str:
    return f"{paper} {difference.section}" if difference.source == "paper" else difference.source


def _memory_rows(memory: MemoryPlan) -> list[tuple[str, str]]:
    states, one_pass = memory.states, memory.one_pass
    rows = [
        ("student", states.student),
        ("teacher", states.teacher),
        ("prototypes", states.prototypes),
        ("momentum", states.momentum),
        ("kept for the backward pass", one_pass.saved),
        (
            f"gradients (of {_mib(memory.gradients)}) and transients at the peak",
            one_pass.peak - one_pass.saved,
        ),
        ("allocator and libraries, by measured steps", memory.overhead),
        ("together", memory.total),
    ]
    if memory.free is not None:
        rows.append(("free now", memory.free))
    return [(name, _mib(size)) for name, size in rows if size]


def _time_rows(plan: Plan, time: TimePlan) -> list[tuple[str, str, str]]:
    rows = []
    for found in time.measured:
        images = f"{found.labeled} + {found.unlabeled}"
        rows.append(
            (f"forward and backward pass, measured ({found.steps})", images, duration(found.pass_seconds))
        )
    rows.append(("optimiser and teacher, measured", "", duration(time.update_seconds)))
    labeled, unlabeled = plan.batch_labeled, plan.batch_unlabeled
    passes = f" of {time.accumulate} passes" if time.accumulate > 1 else ""
    rows.append((f"step{passes}", f"{labeled} + {unlabeled}", duration(time.step_seconds)))
    rows.append((f"run of {plan.iterations} iterations", "", duration(time.run_seconds)))
    return rows


def _batch_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    if memory.free is None:
        return ["batch: the free memory of this system is not known"]
    lines = []
    if memory.fits:
        lines.append(f"batch: fits, {_share(memory.total, memory.free)} of the free memory")
    else:
        lines.append(f"batch: does not fit, {_share(memory.total, memory.free)} of the free memory")
    if plan.remedy is not None:
        lines.append(f"to make it fit: {_remedy(plan.remedy)}")
    if plan.largest is not None:
        lines.append(f"largest pass that fits: {_micro(plan.largest)}")
    if plan.paper_batch is not None:
        there = plan.paper_batch
        lines.append(f"for the paper's batch of {there.labeled} + {there.unlabeled}: {_remedy(there)}")
    return lines


def _remedy(remedy: Remedy) -> str:
    if remedy.accumulate is None:
        return (
            f"no train.accumulate is enough: {_micro(remedy.micro)} do not fit; a smaller data.crop or "
            "model.backbone, or train.amp=bf16, needs less"
        )
    return f"{' '.join(remedy.overrides)} ({_micro(remedy.micro)} a pass)"


def _micro(micro: Micro) -> str:
    return f"{micro.labeled} + {micro.unlabeled} images, {_mib(micro.bytes)} MiB"


def _share(size: int, free: int) -> str:
    return f"{size / free:.0%}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}" if size < 10 * 2**20 else f"{size / 2**20:.0f}"
