"""Sweep files: their runs and configurations, and messages for mistakes."""

from __future__ import annotations

import pytest

from prcl_fast.errors import InputError
from prcl_fast.sweep.config import read_sweep
from support.made_up_runs import write_sweep


def test_the_runs_are_the_product_of_axes_and_seeds_in_safe_folders(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path))
    assert [run.name for run in sweep.runs][::3] == [
        "supervised/2/seed_0",
        "supervised/4/seed_1",
        "mean_teacher_classmix/4/seed_0",
    ]
    assert sweep.runs[6].entries == ("mean_teacher + classmix", "4")
    assert [run.config.seed for run in sweep.runs] == [0, 1] * 4
    assert all(run.config.output == tmp_path / "out" / run.name for run in sweep.runs)
    assert [run.config.method.name for run in sweep.runs[::4]] == ["supervised", "mean_teacher"]
    assert [run.config.data.synthetic.labeled for run in sweep.runs[::2]] == [2, 4, 2, 4]


def test_later_settings_win_and_another_method_starts_anew(tmp_path):
    axes = {
        "a": {"x": {"config": "none.yaml", "set": {"method.name": "prcl", "optim.lr": 2.0, "model.dim": 20}}},
        "b": {"y": {"config": "teacher.yaml", "set": {"optim.lr": 3.0}}},
    }
    values = {"optim.lr": 1.0, "model.dim": 10, "model.width": 32, "method.ema": 0.5}
    path = write_sweep(tmp_path, axes=axes, set=values, seeds=[7])
    (run,) = read_sweep(path, ["train.iterations=9", "model.width=48"]).runs
    config = run.config
    assert (config.seed, config.optim.lr, config.model.dim, config.model.width) == (7, 3.0, 20, 48)
    assert (config.method.name, config.method.tau, config.method.ema) == ("prcl", None, 0.99)
    assert config.train.iterations == 9


def test_placeholders_and_paths_are_those_of_the_run_and_the_file(tmp_path):
    values = {
        "data.labeled": "../splits/{labels}/{seed}/labeled.txt",
        "data.images": "{{name}}_{method}.png",
        "data.classes": ["{labels}", "1e-4", "off"],
        "data.label_map": {7: 1},
        "model": {"backbone": "resnet18", "weights": "r.pth"},
    }
    run = read_sweep(write_sweep(tmp_path, set=values)).runs[-1]
    data = run.config.data
    assert data.labeled == tmp_path / "study" / "../splits/4/1/labeled.txt"
    assert data.images == "{name}_mean_teacher + classmix.png"
    assert (data.classes, data.label_map) == (["4", "1e-4", "off"], {7: 1})
    assert run.config.model.weights == tmp_path / "study" / "r.pth"


def test_output_on_the_command_line_is_the_sweeps(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path), [f"output={tmp_path / 'other'}"])
    assert sweep.output == tmp_path / "other"
    assert sweep.runs[0].config.output == tmp_path / "other/supervised/2/seed_0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {}}, "axes: at least one axis is needed"),
        ({"axes": {"method": {}}}, "axes.method: at least one entry is needed"),
        ({"axes": {"m": {"a": {"confg": "x"}}}}, "axes.m.a: unknown key confg; did you mean config?"),
        ({"axes": {"m": {"a": None}}}, "axes.m.a: a section of keys is expected, got None"),
        ({"axes": {"m": {12: {}}}}, 'axes.m: the name 12 is not text; write it in quotes: "12"'),
        ({"axes": {"seed": {"a": {}}}}, "axes.seed: seeds are listed by the key seeds"),
        ({"axes": {"m": {"a b": {}, "A+b": {}}}}, "axes.m: 'a b' and 'A+b' would share the folder a_b"),
        ({"axes": {"m": {"..": {}}}}, "axes.m: '..' cannot be a folder name"),
        ({"seed": [0]}, "unknown key seed; did you mean seeds?"),
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: duplicate in [1, 1]"),
        ({"seeds": list(range(4000))}, "axes: 16000 runs; a sweep has at most 10000"),
        ({"config": "none.yaml"}, "none.yaml: no such configuration file"),
        (
            {"config": None},
            "config: required, because no axis names a configuration file for run superv",
        ),
        ({"set": {"optim.lrr": 1}}, "run supervised/2/seed_0: unknown key optim.lrr; did you mean lr?"),
        (
            {"set": {"data.val": "{label}.txt"}},
            "set.data.val: unknown placeholder {label}; known: {method}, ",
        ),
        ({"set": {"seed": 3}}, "set: seed of a run is set by the sweep's key seeds"),
        ({"set": {"optim.lr.x=1": 3}}, "set: key 'optim.lr.x=1' is not a name"),
        ({"set": {"seed_.x": 1, "a..b": 2}}, "set.a..b: an empty part"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path, changes, message):
    path = write_sweep(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        read_sweep(path)
    assert message in str(caught.value)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_configuration_of_a_run_is_told_from_a_sweep(tmp_path):
    path = write_sweep(tmp_path).with_name("base.yaml")
    with pytest.raises(InputError, match=r"base.yaml: the configuration of a run, not a sweep file"):
        read_sweep(path)
