"""Resume of a run: more iterations, the same data, and what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from prcl_fast.config import (
    Config,
    SyntheticConfig,
    dump_config,
    load_stored_config,
    override_config,
    parse_config,
)
from prcl_fast.data.sources.synthetic import write_synthetic
from prcl_fast.engine.resume import NO_CHANGES, AllowedChanges
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError
from prcl_fast.losses import poly_lr
from prcl_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from prcl_fast.runs.metrics import read_metrics
from support.run_folders import final_state, same_state
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

EXTEND = AllowedChanges(extend=True)


@pytest.fixture(autouse=True)
def _small_networks() -> Iterator[None]:
    with small_backbones():
        yield


def trainer(config: Config, allowed: AllowedChanges = NO_CHANGES) -> Trainer:
    return Trainer(config, Console(file=io.StringIO(), record=True, width=400), allowed=allowed)


def said(run: Trainer) -> str:
    return run.lines.console.export_text(clear=False)


def longer(config: Config, iterations: int) -> Config:
    return override_config(config, [f"train.iterations={iterations}"])


def records(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def refused(config: Config, allowed: AllowedChanges = NO_CHANGES) -> str:
    """The message of a start that changes no file of the run and leaves none."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(InputError) as caught:
        trainer(config, allowed)
    assert files() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_run_is_trained_on_as_a_run_of_the_new_total_from_the_same_state(tiny: Config) -> None:
    trainer(tiny).run()
    former = records(tiny)
    more = longer(tiny, 9)
    # The same state in a run that had the new total from the start.
    other = override_config(more, [f"output={tiny.output.parent / 'other'}"])
    other.output.mkdir()
    state = load_checkpoint(tiny.output / "last.pt")
    save_checkpoint(other.output / "last.pt", state | {"config": dump_config(other)})
    run = trainer(more, EXTEND)
    assert run.iteration == 6
    assert "extended from 6 to 9 iterations" in said(run)
    assert run.run()["iterations"] == 9
    assert trainer(other).run()["iterations"] == 9
    assert same_state(final_state(more.output), final_state(other.output))

    assert load_stored_config(more.output / "config.yaml").train.iterations == 9
    assert load_checkpoint(more.output / "last.pt")["config"]["train"]["iterations"] == 9
    written = records(more)
    assert written[: len(former)] == former  # with the evaluation at the former end
    assert written[len(former)] == {"kind": "extend", "iteration": 6, "former_total": 6, "total": 9}
    metrics = read_metrics(more.output / "metrics.jsonl")
    assert [record["iteration"] for record in metrics.evaluations] == [3, 6, 9]
    rate = float(poly_lr(more.optim.lr, torch.tensor(8), 9, power=more.optim.power))
    assert metrics.train[-1]["lr"] == pytest.approx(rate)


def test_an_extension_that_was_killed_before_it_saved_goes_on_with_the_same_command(tiny: Config) -> None:
    trainer(tiny).run()
    more = longer(tiny, 8)
    for _ in range(2):
        run = trainer(more, EXTEND)
        with run._log():
            pass  # killed here
        assert "extended from 6 to 8 iterations" in said(run)
    # The extension is in config.yaml, so that the option may also be left out.
    assert trainer(more).run()["iterations"] == 8
    assert sum(record["kind"] == "extend" for record in records(more)) == 1
    again = trainer(more)
    assert "extended" not in said(again)
    again.run()
    assert sum(record["kind"] == "extend" for record in records(more)) == 1


def test_an_unfinished_run_can_be_extended(tiny: Config) -> None:
    trainer(tiny).run()
    (tiny.output / "last.pt").unlink()
    run = trainer(longer(tiny, 7), EXTEND)
    assert run.iteration == 4
    assert run.run()["iterations"] == 7


def test_more_iterations_are_refused_without_the_option_which_is_named(tiny: Config) -> None:
    trainer(tiny).run()
    message = refused(longer(tiny, 9))
    assert message == (
        f"output: {tiny.output} holds another configuration's run: train.iterations is 6 there and 9 here; "
        "prcl train --extend trains it on to 9 iterations; or choose another output"
    )


def test_an_extension_needs_a_run_more_iterations_and_no_other_change(tiny: Config) -> None:
    with pytest.raises(InputError, match=r"^--extend: .* holds no run; leave --extend out to begin one$"):
        trainer(tiny, EXTEND)
    assert not tiny.output.exists()
    trainer(tiny).run()
    assert refused(tiny, EXTEND) == (
        f"--extend: the run in {tiny.output} has done its 6 iterations; set a larger train.iterations"
    )
    message = refused(longer(tiny, 4), EXTEND)
    assert "train.iterations is 6 there and 4 here; a run cannot get shorter" in message
    message = refused(override_config(longer(tiny, 9), ["method.tau=7.0"]), EXTEND)
    assert "method.tau is null there and 7.0 here, train.iterations is 6 there and 9 here" in message
    assert message.endswith(
        "--extend changes train.iterations alone; restore the others or choose another output"
    )


def test_changed_settings_are_refused_with_three_keys_and_a_count(tiny: Config) -> None:
    trainer(tiny).run()
    message = refused(override_config(tiny, ["seed=1", "optim.lr=0.5", "method.tau=7.0", "model.width=24"]))
    assert message == (
        f"output: {tiny.output} holds another configuration's run: seed is 0 there and 1 here, "
        "model.width is 16 there and 24 here, method.tau is null there and 7.0 here (4 keys differ); "
        "restore them, move the run away or choose another output"
    )


def test_a_checkpoint_alone_in_a_folder_is_compared_as_well(tiny: Config) -> None:
    trainer(tiny).run()
    (tiny.output / "config.yaml").unlink()
    assert "method.tau is null there and 7.0 here" in refused(override_config(tiny, ["method.tau=7.0"]))
    assert not (tiny.output / "config.yaml").exists()
    assert trainer(tiny).iteration == 6


CLASSES = ["background", "disc", "square", "triangle", "ring", "cross"]


@pytest.fixture
def on_disk(tmp_path: Path) -> Config:
    """A finished run on files, with class names in a file."""
    data = tmp_path / "data"
    write_synthetic(data, SyntheticConfig(size=[64, 64], labeled=4, unlabeled=4, val=2))
    (data / "names.txt").write_text("\n".join(CLASSES))
    tree = tiny_tree(tmp_path / "run")
    tree["data"] = yaml.safe_load((data / "config.yaml").read_text())["data"] | {
        "workers": 0,
        "root": str(data),
    }
    tree["data"] |= {key: str(data / "splits" / f"{key}.txt") for key in ("labeled", "unlabeled", "val")}
    tree["data"] |= {"classes": str(data / "names.txt"), "scan": False}
    config = parse_config(tree, "test")
    trainer(config).run()
    return config


def _shuffled(file: Path) -> None:
    file.write_text("\n".join(reversed(file.read_text().split())))


def _line_dropped(file: Path) -> None:
    file.write_text("\n".join(file.read_text().split()[:-1]))


def _swapped(first: Path) -> None:
    second = sorted(first.parent.iterdir())[1]
    one, two = first.read_bytes(), second.read_bytes()
    assert one != two
    first.write_bytes(two)
    second.write_bytes(one)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("names.txt", _shuffled, "data.classes: background, disc, .* there, cross, ring, .* here"),
        (
            "splits/labeled.txt",
            _shuffled,
            r"data\.labeled: 4 images, list \w+ there, 4 images, list \w+ here",
        ),
        ("splits/unlabeled.txt", _line_dropped, r"data\.unlabeled: 4 images, list .* there, 3 images, list"),
        ("splits/val.txt", _line_dropped, r"data\.val: 2 images, list .* there, 1 images, list"),
        ("JPEGImages/labeled_0000.jpg", _swapped, r"files of data\.labeled: content \w+ there, content \w+"),
    ],
    ids=["classes", "order", "unlabeled", "val", "images"],
)
def test_a_run_goes_on_with_its_own_data_alone(
    on_disk: Config, name: str, change: Callable[[Path], None], told: str
) -> None:
    file = on_disk.data.root / name
    change(file)
    message = refused(on_disk)
    place = file.parent.parent if name.startswith("JPEG") else file
    assert message.startswith(f"output: {on_disk.output} was trained on other data: ")
    assert re.search(told, message), message
    assert f"({place}); restore the data, choose another output or" in message
    allowed = AllowedChanges(data=True)
    if name == "names.txt":
        assert refused(on_disk, allowed) == message
    else:
        run = trainer(on_disk, allowed)
        assert f"note: the data has changed since {on_disk.output / 'last.pt'} was written" in said(run)
        assert run.iteration == 6


def test_data_that_has_changed_is_refused_before_the_cache_of_images_is_filled(
    on_disk: Config, tmp_path: Path
) -> None:
    _shuffled(on_disk.data.root / "splits/labeled.txt")
    cached = override_config(on_disk, ["data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}"])
    assert "was trained on other data" in refused(cached)
    assert not (tmp_path / "cache").exists()
    trainer(cached, AllowedChanges(data=True))
    assert (tmp_path / "cache").exists()


def test_data_that_was_moved_is_the_same_data(on_disk: Config) -> None:
    root = on_disk.data.root
    shutil.move(root, root.parent / "moved")
    text = (on_disk.output / "config.yaml").read_text().replace(str(root), str(root.parent / "moved"))
    (on_disk.output / "config.yaml").write_text(text)
    run = trainer(load_stored_config(on_disk.output / "config.yaml"))
    assert run.iteration == 6
    assert "other data" not in said(run)


def test_a_checkpoint_of_a_former_version_is_compared_by_its_classes_alone(on_disk: Config) -> None:
    path = on_disk.output / "last.pt"
    state = load_checkpoint(path)
    del state["data"], state["starts"]
    save_checkpoint(path, state)
    run = trainer(on_disk)
    assert run.iteration == 6
    assert f"note: {path} is of a former version and does not say which lists" in said(run)
    _shuffled(on_disk.data.root / "names.txt")
    assert "data.classes: background, disc" in refused(on_disk)
