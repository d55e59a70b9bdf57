"""Figures of a finished run, from its metrics and its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prcl_fast.analysis.curves import draw_curves, draw_representation
from prcl_fast.analysis.panel import PanelRow, draw_panel
from prcl_fast.analysis.style import save_figure
from prcl_fast.config.methods import ConsistencyConfig
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.device import choose_device
from prcl_fast.engine.predict import predict_image
from prcl_fast.errors import InputError
from prcl_fast.files.folders import check_subfolder
from prcl_fast.files.locking import locked_folder
from prcl_fast.runs.checkpoint import LoadedRun, load_run
from prcl_fast.runs.metrics import read_metrics

PANEL_IMAGES = 4


def write_figures(run: str | Path, device: torch.device | None = None) -> list[Path]:
    """Writes RUN/figures: curves.png, panel.png and, if the method logs it, representation.png.

    Args:
        run: a run folder; the panel is of its best.pt, else of its last.pt.
        device: of the networks; None takes CUDA if it is available.

    Returns:
        The files written.

    Raises:
        FolderInUseError: another process draws them.
        InputError: no run folder; metrics, checkpoint or data cannot be read; a figure cannot be written.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    check_subfolder(run / "figures")
    with locked_folder(run / "figures", "figures"):
        return _write_figures(run, choose_device("auto") if device is None else device)


def _write_figures(run: Path, device: torch.device) -> list[Path]:
    metrics = read_metrics(run / "metrics.jsonl")
    figures = {"curves.png": draw_curves(metrics)}
    representation = draw_representation(metrics)
    if representation is not None:
        figures["representation.png"] = representation
    loaded = load_run(run, device)
    method = loaded.config.method
    delta_u = method.delta_u if isinstance(method, ConsistencyConfig) else None
    rows = panel_rows(loaded, build_source(loaded.config.data), device)
    figures["panel.png"] = draw_panel(rows, loaded.classes, loaded.palette, delta_u)
    paths = [run / "figures" / name for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        save_figure(figure, path)
    return paths


def panel_rows(
    run: LoadedRun, source: Source, device: torch.device, count: int = PANEL_IMAGES
) -> list[PanelRow]:
    """Evenly spaced validation images of the split, with pseudo-labels if there is a teacher."""
    names = source.splits["val"].names
    chosen = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [_panel_row(run, source, names[index], device) for index in chosen]


def _panel_row(run: LoadedRun, source: Source, name: str, device: torch.device) -> PanelRow:
    image = source.image(name)
    student = predict_image(run.networks["student"], image, run.config, device)
    teacher = (
        predict_image(run.networks["teacher"], image, run.config, device)
        if "teacher" in run.networks
        else None
    )
    return PanelRow(
        name,
        image,
        source.label(name),
        student.label,
        None if teacher is None else teacher.label,
        None if teacher is None else teacher.confidence,
        student.variance,
    )
