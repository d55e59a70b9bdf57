"""The files of configs/: each is read, and each method takes a step with them on its kind of data."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from prcl_fast.config import Config, SyntheticConfig, load_config, override_config
from prcl_fast.config_methods import PCRConfig, PRCLConfig
from prcl_fast.data.scene import CLASSES, render
from prcl_fast.data.synthetic import write_synthetic
from prcl_fast.engine.trainer import Trainer
from prcl_fast.sweep_config import read_sweep

CONFIGS = Path(__file__).parent.parent / "configs"
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(SWEEPS))

IMAGES = {"labeled": 2, "unlabeled": 2, "val": 1}
# Small, and nothing that depends on a machine; the backbone and the settings of the method stay.
SMALL = (
    "data.crop=[64, 64]",
    "data.workers=0",
    "data.scan=false",
    "model.width=16",
    "model.dim=16",
    "model.weights=null",
    "train.iterations=1",
    "train.batch_labeled=2",
    "train.batch_unlabeled=2",
    "train.amp=off",
    "train.device=cpu",
    "train.threads=1",
)


def label_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


@pytest.mark.parametrize("path", RUNS, ids=label_of)
def test_every_run_configuration_is_read(path: Path) -> None:
    assert load_config(path).train.iterations > 0


@pytest.mark.parametrize("path", SWEEPS, ids=label_of)
def test_every_sweep_is_read_with_all_its_runs(path: Path) -> None:
    sweep = read_sweep(path)
    assert sweep.output == Path("runs") / path.stem
    assert len({run.config.model_dump_json(exclude={"output"}) for run in sweep.runs}) == len(sweep.runs)


def test_no_contrast_is_won_by_the_variance_of_its_prototypes_alone() -> None:
    configs = [load_config(path) for path in RUNS] + [
        run.config for path in SWEEPS for run in read_sweep(path).runs
    ]
    methods = [config.method for config in configs if isinstance(config.method, PRCLConfig)]
    # Summed over 256 dimensions, the small variance of a prototype is worth some 180 nats at tau 0.5; only
    # negatives without variance have as much.
    without = [
        method
        for method in methods
        if method.representation == "probabilistic"
        and not method.virtual_negatives
        and not method.memory_bank
    ]
    assert without
    assert all(method.reduction == "mean" for method in without)


def test_runs_of_the_papers_write_to_folders_of_their_own() -> None:
    outputs = [load_config(path).output for path in RUNS] + [read_sweep(path).output for path in SWEEPS]
    assert len(set(outputs)) == len(outputs)


def test_the_readme_names_every_file_of_the_papers_and_no_other() -> None:
    named = set(re.findall(r"(?:voc|cityscapes|sweeps)/\w+\.yaml", (CONFIGS / "README.md").read_text()))
    folders = ("voc", "cityscapes", "sweeps")
    assert named == {
        f"{path.parent.name}/{path.name}" for path in [*RUNS, *SWEEPS] if path.parent.name in folders
    }


def methods_on_data() -> list[Path]:
    """The first file of each method, kind of data and backbone."""
    chosen: dict[tuple[str, str, str], Path] = {}
    for path in RUNS:
        config = load_config(path)
        chosen.setdefault((config.method.name, config.data.kind, config.model.backbone), path)
    return list(chosen.values())


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides of `data` that lead to generated images in the layout of each kind."""
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder / "voc", SyntheticConfig(size=[64, 64], **IMAGES))
    write_cityscapes(folder / "cityscapes")
    return {
        "voc": on_disk(folder / "voc"),
        "cityscapes": on_disk(folder / "cityscapes"),
        # The same files, as anybody's folder of images and masks.
        "folder": [
            *on_disk(folder / "voc"),
            "data.images=JPEGImages",
            "data.labels=SegmentationClass",
            f"data.classes=[{', '.join(CLASSES)}]",
        ],
        "synthetic": [f"data.synthetic.{subset}={count}" for subset, count in IMAGES.items()],
    }


def on_disk(root: Path) -> list[str]:
    return [f"data.root={root}", *(f"data.{subset}={root}/splits/{subset}.txt" for subset in IMAGES)]


def write_cityscapes(root: Path) -> None:
    for subset, (name, count) in enumerate(IMAGES.items()):
        part, city = ("val", "frankfurt") if name == "val" else ("train", "hamburg")
        ids = [f"{city}_{subset:06d}_{index:06d}" for index in range(count)]
        for index, id_ in enumerate(ids):
            image, label = render(64, 64, 0, subset, index)
            for top, pixels in (("leftImg8bit", image), ("gtFine", label)):
                kind = "leftImg8bit" if top == "leftImg8bit" else "gtFine_labelTrainIds"
                path = root / top / part / city / f"{id_}_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        (root / "splits").mkdir(exist_ok=True)
        (root / f"splits/{name}.txt").write_text("".join(f"{id_}_leftImg8bit\n" for id_ in ids))


def small(path: Path, data: list[str], output: Path) -> Config:
    config = load_config(path)
    overrides = [*SMALL, f"output={output}", *data]
    if getattr(config.method, "warmup", 0):  # one supervised step, one of the method
        overrides += ["train.iterations=2", "method.warmup=1"]
    if isinstance(config.method, PCRConfig):  # no trained network is there
        overrides += ["train.iterations=2", "method.warmup=1", "method.prototypes_from=null"]
    return override_config(config, overrides)


@pytest.mark.parametrize("path", methods_on_data(), ids=label_of)
def test_each_method_takes_a_step_on_its_data(
    path: Path, data_sets: dict[str, list[str]], tmp_path: Path
) -> None:
    config = small(path, data_sets[load_config(path).data.kind], tmp_path / "run")
    trainer = Trainer(config, Console(quiet=True))
    weights = [weight for group in trainer.method.parameter_groups() for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(config.train.iterations):
            losses = trainer.step(batches)
    assert all(loss.isfinite() for loss in losses.values())
    moved = [not torch.equal(old, new) for old, new in zip(before, weights, strict=True)]
    assert sum(moved) > len(moved) / 2  # a term that is 0 in so short a run leaves its head alone
