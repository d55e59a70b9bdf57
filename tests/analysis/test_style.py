"""The style of figures: names of the user's, fonts, and environments that break matplotlib."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.font_manager import FontEntry, fontManager

from prcl_fast.analysis import style
from prcl_fast.analysis.panel import PanelRow, draw_panel
from prcl_fast.analysis.style import new_figure, plain_text, save_figure, styled

PALETTE = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [0, 0, 0]], np.uint8)


def test_names_of_classes_and_images_are_drawn_as_they_are(tmp_path: Path) -> None:
    classes = ("_background_", r"a$\frac$b", "$", "道路")
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    row = PanelRow("$image$_道路", np.zeros((8, 8, 3), np.uint8), ids, ids, None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_panel([row], classes, PALETTE, None)
        save_figure(figure, tmp_path / "panel.png")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [plain_text(name) for name in classes]
    assert (tmp_path / "panel.png").is_file()


def test_fonts_for_other_scripts_are_used_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = [*fontManager.ttflist, FontEntry(name="SimHei"), FontEntry(name="Noto Sans CJK SC")]
    monkeypatch.setattr(fontManager, "ttflist", fonts)
    found = style._installed_fonts.__wrapped__()
    assert [name for name in found if name in ("SimHei", "Noto Sans CJK SC")] == [
        "Noto Sans CJK SC",
        "SimHei",
    ]
    monkeypatch.setattr(style, "_installed_fonts", lambda: ("DejaVu Serif",))
    with styled():
        family = new_figure(1, 1).text(0, 0, "x").get_fontfamily()
    assert family == ["sans-serif", "DejaVu Serif"]


def test_commands_do_not_mind_a_notebooks_backend_or_a_folder_of_settings_that_cannot_be_written(
    tmp_path: Path,
) -> None:
    script = (
        "import prcl_fast.cli\nfrom prcl_fast.analysis.style import *\n"
        f"save_figure(new_figure(1, 1), Path({str(tmp_path / 'figure.png')!r}))"
    )
    environment = os.environ | {
        "MPLCONFIGDIR": "/proc/none",
    }
    for backend in ("module://matplotlib_inline.backend_inline", "nonsense"):
        result = subprocess.run(
            [sys.executable, "-c", script],
            env=environment | {"MPLBACKEND": backend},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
