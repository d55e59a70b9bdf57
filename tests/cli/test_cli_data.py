"""`prcl data`: output, written files, and rejected input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from prcl_fast.cli.data import app
from prcl_fast.config import load_config
from prcl_fast.data.sources.images import read_mask
from prcl_fast.engine.trainer import Trainer
from prcl_fast.errors import InputError

SIZE = (6, 8)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def prcl_data(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None, result.output + repr(result.exception)
    return result


def refused(*arguments: object) -> str:
    """The one line of a refusal."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, InputError), result.output + repr(result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A data set of three classes: l0, l1 labeled, u0 to u3 unlabeled, v0 validation; class c only in u2."""
    subsets = {"labeled": ["l0", "l1"], "unlabeled": ["u0", "u1", "u2", "u3"], "val": ["v0"]}
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for subset, names in subsets.items():
        (tmp_path / f"{subset}.txt").write_text("\n".join(names) + "\n")
        for k, name in enumerate(names):
            Image.fromarray(noise).save(tmp_path / f"images/{name}.jpg")
            put_label(tmp_path / f"labels/{name}.png", 2 if name == "u2" else k % 2)
    tree = {
        "output": str(tmp_path / "run"),
        "data": {"kind": "folder", "root": ".", "classes": ["a", "b", "c"]}
        | {subset: f"{subset}.txt" for subset in subsets},
        "method": {"name": "prcl"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def put_label(path: Path, value: int, size: tuple[int, int] = SIZE) -> None:
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(path)


def test_check_shows_subsets_families_hashes_and_class_shares(config: Path) -> None:
    output = prcl_data("check", config).stdout
    for text in (
        "6 x 8",
        "unlabeled",
        "ids",
        "50.000",
        "note: data.labeled: no pixel of these images has class c",
        "no file is wrong; see the notes",
    ):
        assert text in output
    assert prcl_data("check", config, "--fast").stdout == output
    assert not (config.parent / "run").exists()


def test_check_takes_overrides(config: Path) -> None:
    assert "is duplicated" in refused("check", config, "data.classes=[a, b, c, a]")


BAD = {
    "image without label": (
        lambda root: (root / "labels/l1.png").unlink(),
        r"labeled.txt:2: no label for l1",
    ),
    "missing image": (lambda root: (root / "images/u1.jpg").unlink(), r"unlabeled.txt:2: no image for u1"),
    "id out of range": (
        lambda root: put_label(root / "labels/v0.png", 3),
        r"v0.png: label id 3, but there are 3",
    ),
    "RGB mask": (
        lambda root: Image.new("RGB", SIZE[::-1]).save(root / "labels/l0.png"),
        r"l0.png: an RGB mask",
    ),
    "size mismatch": (lambda root: put_label(root / "labels/l0.png", 0, (6, 9)), r"l0.png is 9 x 6"),
    "truncated image": (
        lambda root: (root / "images/u3.jpg").write_bytes((root / "images/u3.jpg").read_bytes()[:-40]),
        r"u3.jpg: cannot be decoded",
    ),
    "overlap": (lambda root: (root / "val.txt").write_text("v0\nl1\n"), r"the first is l1"),
    "empty split": (lambda root: (root / "val.txt").write_text("\n"), r"val.txt: the split file is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_check_refuses_what_is_wrong_and_names_the_file(config: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(config.parent)
    assert message in refused("check", config)


def test_check_decodes_whole_images_unless_told_not_to(config: Path) -> None:
    BAD["truncated image"][0](config.parent)
    assert "u3.jpg: cannot be decoded" in refused("check", config)
    assert "no file is wrong" in prcl_data("check", config, "--fast").stdout


def test_check_lists_every_file_that_is_wrong(config: Path) -> None:
    for name in ("l0", "l1"):
        put_label(config.parent / f"labels/{name}.png", 9)
    result = CliRunner().invoke(app, ["check", str(config)])
    assert result.stdout.count("wrong: ") == 2
    assert "2 files are wrong" in str(result.exception)


def test_the_exit_status_is_2_with_one_line_on_standard_error(config: Path) -> None:
    (config.parent / "labels/l1.png").unlink()
    program = "from prcl_fast.cli.main import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", program, "data", "check", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert "labeled.txt:2: no label for l1" in run.stderr


def test_split_make_divides_a_list_and_keeps_its_lines(tmp_path: Path) -> None:
    lines = [f"JPEGImages/2007_{i:06d}.jpg SegmentationClass/2007_{i:06d}.png" for i in range(50)]
    (tmp_path / "all.txt").write_text("\n".join(lines))
    prcl_data("split", "make", tmp_path / "all.txt", 8, "--out", tmp_path / "s", "--seed", 3)
    parts = [(tmp_path / f"s/{part}.txt").read_text().splitlines() for part in ("labeled", "unlabeled")]
    assert [len(part) for part in parts] == [8, 42]
    assert sorted(parts[0] + parts[1]) == lines
    assert all(part == sorted(part) for part in parts)  # the order of the list is kept
    assert "exists already" in refused("split", "make", tmp_path / "all.txt", 8, "--out", tmp_path / "s")


def test_split_make_can_cover_every_class(config: Path, tmp_path: Path) -> None:
    for seed in range(4):
        out = tmp_path / str(seed)
        prcl_data("split", "make", config, 3, "--out", out, "--seed", seed, "--cover")
        assert "u2" in (out / "labeled.txt").read_text().split()
    assert "needs a configuration" in refused(
        "split", "make", tmp_path / "labeled.txt", 1, "--out", tmp_path / "x", "--cover"
    )
    (tmp_path / "labels/u3.png").unlink()
    assert "u3.jpg: this unlabeled image has no label file" in refused(
        "split", "make", config, 3, "--out", tmp_path / "x", "--cover"
    )


def test_split_show_names_count_hash_and_family(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aachen_000013_000019_leftImg8bit\n")
    output = prcl_data("split", "show", tmp_path / "a.txt").stdout
    for text in ("PRCL (Cityscapes stems)", "aachen_000013_000019", " 1 "):
        assert text in output


def test_split_convert_writes_the_other_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aachen_000013_000019_leftImg8bit\n")
    arguments = ("--to", "cps", "--dataset", "cityscapes", "--out", tmp_path / "b.txt")
    prcl_data("split", "convert", tmp_path / "a.txt", *arguments)
    expected = "/images/train/aachen_000013_000019.png\t/segmentation/train/aachen_000013_000019_gtFine.png\n"
    assert (tmp_path / "b.txt").read_text() == expected
    assert "exists already" in refused("split", "convert", tmp_path / "a.txt", *arguments)


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        ("JPEGImages/a.jpg S/a.png\nJPEGImages/b.jpg S/b.png\n", "the same list"),
        ("b\na\n", "the same images in another order"),
        ("a\nc\n", "different images"),
    ],
)
def test_split_compare_says_what_two_files_have_in_common(tmp_path: Path, other: str, verdict: str) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "b.txt").write_text(other)
    assert (
        f"A and B: {verdict}\n"
        in prcl_data("split", "compare", tmp_path / "a.txt", tmp_path / "b.txt").stdout
    )


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """One RGB mask in a subfolder, with the colours of ids 0, 1, 2 in its columns."""
    folder = tmp_path / "rgb"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(np.array([COLOURS] * 2, dtype=np.uint8)).save(folder / "sub/a.bmp")
    (tmp_path / "palette.txt").write_text("255 0 0 road\n0,255,0\n\n0 0 255 7 void\n")
    return folder


def test_convert_turns_colours_into_ids(masks: Path, tmp_path: Path) -> None:
    prcl_data("convert", masks, tmp_path / "out", "--palette", tmp_path / "palette.txt", "--map", "7=255")
    assert read_mask(tmp_path / "out/sub/a.png").tolist() == [[0, 1, 255]] * 2
    shown = np.array(Image.open(tmp_path / "out/sub/a.png").convert("RGB"))
    assert [tuple(colour) for colour in shown[0]] == COLOURS


def test_convert_maps_the_ids_of_index_masks(masks: Path, tmp_path: Path) -> None:
    put_label(masks / "sub/a.bmp", 5)
    prcl_data("convert", masks, tmp_path / "out", "--map", "5=1")
    assert (read_mask(tmp_path / "out/sub/a.png") == 1).all()


def test_convert_reads_the_colours_of_palette_masks_whatever_their_order(masks: Path, tmp_path: Path) -> None:
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        mask = Image.fromarray(np.array([[order.index(k) for k in range(3)]], dtype=np.uint8))
        mask.putpalette([value for k in order for value in COLOURS[k]])
        mask.save(masks / f"{name}.png")
    prcl_data("convert", masks, tmp_path / "out", "--palette", tmp_path / "palette.txt")
    for name in ("a", "b"):
        assert read_mask(tmp_path / f"out/{name}.png").tolist() == [[0, 1, 7]]


def test_convert_refuses_a_grey_mask_that_can_be_read_in_two_ways(masks: Path, tmp_path: Path) -> None:
    (tmp_path / "palette.txt").write_text("255 255 255 0\n0 0 0 1\n255 0 0 2\n0 255 0 3\n0 0 255 4\n")
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(masks / "grey.png")
    arguments = ("convert", masks, tmp_path / "out", "--palette", tmp_path / "palette.txt")
    assert "grey.png: a grey mask, in which 0 can be an id or the colour (0, 0, 0)" in refused(*arguments)
    Image.fromarray(np.array([[0, 2, 255]], dtype=np.uint8)).save(masks / "grey.png")
    prcl_data(*arguments)
    assert read_mask(tmp_path / "out/grey.png").tolist() == [[0, 2, 255]]


def test_convert_refuses_an_id_that_would_become_one_with_a_mapped_one(masks: Path, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7, 8]], dtype=np.uint8)).save(masks / "sub/a.bmp")
    arguments = ("convert", masks, tmp_path / "out", "--map", "7=0", "--map", "8=1")
    assert "a.bmp: id 0, which --map does not name" in refused(*arguments)
    prcl_data(*arguments, "--map", "0=255")
    assert read_mask(tmp_path / "out/sub/a.png").tolist() == [[255, 0, 1]]


def test_check_says_of_the_labels_what_train_says(config: Path) -> None:
    for name in ("l0", "l1"):
        label = np.zeros(SIZE, dtype=np.uint8)
        label[2:] = 255
        Image.fromarray(label).save(config.parent / f"labels/{name}.png")
    expected = "data.labeled: no pixel of these images has the classes b, c, and 66.7 % of the pixels are not"
    assert expected in refused("check", config)
    tree = yaml.safe_load(config.read_text())
    with pytest.raises(InputError, match=expected):
        Trainer(load_config(config), Console(quiet=True))
    assert not Path(tree["output"]).exists()


def test_convert_refuses_an_unknown_colour_and_writes_nothing(masks: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (1, 2, 3)).save(masks / "z.png")
    arguments = ("convert", masks, tmp_path / "out", "--palette", tmp_path / "palette.txt")
    before = sorted(tmp_path.iterdir())
    assert "z.png: colour (1, 2, 3) is not in the palette" in refused(*arguments)
    assert sorted(tmp_path.iterdir()) == before
    prcl_data(*arguments, "--other", 255)
    assert (read_mask(tmp_path / "out/z.png") == 255).all()


def test_convert_knows_the_colours_of_voc(masks: Path, tmp_path: Path) -> None:
    row = [(128, 0, 0), (192, 128, 128), (224, 224, 192)]
    Image.fromarray(np.array([row], dtype=np.uint8)).save(masks / "sub/a.bmp")
    prcl_data("convert", masks, tmp_path / "out", "--palette", "voc")
    assert read_mask(tmp_path / "out/sub/a.png").tolist() == [[1, 15, 255]]


def test_convert_refuses_what_it_cannot_do(masks: Path, tmp_path: Path) -> None:
    out, palette = tmp_path / "out", tmp_path / "palette.txt"
    assert "give --palette, --map or both" in refused("convert", masks, out)
    assert "a.bmp: an RGB mask; --palette" in refused("convert", masks, out, "--map", "1=2")
    assert "--map 1:2: expected FROM=TO" in refused("convert", masks, out, "--map", "1:2")
    assert "no such folder" in refused("convert", tmp_path / "none", out, "--map", "1=2")
    assert "not an empty folder" in refused("convert", masks, masks, "--palette", "voc")
    palette.write_text("0 0 0\n0 0 300\n")
    assert "palette.txt:2: expected R G B" in refused("convert", masks, out, "--palette", palette)
    palette.write_text("0 0 0\n0 0 0\n")
    assert "stands for both" in refused("convert", masks, out, "--palette", palette)
    Image.new("RGB", (3, 2)).save(masks / "b.jpg")
    assert "b.jpg: a lossy format" in refused("convert", masks, out, "--palette", "voc")
    (masks / "b.jpg").rename(masks / "b.gif")
    assert "b.gif: programs that write GIF" in refused("convert", masks, out, "--palette", "voc")


def test_convert_passes_over_hidden_files_and_folders(masks: Path, tmp_path: Path) -> None:
    (masks / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.png", "sub/._a.png"):
        put_label(masks / name, 5)
    prcl_data("convert", masks, tmp_path / "out", "--palette", tmp_path / "palette.txt")
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["a.png"]


def test_convert_has_a_bound_on_the_pixels_of_a_mask(masks: Path, tmp_path: Path) -> None:
    arguments = ("convert", masks, tmp_path / "out", "--palette", tmp_path / "palette.txt", "--max-pixels")
    assert "a.bmp: 3 x 2 is 6 pixels" in refused(*arguments, 5)
    prcl_data(*arguments, 6)


def test_the_check_counts_images_with_an_orientation(tmp_path: Path) -> None:
    folder = tmp_path / "synth"
    prcl_data("synth", folder, "--labeled", 2, "--unlabeled", 3, "--val", 1)
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in sorted((folder / "JPEGImages").iterdir())[:2]:
        with Image.open(path) as image:
            image.load()
            image.save(path, exif=exif)
    for fast in ((), ("--fast",)):
        output = prcl_data("check", folder / "config.yaml", *fast).stdout
        assert "note: 2 images carry an EXIF orientation; it is applied\n" in output


def test_synth_writes_a_data_set_that_passes_the_check(tmp_path: Path) -> None:
    folder = tmp_path / "synth"
    counts = ("--labeled", 2, "--unlabeled", 3, "--val", 1, "--size", 64, 80, "--seed", 5)
    prcl_data("synth", folder, *counts)
    output = prcl_data("check", folder / "config.yaml").stdout
    assert "64 x 80" in output
    assert "not an empty folder" in refused("synth", folder, *counts)


@pytest.mark.parametrize(
    ("option", "values"), [("--size", (64, 500)), ("--labeled", (0,)), ("--seed", (-1,))]
)
def test_synth_names_a_wrong_option(tmp_path: Path, option: str, values: tuple[int, ...]) -> None:
    assert option.strip("-") in refused("synth", tmp_path / "synth", option, *values)
    assert not (tmp_path / "synth").exists()
