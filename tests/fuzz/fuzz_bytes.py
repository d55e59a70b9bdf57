"""Damaged bytes, and the type of a spoilt input."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A command line, words of which the error message must contain one, and what the command may write."""

    arguments: list[str]
    named: tuple[str, ...]
    written: tuple[str, ...] = ("out", "run/config.yaml", "run/log.txt")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The bytes with one to three faults of a disk, a network or a hand."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([1, 2, 4, 16, 256]))
        fault = rng.randrange(7)
        if fault == 0 and data:
            for _ in range(rng.choice([1, 4, 32])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif fault == 1:
            del data[start:]
        elif fault == 2:
            del data[start:end]
        elif fault == 3:
            data[start:start] = data[start:end] * rng.choice([1, 3, 50])
        elif fault == 4:
            data[start:start] = rng.randbytes(rng.choice([1, 4, 64]))
        elif fault == 5:
            extreme = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
            data[start:end] = struct.pack(rng.choice("<>") + "I", extreme)
        elif data:
            # The head of a file holds its sizes.
            data[rng.randrange(min(len(data), 64))] = rng.randrange(256)
    return bytes(data)
