"""The launch environment: rank, world size and address, as torchrun or srun set them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from prcl_fast.device import choose_device
from prcl_fast.errors import InputError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NOT_SRUN = 0xFFFFFFF0  # step ids from here on belong to a job's script, its salloc shell and its daemons
_RANGES = r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*"
_HOST = rf"(?:[\w.-]|\[{_RANGES}\])+"


@dataclass(frozen=True)
class Launch:
    """The place of this process in a run of `world` processes, `local_world` of them on this machine.

    Rank 0 listens at `address`:`port`; `by` names the launcher.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    by: Literal["torchrun", "slurm"]


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """The launch that torchrun, or else srun, describes in `environ`; None for a run of one process.

    Raises:
        InputError: a variable is missing, is no number or contradicts another one.
    """
    if "RANK" in environ or "LOCAL_RANK" in environ:
        launch = _torchrun(environ)
    elif "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < _NOT_SRUN:
        if _tasks(environ) == 1:
            return None
        launch = _srun(environ)
    elif "WORLD_SIZE" in environ and "SLURM_JOB_ID" not in environ:
        launch = _torchrun(environ)  # it raises, naming the missing variable
    else:
        return None
    for name, index, count in (
        ("rank", launch.rank, launch.world),
        ("local rank", launch.local_rank, launch.local_world),
    ):
        if index >= count:
            raise InputError(f"{launch.by} set {name} {index} of {count}; ranks count from 0")
    if launch.local_world > launch.world:
        raise InputError(
            f"{launch.by} set {launch.local_world} processes on this machine, but {launch.world} in all"
        )
    if not 0 < launch.port < 65536:
        raise InputError(f"MASTER_PORT: {launch.port} is not a port")
    return launch if launch.world > 1 else None


def expand_hosts(nodes: str) -> list[str]:
    """The host names of a SLURM node list, such as "gpu[003-005,7],cpu1".

    Raises:
        InputError: this is no node list.
    """
    hosts: list[str] = []
    if re.fullmatch(rf"{_HOST}(?:,{_HOST})*", nodes):
        for host in re.findall(_HOST, nodes):
            parts = re.split(r"\[(.*?)\]", host)  # plain, in brackets, plain, ...
            choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
            hosts += ["".join(chosen) for chosen in itertools.product(*choices)]
    if not hosts:
        raise InputError(f"SLURM_STEP_NODELIST: {nodes!r} is not a list of nodes")
    return hosts


def device_of(launch: Launch | None, name: str) -> torch.device:
    """The device of this process for the name "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: this machine has no such device, or has fewer devices than processes.
    """
    device = choose_device(name)
    if launch is None or launch.local_world == 1 or device.type == "cpu":
        return device
    if name.startswith("cuda:"):
        raise InputError(f"train.device: {name} for each of {launch.local_world} processes; use cuda")
    visible = torch.cuda.device_count()
    if visible == 1 and launch.by == "slurm":
        return torch.device("cuda", 0)  # each task has its own; `join` refuses a GPU given to two
    if launch.local_world > visible:
        raise InputError(
            f"{launch.by} started {launch.local_world} processes on this machine, which shows them {visible} "
            "CUDA devices; start one a device"
        )
    return torch.device("cuda", launch.local_rank)


def _torchrun(environ: Mapping[str, str]) -> Launch:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        found = next(name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environ)
        raise InputError(
            f"{found} is set as by torchrun, but {missing[0]} is not; start with torchrun or unset it"
        )
    if not environ["MASTER_ADDR"]:
        raise InputError("MASTER_ADDR: is empty")
    numbers = {name: _number(environ, name) for name in _TORCHRUN if name != "MASTER_ADDR"}
    return Launch(
        rank=numbers["RANK"],
        world=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world=numbers["LOCAL_WORLD_SIZE"],
        address=environ["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
        by="torchrun",
    )


def _srun(environ: Mapping[str, str]) -> Launch:
    world = _tasks(environ)
    rank, step = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_ID")
    if "WORLD_SIZE" in environ and _number(environ, "WORLD_SIZE") != world:
        raise InputError(f"WORLD_SIZE is {environ['WORLD_SIZE']}, but srun started {world} tasks")
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
    else:
        # Equal on every task, and different for steps that may run at the same time.
        port = 20000 + (7919 * _number(environ, "SLURM_JOB_ID") + step) % 10000
    nodes = _first_set(environ, "SLURM_STEP_NODELIST", "SLURM_NODELIST")
    return Launch(
        rank=rank,
        world=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world=_tasks_here(environ, world),
        address=environ.get("MASTER_ADDR") or expand_hosts(environ[nodes])[0],
        port=port,
        by="slurm",
    )


def _tasks(environ: Mapping[str, str]) -> int:
    return _number(environ, _first_set(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))


def _tasks_here(environ: Mapping[str, str], world: int) -> int:
    """The number of tasks on this node, from SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1"."""
    name = _first_set(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", environ[name]):
        raise InputError(f"{name}: {environ[name]!r} is not a list of counts")
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ[name]):
        counts += [int(count)] * int(repeat or 1)
    if sum(counts) != world:
        raise InputError(f"{name}: {environ[name]} makes {sum(counts)} tasks, but srun started {world}")
    if len(set(counts)) == 1:
        return counts[0]
    node = _number(environ, "SLURM_NODEID")
    if not node < len(counts):
        raise InputError(f"SLURM_NODEID is {node}, but {name}: {environ[name]} is for {len(counts)} nodes")
    return counts[node]


def _numbers(ranges: str) -> list[str]:
    """The numbers of "003-005,7", each with the leading zeros of the first one of its range."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def _first_set(environ: Mapping[str, str], *names: str) -> str:
    for name in names:
        if name in environ:
            return name
    raise InputError(f"SLURM_STEP_ID is set as by srun, but {names[0]} is not")


def _number(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise InputError(f"SLURM_STEP_ID is set as by srun, but {name} is not")
    if not re.fullmatch(r"[0-9]+", environ[name]):
        raise InputError(f"{name}: {environ[name]!r} is not a whole number from 0")
    return int(environ[name])
