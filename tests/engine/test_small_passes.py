"""Passes of one image over one pixel: batch norm has no statistics there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prcl_fast.config import Config, parse_config
from prcl_fast.data.batches import check_batches
from prcl_fast.data.sources import build_source
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.methods import build_method
from support.tiny import tiny_tree


def config(tmp_path: Path, method: dict[str, Any], crop: list[int], **train: int | bool) -> Config:
    tree = tiny_tree(tmp_path / "run", **method)
    tree["data"] |= {"crop": crop}
    tree["model"] |= {"base_width": 8}
    tree["train"] |= {"iterations": 2, "eval_every": 2} | train
    return parse_config(tree, "test")


ALONE = {"batch_labeled": 1, "batch_unlabeled": 1}
SEPARATE = {"name": "prcl", "mix": "none", "forward": "separate"}


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ({"name": "supervised"}, ALONE),
        ({"name": "supervised"}, {"batch_labeled": 2, "accumulate": 2}),
        ({"name": "mean_teacher", "mix": "none", "warmup": 1}, ALONE),
        ({"name": "cps", "mix": "none", "warmup": 1}, {"batch_labeled": 1, "batch_unlabeled": 2}),
        (SEPARATE, {"batch_labeled": 2, "batch_unlabeled": 1}),
        (SEPARATE, {"batch_labeled": 1, "batch_unlabeled": 2}),
    ],
)
def test_a_pass_without_batch_statistics_is_refused_before_anything_is_written(
    tmp_path: Path, method: dict[str, Any], train: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"^data\.crop: \[16, 16\] leaves one pixel .* train\.batch_labeled"):
        Trainer(config(tmp_path, method, [16, 16], **train), Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "crop", "train"),
    [
        ({"name": "supervised"}, [16, 17], ALONE),
        ({"name": "supervised"}, [16, 16], {"batch_labeled": 2}),
        *(
            ({"name": name, "mix": "none"}, [16, 16], ALONE)
            for name in ("prcl", "mean_teacher", "cps", "pps")
        ),
        (SEPARATE, [17, 16], ALONE),
    ],
)
def test_two_values_a_channel_are_enough(
    tmp_path: Path, method: dict[str, Any], crop: list[int], train: dict[str, Any]
) -> None:
    summary = Trainer(config(tmp_path, method, crop, **train), Console(quiet=True)).run()
    assert summary["iterations"] == 2


def test_images_of_all_processes_count_where_batch_norm_is_synchronised(tmp_path: Path) -> None:
    found = config(tmp_path, {"name": "supervised"}, [16, 16], batch_labeled=2)
    check_batches(build_source(found.data), found, world=2)
    alone = config(tmp_path, {"name": "supervised"}, [16, 16], batch_labeled=2, sync_bn=False)
    with pytest.raises(InputError, match=r"data\.crop: \[16, 16\]"):
        check_batches(build_source(alone.data), alone, world=2)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_an_image_of_one_pixel_can_be_segmented(tmp_path: Path, backbone: str) -> None:
    tree = tiny_tree(tmp_path / "run")
    tree["model"] |= {"backbone": backbone}
    method = build_method(parse_config(tree, "test"), 3).eval()
    with torch.no_grad():
        output = method.student(torch.zeros(1, 3, 1, 1))
    assert output.logits.shape == (1, 3, 1, 1)
    assert output.logits.isfinite().all()
