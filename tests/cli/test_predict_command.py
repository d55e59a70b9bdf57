"""`prcl predict` as a command: its lines, its exit status, overrides, two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prcl_fast.cli.main import app
from prcl_fast.console import run as run_command
from support.processes import launch
from support.run_folders import write_run
from support.tiny import tiny_tree


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in run/ and four photos in photos/, all in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", tiny_tree(tmp_path / "run"))
    noise = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg", "sub/d.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 33, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def predict(*arguments: str) -> int:
    def command() -> int | None:
        return app(["predict", *arguments], standalone_mode=False)

    return run_command(command, "prcl")


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_bad_files_are_named_at_the_end_and_the_status_is_1(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(photos / "b.jpg")
    (photos / "e.heic").write_bytes(b"")
    assert predict("run", "photos", "--out", "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("passed over: 1 .heic; images are .jpg,")
    assert [line.split(";")[0] for line in lines[1:4]] == [
        f"photos/{name}.jpg -> {name}.png, {name}_overlay.png, {name}_variance.png"
        for name in ("a", "sub/c", "sub/d")
    ]
    assert lines[4] == "predictions are in out"
    assert lines[5].startswith("prcl: photos/b.jpg: cannot be decoded")
    assert lines[6:] == ["prcl: 1 of 4 images have no prediction; they are named above"]
    assert len(list(Path("out").rglob("*.png"))) == 9


def test_overrides_after_the_images_replace_values_of_the_run(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(photos / "a.jpg")
    assert predict("run", image, "--out", "plain") == 0
    assert predict("run", image, "eval.mode=sliding", "eval.window=[32,32]", "--out", "sliding") == 0
    plain, sliding = (Image.open(f"{out}/a_variance.png").text for out in ("plain", "sliding"))
    assert plain != sliding
    capsys.readouterr()
    assert predict("run", image, "--out", "small", "data.max_pixels=100") == 1
    assert "a.jpg: 33 x 40 is 1320 pixels" in capsys.readouterr().err
    assert predict("run", image, "--out", "other", "model.dim=4") == 2
    assert "override 'model.dim=4': predict takes eval.*" in capsys.readouterr().err
    assert predict("run", image, "--out", "other", "eval.flop=true") == 2
    assert "eval.flop" in capsys.readouterr().err
    assert not Path("other").exists()


def test_every_rank_names_its_bad_files_and_all_end_with_status_1(photos: Path) -> None:
    for name in ("b.jpg", "sub/d.jpg"):  # both are predicted by rank 1
        truncate(photos / name)
    processes = launch("predict", "run", "photos", "--out", "out", "--device", "cpu")
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    text = "\n".join(errors)
    assert "photos/b.jpg: cannot be decoded" in errors[1]
    assert "photos/sub/d.jpg: cannot be decoded" in errors[1]
    assert text.count("2 of 4 images have no prediction") == 1
    assert "Traceback" not in text
    assert len(list(Path("out").rglob("*.png"))) == 6
