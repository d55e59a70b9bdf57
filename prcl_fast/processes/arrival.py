"""The arrival of a rank at the rendezvous: its announcement to the other ranks."""

from __future__ import annotations

import contextlib
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from prcl_fast import __version__
from prcl_fast.errors import InputError
from prcl_fast.processes.launch import Launch

CPU = "cpu"


class Arrival(NamedTuple):
    """The announcement of a rank.

    Attributes:
        device: "cpu", or the name of the rank's GPU.
        status: 0, or the exit status of the error for which the rank cannot begin.
        facts: must be equal on all ranks.
    """

    device: str
    status: int
    facts: Mapping[str, object]

    def to_text(self) -> str:
        """The announcement as the store holds it."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: bytes) -> Arrival:
        """The announcement in the store; with facts of no other rank where it was made by another version."""
        with contextlib.suppress(ValueError, TypeError):
            device, status, facts = json.loads(text)
            return cls(str(device), int(status), dict(facts))
        return cls("", 0, {"prcl_fast": "of another version"})


def arrival(launch: Launch, device: torch.device | Exception, command: str) -> Arrival:
    """The announcement of this rank; its facts are those without which ranks may not even form a group.

    Args:
        device: or the error for which the rank cannot begin.
        command: its name.
    """
    facts = {
        "command": command,
        "WORLD_SIZE": launch.world,
        "prcl_fast": __version__,
        # With another minor version of Python, a rank runs in another environment.
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "PyTorch": str(torch.__version__),
        "NumPy": np.__version__,  # its random numbers choose the images of a step
    }
    if isinstance(device, Exception):
        return Arrival("", 2 if isinstance(device, InputError) else 1, facts)
    if device.type == "cpu":
        return Arrival(CPU, 0, facts)
    return Arrival(f"GPU {torch.cuda.get_device_properties(device).uuid} of {socket.gethostname()}", 0, facts)


def misplaced(devices: Sequence[str]) -> str:
    """The reason for which ranks on these devices cannot form a group; "" where they can."""
    if CPU in devices and len(set(devices)) > 1:
        cpu, gpu = devices.index(CPU), next(rank for rank, name in enumerate(devices) if name != CPU)
        return f"rank {cpu} computes on the CPU, but rank {gpu} on {devices[gpu]}"
    for rank, name in enumerate(devices):
        owner = devices.index(name)
        if name != CPU and owner != rank:
            return f"ranks {owner} and {rank} share {name}; give each its own"
    return ""
