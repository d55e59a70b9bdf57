"""Image and mask files: EXIF orientation, bound on the pixels, formats."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from prcl_fast.config import DataConfig
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.data.sources.images import png_texts, read_header, read_image, read_mask, save_index_png
from prcl_fast.data.sources.orientation import orientation_of
from prcl_fast.errors import InputError

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
IDS = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6)
LOSSLESS = {"a.png": {}, "a.webp": {"lossless": True}, "a.tif": {}}


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x010F] = "a camera"
    block[0x0112] = orientation
    return block


def put(path: Path, pixels: np.ndarray, orientation: int | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if orientation is not None:
        options["exif"] = exif(orientation)
    Image.fromarray(pixels).save(path, **options)
    return path


def shown(path: Path) -> np.ndarray:
    """The picture as a viewer shows it; Pillow scrambles some TIFF files that it opens by name."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return np.array(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", LOSSLESS)
def test_images_are_read_as_viewers_show_them(tmp_path: Path, name: str, orientation: int) -> None:
    path = put(tmp_path / name, PIXELS, orientation, **LOSSLESS[name])
    pixels = read_image(path)
    np.testing.assert_array_equal(pixels, shown(path))
    assert pixels.flags.writeable
    assert (orientation == 1) == np.array_equal(pixels, PIXELS)
    assert read_header(path) == (*pixels.shape[:2], orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_masks_are_turned_as_images_are(tmp_path: Path, name: str, orientation: int) -> None:
    path = put(tmp_path / name, IDS, orientation)
    np.testing.assert_array_equal(read_mask(path), shown(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "CMYK"])
def test_a_raw_tiff_is_turned_as_a_png_is(tmp_path: Path, mode: str, orientation: int) -> None:
    image, exif = Image.fromarray(PIXELS).convert(mode), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.tif", exif=exif)
    (image if mode != "CMYK" else image.convert("RGB")).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), read_image(tmp_path / "a.png"))
    assert read_header(tmp_path / "a.tif") == read_header(tmp_path / "a.png")
    if mode in ("L", "P"):
        np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), read_mask(tmp_path / "a.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_turned(tmp_path: Path, orientation: int) -> None:
    path = put(tmp_path / "a.jpg", np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)), orientation)
    np.testing.assert_array_equal(read_image(path), shown(path))
    assert read_header(path) == (*read_image(path).shape[:2], orientation)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\0\x06\0\0",
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_means_upright(tmp_path: Path, block: bytes) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, exif=block)
    assert read_header(path) == (4, 6, 1)
    assert read_image(path).shape == (4, 6, 3)


def test_the_orientation_is_found_in_both_byte_orders(tmp_path: Path) -> None:
    for order, entry in (("II*\0", "1201030001000000060000"), ("MM\0*", "0112000300000001000600")):
        first = "080000000100" if order[0] == "I" else "000000080001"
        block = b"Exif\0\0" + order.encode() + bytes.fromhex(first + entry + "00" + "00000000")
        Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=block)
        with Image.open(tmp_path / "a.jpg") as image:
            assert orientation_of(image) == 6


def folder(root: Path, orientation: int, mask: np.ndarray = IDS) -> Source:
    image = np.zeros((4, 6, 3), np.uint8)
    for name in ("a", "b"):
        put(root / f"images/{name}.jpg", image, orientation)
        put(root / f"labels/{name}.png", mask)
        (root / f"{name}.txt").write_text(f"{name}\n")
    lists = {"labeled": root / "a.txt", "val": root / "b.txt"}
    return build_source(DataConfig(kind="folder", root=root, classes=["x", "y"], **lists))


def test_a_label_has_the_size_of_the_photo_as_it_is_shown(tmp_path: Path) -> None:
    upright = np.zeros((6, 4), np.uint8)
    assert folder(tmp_path, 6, upright).label("a").shape == (6, 4)
    with pytest.raises(InputError, match=r"a\.jpg is 4 x 6 .* is 6 x 4; the EXIF orientation 6 .*applied"):
        folder(tmp_path, 6, upright.T.copy()).label("a")


def test_the_state_of_an_image_names_the_way_of_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path, 1)
    before = source.pixel_state("a", labeled=True)
    monkeypatch.setattr("prcl_fast.data.sources.file_source.READING", 1)  # the orientation was not applied
    assert source.pixel_state("a", labeled=True) != before


def test_more_pixels_than_the_bound_are_refused_with_the_key_and_without_a_warning(tmp_path: Path) -> None:
    path = put(tmp_path / "a.png", np.zeros((10, 15), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (read_image, read_mask, read_header):
            with pytest.raises(InputError, match=r"a\.png: 15 x 10 is 150 pixels, .*data\.max_pixels"):
                read(path, 149)
            read(path, 150)


def test_the_bound_of_a_configuration_is_that_of_its_images_and_labels(tmp_path: Path) -> None:
    data = folder(tmp_path, 1)
    small = DataConfig(
        kind="folder",
        root=tmp_path,
        classes=["x", "y"],
        labeled=tmp_path / "a.txt",
        val=tmp_path / "b.txt",
        max_pixels=23,
    )
    assert data.image("a").shape == (4, 6, 3)
    source = build_source(small)
    for read in (source.image, source.label):
        with pytest.raises(InputError, match=r"data\.max_pixels"):
            read("a")


@pytest.mark.parametrize("factor", [1.5, 2.5])  # Pillow warns of the first and refuses the second
def test_a_raised_bound_goes_beyond_that_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    path = put(tmp_path / "a.png", PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(24 / factor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path, 24).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("JPEG", "a JPEG file; a lossy format alters ids"),
        ("WEBP", "a WebP file; a lossy format alters ids"),
        ("GIF", "a GIF file; programs that write GIF files give the colours other ids"),
    ],
)
def test_a_mask_of_a_format_that_alters_ids_is_named(tmp_path: Path, kind: str, message: str) -> None:
    Image.fromarray(np.full((4, 6), 1, np.uint8)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(InputError, match=rf"a\.png: {message}; masks are PNG"):
        read_mask(tmp_path / "a.png")
    if kind == "GIF":
        with Image.open(tmp_path / "a.png") as image:
            assert (np.array(image) == 0).all()  # the ids were 1


def progressive(folder: Path, more: int, padding: int = 0) -> Path:
    """A progressive JPEG whose last scan is there `more` times more, behind a comment of `padding` bytes."""
    plain = put(folder / "a.jpg", np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)), progressive=True)
    content = plain.read_bytes()
    end = content.rindex(b"\xff\xd9")
    scan = content[content.rindex(b"\xff\xda") : end]
    comment = b"\xff\xfe\xff\xfd" + bytes(0xFFFB)
    comments = comment * (padding // len(comment))
    plain.write_bytes(content[:2] + comments + content[2:end] + scan * more + content[end:])
    return plain


@pytest.mark.parametrize("padding", [0, 3 * 2**20])
def test_a_progressive_jpeg_of_many_scans_is_refused(tmp_path: Path, padding: int) -> None:
    ordinary = read_image(progressive(tmp_path, 0))
    np.testing.assert_array_equal(read_image(progressive(tmp_path, 40, padding)), ordinary)
    with pytest.raises(InputError, match=r"a\.jpg: a progressive JPEG of more than 50 scans"):
        read_image(progressive(tmp_path, 41, padding))


def test_texts_of_a_png_are_read_and_other_files_have_none(tmp_path: Path) -> None:
    save_index_png(tmp_path / "a.png", IDS, np.zeros((1, 3), np.uint8), {"Software": "x"})
    assert png_texts(tmp_path / "a.png")["Software"] == "x"
    put(tmp_path / "b.jpg", PIXELS)
    (tmp_path / "c.png").write_text("nothing")
    os.mkfifo(tmp_path / "d.png")
    assert not any(png_texts(tmp_path / name) for name in ("b.jpg", "c.png", "d.png", "none.png"))
