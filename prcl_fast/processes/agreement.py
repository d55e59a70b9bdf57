"""Agreement of the ranks: facts such as settings and data that must be equal on all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

from prcl_fast.console.text import excerpts, value_text
from prcl_fast.errors import InputError
from prcl_fast.processes.collectives import gathered, gathered_texts, world_size


class DifferenceError(InputError):
    """The ranks differ in a fact. It is raised on every rank with the same message, and each prints it."""


def check_same(facts: Mapping[str, object]) -> None:
    """Compares facts over all ranks: their hashes, and only where these differ their texts.

    A collective: every rank must call it. The order of the facts decides which difference is named.

    Args:
        facts: by the key that a message names; values that JSON can hold.

    Raises:
        DifferenceError: on every rank, naming the first fact that differs.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    found = gathered(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    if bool((found == found[0]).all()):
        return
    difference = first_difference([json.loads(text) for text in gathered_texts(json.dumps(facts))])
    raise DifferenceError(difference)


def first_difference(facts: Sequence[Mapping[str, object]]) -> str:
    """The first fact in which the ranks differ, in words; "" where all are equal.

    Args:
        facts: of each rank.
    """
    keys = dict.fromkeys(key for one in facts for key in one)
    # Facts that some ranks lack come last: they follow from others, as the keys of a method from its name.
    for key in sorted(keys, key=lambda key: not all(key in one for one in facts)):
        texts = [value_text(one[key]) if key in one else None for one in facts]
        for rank, text in enumerate(texts):
            if text != texts[0]:
                own, other = excerpts(text or "", texts[0] or "")
                own = f"no {key}" if text is None else f"{key} {own}"
                other = "none" if texts[0] is None else other
                return (
                    f"process {rank} has {own}, process 0 has {other}; it must be the same in all processes "
                    "of a run"
                )
    return ""
