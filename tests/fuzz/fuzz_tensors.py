"""Checkpoints and weights files spoilt at random."""

from __future__ import annotations

import io
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_bytes import Case, damaged
from fuzz_text import EXTREMES
from torch import Tensor

from prcl_fast.runs.checkpoint import load_checkpoint, save_checkpoint


class Intruder:
    """Makes the folder `intruded` when a reader that runs code unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("intruded",))


def checkpoint(rng: random.Random, folder: Path) -> Case:
    path = folder / "run" / "last.pt"
    if rng.random() < 0.65:
        state = load_checkpoint(path)
        for _ in range(rng.randint(1, 2)):
            _change_state(rng, state)
        save_checkpoint(path, state)
    else:
        _spoil_tensor_file(rng, path)
    commands = [["eval", "run"], ["eval", "run/last.pt"], ["train", "run.yaml"], ["train", "run.yaml"]]
    return Case(rng.choice(commands), ("last.pt", "output: run"))


def weights(rng: random.Random, folder: Path) -> Case:
    path = folder / rng.choice(["backbone.pth", "network.pth"])
    if rng.random() < 0.4:
        state = torch.load(path, weights_only=True)
        for _ in range(rng.randint(1, 2)):
            _change_state(rng, state)
        torch.save(state, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    else:
        _spoil_tensor_file(rng, path)
    return Case(["train", "run.yaml", "output=out", f"model.weights={path.name}"], (path.name,))


def _change_state(rng: random.Random, state: dict[Any, Any]) -> None:
    """Changes an entry of a mapping or list somewhere in a state."""
    holder: Any = state
    for _ in range(rng.randint(0, 5)):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        below = holder[rng.choice(keys)] if keys else None
        if not isinstance(below, (dict, list)) or not below:
            break
        holder = below
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key, way = rng.choice(keys), rng.randrange(6)
    value = holder[key]
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice([f"{key}x", 7, None, ""])] = holder.pop(key)
    elif isinstance(value, Tensor) and way < 5:
        holder[key] = rng.choice(_TENSOR_CHANGES)(value)
    else:
        holder[key] = rng.choice([*EXTREMES, torch.zeros(3), torch.tensor(0.5)])


_TENSOR_CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor.to(torch.int8),
    lambda tensor: tensor.to(torch.bool),
    lambda tensor: tensor.half(),
    lambda tensor: tensor[None],
    lambda tensor: tensor.flatten()[:1],
    lambda tensor: torch.zeros(0),
    lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to("meta"),
    lambda tensor: torch.zeros(1).expand(2**40),
    lambda tensor: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else -1),
    lambda tensor: tensor.requires_grad_() if tensor.is_floating_point() else tensor,
]


def _spoil_tensor_file(rng: random.Random, path: Path) -> None:
    content, way = path.read_bytes(), rng.randrange(4)
    if way == 0:
        content = damaged(rng, content)
    elif way == 1:
        content = pickle.dumps({"format": Intruder()}, protocol=rng.choice([0, 2, 4]))
    else:
        content = _other_archive(rng, content)
    path.write_bytes(content)


def _other_archive(rng: random.Random, content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        entries = [(info.filename, source.read(info)) for info in source.infolist()]
    pickled = next(index for index, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    place, way = rng.choice([pickled, rng.randrange(len(entries))]), rng.randrange(9)
    name, data = entries[place]
    compression = zipfile.ZIP_STORED
    if way == 0:
        del entries[place]
    elif way == 1:
        entries[place] = (rng.choice(["../x", "/x", name.upper(), name + "x", ""]), data)
    elif way == 2:
        entries.insert(rng.randrange(len(entries)), (name, rng.randbytes(40)))
    elif way == 3:
        compression = zipfile.ZIP_DEFLATED
        entries[place] = (name, data + bytes(10**6))
    elif way == 4:
        entries[pickled] = (entries[pickled][0], pickle.dumps(Intruder(), protocol=2))
    elif way == 5:
        entries[pickled] = (entries[pickled][0], pickle.dumps(rng.choice(EXTREMES), protocol=2))
    else:
        entries[place] = (name, damaged(rng, data))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    made = target.getvalue()
    # The directory at the end holds sizes and offsets.
    return made[:-200] + damaged(rng, made[-200:]) if way == 8 else made
