"""Processes for tests: a process group that runs function after function, and launched commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
_SECONDS = 120


class Pair:
    """Calls `function(rank, *arguments)` on all processes at once, mostly two; the results by rank."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for connection in self._connections:
            assert connection.poll(_SECONDS), f"{function.__name__} hangs"
            answers.append(connection.recv())
        for failure, _ in answers:
            assert failure is None, failure
        return [result for _, result in answers]


@contextmanager
def pair(folder: Path, world: int = WORLD) -> Iterator[Pair]:
    """Starts the processes, and ends them with the block."""
    context = mp.get_context("spawn")
    ends = [context.Pipe() for _ in range(world)]
    workers = [
        context.Process(target=_serve, args=(rank, world, str(folder / "store"), child), daemon=True)
        for rank, (_, child) in enumerate(ends)
    ]
    for worker in workers:
        worker.start()
    try:
        yield Pair([parent for parent, _ in ends])
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _serve(rank: int, world: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((None, function(rank, *arguments)))
        except Exception:
            connection.send((traceback.format_exc(), None))


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def launch(
    *arguments: str, world: int = WORLD, last: Sequence[str] = (), **options: Any
) -> list[subprocess.Popen[str]]:
    """Starts `prcl ARGUMENTS` in `world` processes, each a process group, with torchrun's environment.

    Args:
        last: more arguments of the last rank.
    """
    port = free_port()
    started = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "prcl_fast.cli.main", *arguments]
        command += last if rank == world - 1 else []
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                **options,
            )
        )
    return started
