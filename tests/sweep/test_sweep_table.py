"""The table of a sweep: mean and standard deviation over seeds, files and figure."""

from __future__ import annotations

import csv
import json

import pytest

from prcl_fast.analysis.seed_statistics import Summary, cell_texts, markdown_table, summarize
from prcl_fast.cli.sweep import sweep_command
from prcl_fast.errors import InputError
from prcl_fast.sweep.config import read_sweep
from prcl_fast.sweep.figure import draw_sweep
from prcl_fast.sweep.table import read_table, write_table
from support.made_up_runs import finish, write_lines, write_made_up_run, write_sweep


def test_a_summary_is_mean_and_sample_deviation_of_what_is_there():
    assert summarize([33.0, None, 34.0, 36.5]) == Summary(34.5, pytest.approx(1.8028, abs=1e-4), 3)
    assert [str(summarize(values)) for values in ([33.31, 34.91], [34.06], [])] == [
        "34.1 ± 1.1",
        "34.1",
        "None",
    ]


def test_the_highest_means_of_a_column_are_bold_and_missing_cells_a_dash():
    cells = [Summary(1.0, None, 1), None, Summary(2.0, 0.5, 2), Summary(2.0, None, 1)]
    assert cell_texts(cells) == ["1.0", "-", "**2.0 ± 0.5**", "**2.0**"]
    assert cell_texts(cells[:2]) == ["1.0", "-"]
    assert markdown_table(["a|b", "c"], [["x", "1"]], names=1) == "| a\\|b | c |\n| --- | ---: |\n| x | 1 |\n"


def test_the_table_shows_last_and_best_evaluations_of_finished_runs(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path))
    scores = {"supervised/2": 30.0, "supervised/4": 40.0, "mean_teacher_classmix/2": 34.0}
    finish(sweep, lambda name: scores[name[:-7]] + 2 * int(name[-1]), but=2)
    write_made_up_run(sweep.runs[-1].config, {3: 99.0})
    path = write_table(read_table(sweep))
    assert path.read_text().splitlines()[2:10] == [
        "Validation mIoU in %, mean ± sample standard deviation over seeds 0, 1. "
        "2 of 8 runs are not finished.",
        "",
        "## Last evaluation",
        "",
        "| method / labels | 2 | 4 |",
        "| --- | ---: | ---: |",
        "| supervised | 31.0 ± 1.4 | 41.0 ± 1.4 |",
        "| mean_teacher + classmix | **35.0 ± 1.4** | - |",
    ]
    assert "| mean_teacher + classmix | **40.0 ± 1.4** | - |" in path.read_text()
    lines = list(csv.reader((tmp_path / "out/table.csv").open()))
    assert lines[0] == ["method", "labels", "seed", "miou", "miou_student", "best_miou", "seconds"]
    assert lines[2] == ["supervised", "2", "1", "32.0", "31.0", "37.0", "60.0"]
    assert lines[8] == ["mean_teacher + classmix", "4", "1", "", "", "", ""]
    tree = json.loads((tmp_path / "out/table.json").read_text())
    assert tree["runs"][7]["state"] == "unfinished at 3 of 6"
    cell = tree["cells"][2]
    assert cell["axes"] == {"method": "mean_teacher + classmix", "labels": "2"}
    assert cell["miou"] == pytest.approx({"mean": 35.0, "std": 2**0.5, "n": 2})
    assert {"versions", "machine", "commit"} <= tree.keys()
    assert (tmp_path / "out/table.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_metrics_of_a_finished_run_are_one_line(tmp_path):
    path = write_sweep(tmp_path)
    sweep = read_sweep(path)
    finish(sweep)
    file = sweep.runs[3].config.output / "metrics.jsonl"
    write_lines(file.parent, ["{half", *file.read_text().splitlines()])
    with pytest.raises(InputError, match=r"supervised/4/seed_1/metrics.jsonl:1: not a line of JSON"):
        sweep_command(path, table=True)


def test_an_axis_of_numbers_makes_lines_and_others_dots_in_order():
    means = {
        (row, str(n)): Summary(10.0 + n / 10 + shift, 1.0, 3)
        for row, shift in (("a", 0.0), ("b", 5.0))
        for n in (183, 92, 1464)
    }
    (axes,) = draw_sweep(["method", "labels"], means).axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["92", "183", "1464"]
    lines = {container.get_label(): container[0] for container in axes.containers}
    assert lines["b"].get_xydata()[:, 0].tolist() == [92, 183, 1464]
    assert lines["b"].get_xydata()[0, 1] == pytest.approx(24.2)
    low, high = axes.get_ylim()
    assert low < 18.2  # the lowest bar's end
    assert high > 162.4
    first, second = (lines[name].get_transform().transform((183, 30))[0] for name in "ab")
    assert first < second  # side by side
    (axes,) = draw_sweep(["K"], {("0",): Summary(1.0, None, 1), ("8",): Summary(2.0, None, 1)}).axes
    assert axes.get_xscale() == "linear"
    cells = {(row, "x"): Summary(mean, 1.0, 2) for row, mean in (("a", 2.0), ("b", 3.0), ("c", 1.0))}
    (axes,) = draw_sweep(["method", "backbone"], cells).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["c, x", "a, x", "b, x"]
    assert [container[0].get_xdata()[0] for container in axes.containers] == [1.0, 2.0, 3.0]
