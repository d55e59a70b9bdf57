"""`prcl compare`: grouping of runs, columns and warnings."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prcl_fast.analysis.comparison import Comparison, compare, find_runs
from prcl_fast.analysis.comparison_files import draw_comparison, write_comparison
from prcl_fast.cli.compare import compare_command
from prcl_fast.config import NEUTRAL_KEYS, config_fingerprint, override_config, parse_config
from prcl_fast.config.files import apply_override
from prcl_fast.errors import InputError
from prcl_fast.runs.folder import settings
from prcl_fast.runs.provenance import add_record
from support.made_up_runs import write_lines, write_made_up_run
from support.tiny import tiny_tree

SPLITS = "data.labeled=/splits/{labels}/{seed}/labeled.txt", "data.unlabeled=/splits/{labels}/{seed}/rest.txt"


def make(folder: Path, *overrides: str, scores: dict[int, float] | None = None, **options: Any) -> Path:
    tree = tiny_tree(folder)
    for override in overrides:
        apply_override(tree, override)
    return write_made_up_run(
        parse_config(tree, "test"), {3: 20.0, 6: 30.0} if scores is None else scores, **options
    )


def compared(*folders: Path) -> Comparison:
    return compare(find_runs(folders))


def on_split(labels: int, seed: int) -> list[str]:
    return [f"seed={seed}", *(text.format(labels=labels, seed=seed) for text in SPLITS)]


def test_runs_that_differ_by_seed_output_and_seeded_split_form_one_row(tmp_path):
    for labels in (12, 23):
        for seed in (0, 1, 2):
            scores = {3: 50.0, 6: 10.0 * labels + seed}
            make(tmp_path / f"{labels}_{seed}", *on_split(labels, seed), scores=scores, seconds=60.0 * seed)
    comparison = compared(tmp_path)
    assert comparison.header() == ["method", "labeled", "seeds", "mIoU", "best", "iterations", "time"]
    assert comparison.rows() == [
        ["prcl", "12", "3", "121.0 ± 1.0", "121.0 ± 1.0", "6", "60 s"],
        ["prcl", "23", "3", "**231.0 ± 1.0**", "**231.0 ± 1.0**", "6", "60 s"],
    ]
    assert comparison.warnings == ()


def test_a_number_in_a_path_that_is_a_seed_by_chance_separates_nothing(tmp_path):
    for seed in (0, 1):
        make(tmp_path / f"run{seed}", f"seed={seed}", "data.labeled=/data/1/labeled.txt")
    (group,) = compared(tmp_path).groups
    assert group.settings["data.labeled"] == "/data/1/labeled.txt"


def test_settings_that_one_method_lacks_or_that_shape_no_result_are_no_columns(tmp_path):
    make(tmp_path / "a", "train.log_every=7", "data.workers=1")
    make(tmp_path / "b", "method.tau=0.25", "optim.lr=0.001")
    make(tmp_path / "c", "method.name=supervised")
    comparison = compared(tmp_path)
    assert comparison.columns == {
        "method": ["prcl", "prcl", "supervised"],
        "tau": ["none", "0.25", "-"],
        "lr": ["0.0064", "0.001", "0.0064"],
    }
    assert [comparison.label(index) for index in range(3)][1:] == [
        "prcl, tau 0.25, lr 0.001",
        "supervised, lr 0.0064",
    ]


def test_columns_whose_short_names_would_be_equal_keep_their_long_ones(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", "data.crop=[32, 64]", "eval.mode=center", "eval.crop=[32, 32]")
    columns = compared(tmp_path).columns
    assert columns["data.crop"] == ["64 64", "32 64"]
    assert columns["eval.crop"] == ["none", "32 32"]
    assert columns["mode"] == ["whole", "center"]


def test_a_run_is_found_once_however_it_is_named(tmp_path):
    run = make(tmp_path / "deep" / "run")
    assert [found.folder for found in find_runs([run, tmp_path, run / ".." / "run"])] == [run]


def test_other_validation_or_evaluation_is_warned_of_and_nothing_else(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", "eval.window=[64, 64]", "eval.batch=2", "data.synthetic.labeled=3")
    assert compared(tmp_path).warnings == ()
    make(tmp_path / "c", "data.synthetic.val=4", "eval.flip=true")
    (warning,) = compared(tmp_path).warnings
    assert "cannot be compared: eval.flip, data.synthetic.val differ" in warning


def test_unfinished_runs_and_equal_seeds_are_warned_of(tmp_path):
    make(tmp_path / "a", scores={3: 20.0}, until=4)
    make(tmp_path / "b")
    unfinished, twice = compared(tmp_path).warnings
    assert unfinished == f"1 of 2 runs are not finished, the first is {tmp_path / 'a'}"
    assert twice.startswith(f"a row contains runs of the same seed, the first is {tmp_path / 'a'}")
    assert compared(tmp_path).rows()[0][-2] == "4 of 6"


def test_a_run_that_has_just_started_has_no_results_yet(tmp_path):
    write_lines(make(tmp_path / "a"), [])
    assert compared(tmp_path).rows() == [["prcl", "1", "-", "-", "0 of 6", "-"]]


def test_what_is_no_run_or_damaged_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such run folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(
        InputError, match=r"no run in this folder or below it: no folder holds metrics.jsonl and config.yaml"
    ):
        find_runs([tmp_path])
    begun = make(tmp_path / "begun")
    (begun / "metrics.jsonl").unlink()
    for path in (begun, tmp_path):
        with pytest.raises(InputError, match=rf"{path}: the run in {begun} has no metrics\.jsonl yet; it is"):
            find_runs([path])
    write_lines(begun, [])
    (begun / "config.yaml").unlink()
    with pytest.raises(InputError, match=rf"{begun}: config\.yaml is missing, so its run cannot be compared"):
        find_runs([begun])
    run = make(tmp_path / "a")
    write_lines(run, ['{"kind": "eval", "iteration": 3, "miou": "high"}'])
    with pytest.raises(InputError, match=r"a/metrics.jsonl:1: miou: expected a number, got 'high'"):
        find_runs([tmp_path])


def test_the_files_hold_the_table_one_line_a_run_and_where_they_were_made(tmp_path):
    for seed in (0, 1):
        make(tmp_path / "runs" / f"{seed}", f"seed={seed}", scores={3: 40.0, 6: 30.0 + seed})
    add_record(tmp_path / "runs" / "0", {"commit": "abc"})
    paths = write_comparison(compared(tmp_path / "runs"), tmp_path / "out")
    assert [path.name for path in paths] == ["compare.md", "compare.csv", "compare.json", "compare.png"]
    assert "| prcl | 2 | 30.5 ± 0.7 | 40.0 ± 0.0 | 6 | 60 s |" in paths[0].read_text()
    lines = list(csv.DictReader(paths[1].open()))
    assert [(line["seed"], line["miou"], line["best_miou"]) for line in lines] == [
        ("0", "30.0", "40.0"),
        ("1", "31.0", "40.0"),
    ]
    tree = json.loads(paths[2].read_text())
    assert tree["groups"][0]["miou"] == pytest.approx({"mean": 30.5, "std": 0.5**0.5, "n": 2})
    assert tree["versions"]["torch"]
    assert [run["starts"] for run in tree["groups"][0]["runs"]] == [[{"commit": "abc"}], []]
    assert paths[3].read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_in_a_band_of_one_deviation_at_shared_iterations(tmp_path):
    make(tmp_path / "0", "seed=0", scores={2: 10.0, 4: 20.0, 6: 30.0})
    make(tmp_path / "1", "seed=1", scores={2: 12.0, 4: 26.0})
    axes = draw_comparison(compared(tmp_path)).axes[0]
    (line,) = axes.get_lines()
    assert np.array_equal(line.get_xydata(), [[2, 11], [4, 23]])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(11 - 2**0.5)
    assert band[:, 1].max() == pytest.approx(23 + 18**0.5)


def test_the_command_prints_the_table_and_the_warnings(tmp_path, capsys):
    make(tmp_path / "a", "method.tau=0.25")
    make(tmp_path / "b", "eval.flip=true")
    compare_command([tmp_path], tmp_path / "out")
    out, error = capsys.readouterr()
    assert "tau" in out
    assert "0.25" in out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "compare.png")
    assert error == (
        "warning: the runs were evaluated differently, so their mIoU cannot be compared: eval.flip differ\n"
    )


def test_the_settings_are_exactly_what_the_fingerprint_sees(tmp_path):
    config = parse_config(tiny_tree(tmp_path), "test")
    seen = settings(config)
    neutral = {"train.threads": 3, "train.device": "cuda", "data.cache": "ram", "data.cache_dir": "x"}
    neutral |= {"train.stall_timeout": 5.0, "train.on_nonfinite": "skip", "output": "elsewhere"}
    tried = 0
    for key, value in [*seen.items(), *((key, None) for key in NEUTRAL_KEYS)]:
        new = neutral.get(key, not value if isinstance(value, bool) else value)
        if type(value) in (int, float):
            new = value * 2 if value else 1
        holder: Any = config
        for name in key.split("."):
            holder = getattr(holder, name)
        if key in NEUTRAL_KEYS and key not in neutral:
            new = not holder if isinstance(holder, bool) else holder + 1
        if new == value and key not in NEUTRAL_KEYS:
            continue
        try:
            other = override_config(config, [f"{key}={json.dumps(new)}"])
        except InputError:
            continue
        tried += 1
        assert (config_fingerprint(other) == config_fingerprint(config)) == (key in NEUTRAL_KEYS), key
    assert tried > 30
