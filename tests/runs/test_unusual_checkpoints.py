"""Checkpoints with a right checksum whose contents cannot be used: one line each, before memory is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from prcl_fast.analysis.comparison import compare, find_runs
from prcl_fast.analysis.comparison_files import write_comparison
from prcl_fast.analysis.figures import write_figures
from prcl_fast.config import SyntheticConfig, load_config, load_stored_config, parse_config
from prcl_fast.data.sources.splits import read_split
from prcl_fast.data.sources.synthetic import write_synthetic
from prcl_fast.data.tools.mask_convert import convert_masks
from prcl_fast.data.tools.split_tools import write_lines
from prcl_fast.engine.predict import predict_files
from prcl_fast.engine.predict_inputs import find_images
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.methods import build_method
from prcl_fast.runs.checkpoint import find_checkpoint, load_checkpoint, load_run, save_checkpoint
from prcl_fast.runs.metrics import read_metrics, read_result
from prcl_fast.runs.trained_network import export_network, network_of_run
from support.run_folders import write_run
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_backbones() -> Iterator[None]:
    with small_backbones():
        yield


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint that another program could have written."""
    write_run(folder, tiny_tree(folder / "run"))
    state = load_checkpoint(folder / "best.pt")
    change(state)
    save_checkpoint(folder / "best.pt", state)
    return folder / "best.pt"


def first_weight(state: dict[str, Any]) -> str:
    method: dict[str, Tensor] = state["method"]
    return next(key for key, value in method.items() if value.dim() == 4)


def with_nan(state: dict[str, Any]) -> None:
    state["method"][first_weight(state)].fill_(float("nan"))


def with_infinity(state: dict[str, Any]) -> None:
    for value in state["method"].values():
        if value.is_floating_point():
            value.fill_(float("inf"))


def with_integers(state: dict[str, Any]) -> None:
    state["method"][first_weight(state)] = state["method"][first_weight(state)].long()


def claiming(state: dict[str, Any]) -> None:
    state["method"][first_weight(state)] = torch.zeros(1).expand(state["method"][first_weight(state)].shape)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "one value": (with_nan, r".*weight has values that are not finite$"),
    "all values": (with_infinity, r".* has values that are not finite \(and \d+ more\)$"),
    "integers": (
        with_integers,
        r"does not fit .* 1 keys at fault: .*weight is torch\.int64",
    ),
    "expanded": (claiming, r"damaged checkpoint: .*weight is \[.*\], the file has 4 bytes of it"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, change: str) -> None:
    make, message = CHANGES[change]
    path = changed(tmp_path, make)
    with pytest.raises(InputError, match=rf"best\.pt: {message}"):
        load_run(path, CPU)


@pytest.mark.parametrize("names", [[], ["a"], ["a"] * 256])
def test_a_number_of_classes_that_no_data_set_has_is_refused(tmp_path: Path, names: list[str]) -> None:
    palette = [[0, 0, 0]] * len(names)
    path = changed(tmp_path, lambda state: state.update(classes=names, palette=palette))
    with pytest.raises(InputError, match=r"best\.pt: .*classes"):
        load_run(path, CPU)


def test_a_run_does_not_resume_from_weights_that_are_not_finite(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path / "run", name="supervised"), "tiny")
    Trainer(config, Console(quiet=True)).run()
    last = tmp_path / "run" / "last.pt"
    whole = load_checkpoint(last)
    for spoil in (with_nan, _spoil_momentum):
        state = load_checkpoint(last)
        spoil(state)
        save_checkpoint(last, state)
        with pytest.raises(InputError, match=r"last\.pt: .*not finite$"):
            Trainer(config, Console(quiet=True))
        save_checkpoint(last, whole)


def _spoil_momentum(state: dict[str, Any]) -> None:
    entry = next(iter(state["optimizer"]["state"].values()))
    entry["momentum_buffer"].fill_(float("nan"))


@pytest.mark.parametrize(("key", "value"), [("dim", 4096), ("width", 4096)])
def test_shapes_are_compared_before_a_network_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: int
) -> None:
    path = changed(tmp_path, lambda state: state["config"]["model"].update({key: value}))
    devices = []

    def recorded(*arguments: Any) -> Any:
        method = build_method(*arguments)
        devices.append(next(method.parameters()).device.type)
        return method

    monkeypatch.setattr("prcl_fast.runs.checkpoint.build_method", recorded)
    with pytest.raises(InputError, match=r"best\.pt: does not fit its own configuration, \d+ keys at fault"):
        load_run(path, CPU)
    assert devices == ["meta"]


def test_a_dimension_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda state: state["config"]["model"].update(dim=10**6))
    with pytest.raises(InputError, match=r"best\.pt: model\.dim: input should be less than or equal to 4096"):
        load_run(path, CPU)


@pytest.mark.parametrize("name", ["supervised", "mean_teacher", "prcl", "pcr", "cps", "pps"])
def test_every_method_is_built_on_the_meta_device(tmp_path: Path, name: str) -> None:
    extra = {"heads": 2, "layers": 1} if name == "pps" else {"warmup": 1} if name == "pcr" else {}
    config = parse_config(tiny_tree(tmp_path, name=name, **extra), "tiny")
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_method(config, 6).state_dict().items()}
    assert shapes == {key: value.shape for key, value in build_method(config, 6).state_dict().items()}


def test_paths_may_be_strings(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    Trainer(load_config(str(config)), Console(quiet=True)).run()
    folder, data, out = (str(tmp_path / name) for name in ("run", "data", "out"))
    run = load_run(folder, "cpu")
    assert find_checkpoint(folder) == run.path == tmp_path / "run" / "best.pt"
    save_checkpoint(f"{folder}/copy.pt", load_checkpoint(str(run.path)))
    write_synthetic(data, SyntheticConfig(labeled=1, unlabeled=1, val=1))
    assert read_split(f"{data}/splits/val.txt").names == ("val_0000",)
    assert len(list(predict_files(run, None, find_images([f"{data}/JPEGImages"]), out, CPU))) == 3
    assert convert_masks(f"{data}/SegmentationClass", f"{out}/masks", code=None, label_map={}) == 2
    write_lines(f"{out}/list.txt", ["a"])
    assert read_metrics(f"{folder}/metrics.jsonl").evaluations
    assert read_result(folder).iteration == 6
    assert load_stored_config(f"{folder}/config.yaml").method.name == "prcl"
    assert [path.name for path in write_figures(folder, CPU)][:1] == ["curves.png"]
    assert write_comparison(compare(find_runs([folder])), f"{out}/comparison")
    export_network(folder, f"{out}/network.pth")
    assert network_of_run(folder).path == run.path
