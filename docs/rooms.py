"""Picture of the package's rooms and their imports, read from the source: `python docs/rooms.py`.

The rooms stand in the order of the import law, the ground at the bottom. An arc leads from a room down to
one that it imports; it is left out where a path of other arcs leads to the same room. The picture's text
field "Arcs" contains the arcs that it shows.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Arc, Rectangle

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prcl_fast"
PICTURE = ROOT / "docs" / "rooms.png"
FIELD = "Arcs"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#8a5a83", "#8c6d00", "#4d4d4d")
_WIDTH, _HEIGHT = 5.2, 0.72


def ordered_rooms() -> tuple[str, ...]:
    """The rooms from the ground up, as the import law lists them."""
    for node in ast.parse((ROOT / "tests" / "test_import_law.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            rooms: tuple[str, ...] = ast.literal_eval(node.value)
            return rooms
    raise ValueError("tests/test_import_law.py assigns no ROOMS")


def arcs() -> dict[str, list[str]]:
    """For each room, the rooms to which an arc leads, in the order of the law."""
    rooms = ordered_rooms()
    direct = {room: _imported_rooms(room) & set(rooms) - {room} for room in rooms}
    reached: dict[str, set[str]] = {}
    for room in rooms:
        reached[room] = direct[room].union(*(reached[below] for below in direct[room]))
    return {
        room: [
            below
            for below in rooms
            if below in direct[room] and not any(below in reached[other] for other in direct[room])
        ]
        for room in rooms
    }


def _imported_rooms(room: str) -> set[str]:
    folder = PACKAGE / room
    names: set[str] = set()
    for file in folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("prcl_fast.")}


def draw(path: Path = PICTURE) -> None:
    """Writes the picture."""
    shown = arcs()
    rooms = list(shown)
    figure, axes = plt.subplots(figsize=(6.6, 0.34 * len(rooms)), dpi=130)
    for height, room in enumerate(rooms):
        folder = (PACKAGE / room).is_dir()
        colour = _COLOURS[height % len(_COLOURS)]
        corner = (-_WIDTH, height - _HEIGHT / 2)
        axes.add_patch(
            Rectangle(corner, _WIDTH, _HEIGHT, facecolor="#eef3f7" if folder else "white", edgecolor=colour)
        )
        axes.text(
            -_WIDTH / 2, height, f"{room}/" if folder else f"{room}.py", ha="center", va="center", size=9
        )
        for below in shown[room]:
            end = rooms.index(below)
            middle, reach = (height + end) / 2, height - end
            axes.add_patch(
                Arc((0, middle), 1.1 * reach, reach, theta1=-90, theta2=90, color=colour, linewidth=1.2)
            )
            axes.plot(0.12, end, marker="<", color=colour, markersize=5)
    longest = max(rooms.index(room) - rooms.index(below) for room in rooms for below in shown[room])
    axes.set_xlim(-_WIDTH - 0.2, 0.55 * longest + 0.3)
    axes.set_ylim(-0.7, len(rooms) - 0.3)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={FIELD: json.dumps(shown)})
    plt.close(figure)


if __name__ == "__main__":
    draw()
