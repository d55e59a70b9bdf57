"""`prcl eval`: the same mIoU as during training, overrides, and mistakes."""

from __future__ import annotations

import json

import pytest
import torch

from prcl_fast.cli.eval import evaluate_command
from prcl_fast.config import override_config
from prcl_fast.data.sources import build_source
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.errors import InputError
from prcl_fast.runs.checkpoint import load_run
from support.run_folders import write_run
from support.tiny import tiny_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "run"
    write_run(folder, tiny_tree(folder))
    return folder


def test_last_line_is_json_with_the_exact_digits_of_evaluate(run, capsys):
    loaded = load_run(run, CPU)
    source = build_source(loaded.config.data)
    expected = evaluate(loaded.networks, source, loaded.config.data, loaded.config.eval, CPU)
    evaluate_command(run, device="cpu")
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["miou"] == expected["teacher"].miou
    assert summary["miou_student"] == expected["student"].miou
    assert summary["iou"] == expected["teacher"].iou_by_class(source.classes)
    assert (summary["iterations"], summary["mode"], summary["images"]) == (40, "whole", 3)
    assert summary["output"] == str(run / "best.pt")
    assert summary["seconds"] >= 0
    assert all(name in printed.err for name in (*source.classes, "mean", "teacher", "student"))


def test_subset_chooses_the_images(run, capsys):
    loaded = load_run(run, CPU)
    source = build_source(loaded.config.data)
    expected = evaluate(
        loaded.networks, source, loaded.config.data, loaded.config.eval, CPU, subset="unlabeled"
    )
    evaluate_command(run, subset="unlabeled", device="cpu")
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["miou"] == expected["teacher"].miou
    assert (summary["subset"], summary["images"]) == ("unlabeled", len(source.splits["unlabeled"].names))
    with pytest.raises(InputError, match=r"subset: 'unlabelled' is not one of .*did you mean unlabeled"):
        evaluate_command(run, subset="unlabelled")


def test_overrides_reach_the_evaluation_and_nothing_else_changes(run, capsys, monkeypatch):
    seen = []

    def recording(networks, source, data, settings, device, **options):
        seen.append((data, settings, options["amp"]))
        return evaluate(networks, source, data, settings, device, **options)

    monkeypatch.setattr("prcl_fast.engine.evaluate.evaluate", recording)
    overrides = ["eval.mode=sliding", "eval.window=[48, 64]", "data.synthetic.val=2", "train.amp=bf16"]
    evaluate_command(run / "best.pt", overrides, device="cpu")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["mode"], summary["images"]) == ("sliding", 2)
    config = load_run(run, CPU).config
    expected = override_config(config, overrides)
    assert seen == [(expected.data, expected.eval, "bf16")]
    assert expected.eval == config.eval.model_copy(update={"mode": "sliding", "window": [48, 64]})


def test_an_override_of_the_trained_network_is_refused(run):
    with pytest.raises(InputError, match=r"^override 'model\.dim=4': eval takes data\.\*, eval\.\*"):
        evaluate_command(run, ["model.dim=4"], device="cpu")


def test_an_unknown_key_is_refused(run):
    with pytest.raises(InputError, match=r"eval\.mod"):
        evaluate_command(run, ["eval.mod=whole"], device="cpu")


def test_a_checkpoint_of_other_classes_than_the_data_is_refused(tmp_path):
    classes = tuple("abcd")
    write_run(tmp_path, tiny_tree(tmp_path, name="supervised"), classes)
    with pytest.raises(InputError, match=r"best\.pt: trained on 4 classes, the data set has"):
        evaluate_command(tmp_path, device="cpu")
    source_classes = build_source(load_run(tmp_path, CPU).config.data).classes
    write_run(tmp_path, tiny_tree(tmp_path, name="supervised"), ("sky", *source_classes[1:]))
    with pytest.raises(InputError, match=r"best\.pt: class 0 is 'sky' in the checkpoint"):
        evaluate_command(tmp_path, device="cpu")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"best\.pt"):
        evaluate_command(tmp_path, device="cpu")
