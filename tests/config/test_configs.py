"""The files of configs/: all can be read, those of the papers train, every method updates its weights."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from prcl_fast.cli.main import app
from prcl_fast.config import SyntheticConfig, load_config
from prcl_fast.config.methods import PRCLConfig
from prcl_fast.data.sources.scene import CLASSES, render
from prcl_fast.data.sources.synthetic import write_synthetic
from prcl_fast.engine.trainer import Trainer
from prcl_fast.sweep.config import SweepRun, read_sweep
from support.paths import CONFIGS

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(SWEEPS))
PAPERS = [path for path in RUNS if path.parent.name in ("voc", "cityscapes")]

IMAGES = {"labeled": 2, "unlabeled": 2, "val": 1}
# Small and independent of the machine; the settings of the method stay.
SMALL = (
    "data.crop=[64, 64]",
    "model.backbone=resnet18",
    "model.base_width=8",
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
    "eval.window=[64, 64]",
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


def test_all_rows_of_both_papers_have_one_score() -> None:
    papers = [path for path in RUNS if path.parent.name in ("voc", "cityscapes")]
    sweeps = [path for path in SWEEPS if not path.name.startswith("camvid")]
    configs = [load_config(path) for path in papers]
    configs += [run.config for path in sweeps for run in read_sweep(path).runs]
    methods = [config.method for config in configs if isinstance(config.method, PRCLConfig)]
    assert {(m.representation, m.reduction, m.normalize, m.temperature) for m in methods} == {
        ("probabilistic", "sum", False, 100.0),
        ("deterministic", "sum", False, 0.5),  # the cosine, whatever reduction and normalize are
    }


def test_runs_of_the_papers_write_to_folders_of_their_own() -> None:
    outputs = [load_config(path).output for path in RUNS] + [read_sweep(path).output for path in SWEEPS]
    assert len(set(outputs)) == len(outputs)


def test_the_readme_names_every_file_of_the_papers_and_no_other() -> None:
    named = set(re.findall(r"(?:voc|cityscapes|sweeps)/\w+\.yaml", (CONFIGS / "README.md").read_text()))
    folders = ("voc", "cityscapes", "sweeps")
    assert named == {
        f"{path.parent.name}/{path.name}" for path in [*RUNS, *SWEEPS] if path.parent.name in folders
    }


def runs_of(name: str) -> list[SweepRun]:
    return list(read_sweep(CONFIGS / "sweeps" / f"{name}.yaml").runs)


@pytest.mark.parametrize("name", [path.stem for path in SWEEPS if path.stem.startswith("aaai_")])
def test_rows_of_the_aaai_paper_have_its_omega_and_the_seed_of_its_public_code(name: str) -> None:
    for run in runs_of(name):
        assert run.config.seed == 3407
        assert getattr(run.config.method, "omega", "pixel") == "pixel"  # eq. (11)


@pytest.mark.parametrize("name", [path.stem for path in SWEEPS if path.stem.startswith("ijcv_")])
def test_rows_of_the_ijcv_paper_have_its_omega_and_its_schedule(name: str) -> None:
    beside_the_state_of_the_art = {"ijcv_table_2": (80000, 16), "ijcv_table_3": (160000, 16)}
    for run in runs_of(name):
        train = run.config.train
        schedule = (train.iterations, train.batch_labeled + train.batch_unlabeled)
        assert schedule == beside_the_state_of_the_art.get(name, (40000, 8))  # 4.1
        assert getattr(run.config.method, "omega", "batch") == "batch"  # eq. (14)
        if name in ("ijcv_table_7", "ijcv_table_8", "ijcv_figure_10", "ijcv_figure_11"):
            assert run.config.data.labeled is not None
            assert run.config.data.labeled.parts[-3:] == ("pascal", "92", "labeled.txt")


def test_the_deep_stem_is_where_the_papers_have_it() -> None:
    # AAAI: "to compare with state-of-the-art methods"; IJCV, 4.2: likewise, and the plain stem for baselines.
    rows = {
        (path.stem, run.entries[0])
        for path in SWEEPS
        if path.stem.startswith(("aaai_", "ijcv_"))
        for run in read_sweep(path).runs
        if run.config.model.stem == "deep"
    }
    tables = {
        "aaai_table_3": "prcl",
        "aaai_table_3_fully_supervised": "supervised",
        "ijcv_table_2": "prcl",
        "ijcv_table_3": "prcl",
    }
    assert rows == set(tables.items())


def test_the_loss_scheduler_is_off_where_the_aaai_paper_has_it_off() -> None:
    for name in ("aaai_table_4", "aaai_table_6"):
        assert {run.config.method.alpha for run in runs_of(name)} == {0.0}  # type: ignore[union-attr]
    alphas = {run.entries[0]: run.config.method.alpha for run in runs_of("aaai_table_5")}  # type: ignore[union-attr]
    assert alphas == {"without_LS": 0.0, "with_LS": -5.0}


def test_aaai_table_4_has_the_papers_rows() -> None:
    rows = []
    for run in runs_of("aaai_table_4"):
        assert isinstance(run.config.method, PRCLConfig)
        method = run.config.method
        rows.append((run.entries[2], method.representation, method.delta_s, method.delta_w))
    pairs = [(0.97, 0.7), (0.9, 0.7), (0.8, 0.7), (1.0, 0.0)]
    assert sorted(rows) == sorted(
        (labels, representation, *pair)
        for labels in ("60", "92")
        for representation in ("deterministic", "probabilistic")
        for pair in pairs
    )


@pytest.mark.parametrize("name", ["aaai_table_1", "aaai_table_2", "ijcv_table_1", "ijcv_table_3"])
def test_mean_teacher_mixes_nothing_and_is_a_row_apart_from_classmix(name: str) -> None:
    mixes = {
        run.entries[0]: run.config.method.mix
        for run in runs_of(name)
        if run.config.method.name == "mean_teacher"
    }
    assert mixes == {"mean_teacher": "none", "classmix": "classmix"}


def methods_on_data() -> list[Path]:
    """The first file of each method and kind of data set."""
    chosen: dict[tuple[str, str], Path] = {}
    for path in RUNS:
        config = load_config(path)
        chosen.setdefault((config.method.name, config.data.kind), path)
    return list(chosen.values())


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides of `data` for generated images in the layout of each kind."""
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder / "voc", SyntheticConfig(size=[64, 64], **IMAGES))
    write_cityscapes(folder / "cityscapes")
    return {
        "voc": on_disk(folder / "voc"),
        "cityscapes": on_disk(folder / "cityscapes"),
        # The same files as a user's folders of images and masks.
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


def small(path: Path, data: list[str], output: Path) -> list[str]:
    """Overrides with which a file runs in about a second."""
    method = load_config(path).method
    overrides = [*SMALL, f"output={output}", *data]
    if getattr(method, "warmup", 0):  # one supervised step, one of the method
        overrides += ["train.iterations=2", "method.warmup=1"]
    if getattr(method, "prototypes_from", None):  # no trained network is there
        overrides += ["train.iterations=2", "method.warmup=1", "method.prototypes_from=null"]
    if isinstance(method, PRCLConfig):
        overrides += ["method.anchors=32", "method.negatives=32"]
    return overrides


@pytest.mark.parametrize("path", PAPERS, ids=label_of)
def test_prcl_train_runs_each_file_of_the_papers(
    path: Path, data_sets: dict[str, list[str]], tmp_path: Path
) -> None:
    overrides = small(path, data_sets[path.parent.name], tmp_path / "run")
    result = CliRunner().invoke(app, ["train", str(path), *overrides])
    assert result.exit_code == 0, result.output
    config = load_config(path, overrides)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(record.get("iteration", 0) for record in records) == config.train.iterations
    assert 0 <= json.loads(result.stdout.splitlines()[-1])["miou"] <= 100


@pytest.mark.parametrize("path", methods_on_data(), ids=label_of)
def test_each_method_takes_a_step_on_its_data(
    path: Path, data_sets: dict[str, list[str]], tmp_path: Path
) -> None:
    config = load_config(path, small(path, data_sets[load_config(path).data.kind], tmp_path / "run"))
    trainer = Trainer(config, Console(quiet=True))
    weights = [weight for group in trainer.method.parameter_groups() for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(config.train.iterations):
            losses = trainer.step(batches)
    assert all(loss.isfinite() for loss in losses.values())
    moved = [not torch.equal(old, new) for old, new in zip(before, weights, strict=True)]
    assert sum(moved) > len(moved) / 2  # a term that is 0 in so short a run leaves its head alone
