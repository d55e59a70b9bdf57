"""Machine instructions of a compiled kernel's loops, from its SASS.

The time of an instruction-bound kernel follows from the instructions that its warps issue, which the
compiler's output shows without the device. `loops` finds the natural loops of the control-flow graph;
`Loop.issued` adds up the instructions that a warp issues in one trip. A predicated instruction counts even
when it is off, a rarely taken branch counts in full, and a function call counts as one instruction.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"^(@!?U?P\w+ )?BRA\b.*?0x([0-9a-f]+)$")
_LEAVES = re.compile(r"^(EXIT|RET|BRX|JMX)\b")  # without a predicate


@dataclass(frozen=True)
class Loop:
    """A natural loop; `instructions` are its own, without those of the loops inside it."""

    instructions: tuple[str, ...]
    inner: tuple[Loop, ...]

    def issued(self, *trips: float) -> float:
        """Instructions of one trip, with `trips[0]` trips of each loop inside, `trips[1]` inside those."""
        if self.inner and not trips:
            raise ValueError("a loop contains loops: pass how often they run")
        return len(self.instructions) + sum(trips[0] * loop.issued(*trips[1:]) for loop in self.inner)


def disassembler() -> str | None:
    """The path of cuobjdump: Triton's own, else the first on PATH, else None."""
    try:
        from triton import knobs

        bundled = Path(knobs.nvidia.cuobjdump.path)
    except (ImportError, AttributeError, RuntimeError):
        return shutil.which("cuobjdump")
    return str(bundled) if bundled.is_file() else shutil.which("cuobjdump")


def disassemble(cubin: bytes, name: str, cuobjdump: str) -> str:
    """The SASS of the function `name` of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    return next(function for function in functions if function.split()[0] == name)


def loops(sass: str) -> tuple[Loop, ...]:
    """The outermost loops of a function, in the order of their heads; inner loops hang below them."""
    found = _INSTRUCTION.findall(sass)
    address = {int(at, 16): index for index, (at, _) in enumerate(found)}
    text = [instruction for _, instruction in found]
    after = [_successors(index, text, address) for index in range(len(text))]
    before: list[list[int]] = [[] for _ in text]
    for index, targets in enumerate(after):
        for target in targets:
            before[target].append(index)
    bodies: dict[int, set[int]] = {}
    above = _dominators(after, before)
    for index, dominators in above.items():
        for head in set(after[index]) & dominators:
            bodies.setdefault(head, {head}).update(_reaching(index, head, before))
    return _nested(bodies, set(range(len(text))), text)


def _successors(index: int, text: list[str], address: dict[int, int]) -> tuple[int, ...]:
    following = (index + 1,) if index + 1 < len(text) else ()
    branch = _BRANCH.match(text[index])
    if branch:
        always = branch[1] is None and not re.search(r"\bBRA\S* !?U?P\w+,", text[index])
        return (address[int(branch[2], 16)], *(() if always else following))
    return () if _LEAVES.match(text[index]) else following


def _dominators(after: list[tuple[int, ...]], before: list[list[int]]) -> dict[int, set[int]]:
    """The dominators of each reachable instruction, itself included.

    The trap after a kernel's end, a branch to itself, is not reachable.
    """
    reached, waiting = {0}, [0]
    while waiting:
        new = set(after[waiting.pop()]) - reached
        reached |= new
        waiting += new
    order = sorted(reached)
    above = {index: set(order) for index in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for index in order[1:]:
            ways = [above[way] for way in before[index] if way in reached]
            now = set.intersection(*ways) | {index}
            changed |= now != above[index]
            above[index] = now
    return above


def _reaching(index: int, head: int, before: list[list[int]]) -> set[int]:
    """The instructions on paths to `index` that do not pass `head`, with both ends."""
    body, waiting = {head, index}, [index] if index != head else []
    while waiting:
        new = set(before[waiting.pop()]) - body
        body |= new
        waiting += new
    return body


def _nested(bodies: dict[int, set[int]], within: set[int], text: list[str]) -> tuple[Loop, ...]:
    here = {head: body for head, body in bodies.items() if body <= within and body != within}
    outermost = [
        head for head, body in sorted(here.items()) if not any(body < other for other in here.values())
    ]
    result = []
    for head in outermost:
        body = here[head]
        inner = {key: value for key, value in here.items() if value < body}
        of_inner = set().union(*inner.values())
        own = tuple(text[index] for index in sorted(body - of_inner))
        result.append(Loop(own, _nested(inner, body, text)))
    return tuple(result)
