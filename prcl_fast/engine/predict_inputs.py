"""Input images of a prediction, the files that are passed over, and the place of each output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prcl_fast.data.sources.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, png_texts
from prcl_fast.data.sources.listing import walk
from prcl_fast.errors import InputError

# The PNGs of a prediction carry this text, so that a later one does not take them for photos.
MARK = {"Software": "prcl predict"}
_OWN = "written by prcl predict"


@dataclass(frozen=True)
class InputImage:
    """An image to predict.

    Attributes:
        place: path of its outputs below the output folder, without suffix: the name of a file, or the path
            below a folder.
    """

    path: Path
    place: Path

    def outputs(self, out: Path) -> tuple[Path, Path, Path, Path]:
        """The files of ids, overlay, variance map and variance numbers."""
        base = out / self.place
        index, overlay, variance, numbers = (
            base.with_name(base.name + ending)
            for ending in (".png", "_overlay.png", "_variance.png", "_variance.npy")
        )
        return index, overlay, variance, numbers


@dataclass(frozen=True)
class Inputs:
    """The images of files and folders, and the number of other images there by the reason."""

    images: tuple[InputImage, ...]
    passed_over: Mapping[str, int]

    def passed_over_line(self) -> str | None:
        """One line about the files that were passed over; None if there are none."""
        if not self.passed_over:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.passed_over.items())
        return f"passed over: {reasons}; images are {', '.join(IMAGE_SUFFIXES)}"


def find_images(inputs: Sequence[str | Path]) -> Inputs:
    """The files themselves, and the image files in folders and their subfolders, in the order of their names.

    Hidden files and folders, files of other suffixes and the PNGs of former predictions are passed over in
    folders.

    Raises:
        InputError: an input that does not exist, a folder without images or one that cannot be read, or no
            input at all.
    """
    images: list[InputImage] = []
    passed_over: Counter[str] = Counter()
    for path in map(Path, inputs):
        if path.is_dir():
            found = _in_folder(path, passed_over)
            if not found:
                line = Inputs((), passed_over).passed_over_line()
                raise InputError(f"{path}: no image in this folder and below{f'; {line}' if line else ''}")
            images += found
        elif path.exists():
            images.append(InputImage(path, Path(path.stem)))
        else:
            raise InputError(f"{path}: no such file or folder")
    if not images:
        raise InputError("images: none given")
    return Inputs(tuple(images), passed_over)


def check_outputs(images: Sequence[InputImage], out: Path) -> None:
    """Raises InputError where a file would be written twice, over an input, or over a PNG of others."""
    inputs = {image.path.resolve() for image in images}
    owner: dict[Path, Path] = {}
    for image in images:
        for output in image.outputs(out):
            if output in owner:
                raise InputError(
                    f"{image.path}: {output.name} would be written for {owner[output]} too; rename one"
                )
            if output.resolve() in inputs:
                raise InputError(
                    f"{image.path}: its output {output} would replace an input; choose another --out"
                )
            if output.suffix == ".png" and output.is_file() and not _is_own(output):
                raise InputError(
                    f"{image.path}: its output {output} exists and was not {_OWN}; choose another --out"
                )
            owner[output] = image.path


def _in_folder(folder: Path, passed_over: Counter[str]) -> list[InputImage]:
    images = []
    for place, files in walk(folder):
        for name in files:
            path = place / name
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES and path.is_file():
                if suffix == ".png" and _is_own(path):
                    passed_over[_OWN] += 1
                else:
                    images.append(InputImage(path, path.relative_to(folder).with_suffix("")))
            elif suffix in UNREAD_SUFFIXES:
                passed_over[suffix] += 1
    return images


def _is_own(path: Path) -> bool:
    return MARK.items() <= png_texts(path).items()
