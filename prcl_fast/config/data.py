"""The section `data` of a configuration: data set, augmentation, loading."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prcl_fast.config.types import Fraction, PathString, Positive, Rgb, Section, Size

MAX_PIXELS = 89_478_485  # of one image, by default: Pillow's bound, too

Images = Annotated[int, Field(ge=1, le=100_000)]


class SyntheticConfig(Section):
    """The generated data set of `data.kind: synthetic`: the images that `prcl data synth` writes."""

    size: Size = Field([64, 64], description="Height and width of every image, 64 to 128 pixels.")
    labeled: Images = Field(5, description="Number of labeled images.")
    unlabeled: Images = Field(200, description="Number of unlabeled images.")
    val: Images = Field(96, description="Number of validation images.")
    seed: int = Field(0, ge=0, description="Random seed of the images; independent of the seed of the run.")


class AugmentConfig(Section):
    """Augmentation: weak and geometric for all images, strong and photometric for unlabeled ones."""

    scale: list[Annotated[float, Field(gt=0, le=64)]] = Field(
        [0.5, 2.0], min_length=2, max_length=2, description="Smallest and largest factor of random scaling."
    )
    flip: Fraction = Field(0.5, description="Probability of a horizontal flip, from 0 to 1.")
    jitter: Fraction = Field(
        0.8,
        description="Probability of colour jitter on an unlabeled image: the changes of brightness, "
        "contrast, saturation and hue.",
    )
    brightness: Fraction = Field(
        0.5, description="Colour jitter: brightness changes by a factor of 1 - value to 1 + value."
    )
    contrast: Fraction = Field(
        0.5, description="Colour jitter: contrast changes by a factor of 1 - value to 1 + value."
    )
    saturation: Fraction = Field(
        0.5, description="Colour jitter: saturation changes by a factor of 1 - value to 1 + value."
    )
    hue: float = Field(
        0.25,
        ge=0,
        le=0.5,
        description="Colour jitter: largest rotation of the hue, in turns of the colour circle.",
    )
    grayscale: Fraction = Field(0.2, description="Probability that an unlabeled image loses its colour.")
    blur: Fraction = Field(0.5, description="Probability of Gaussian blur on an unlabeled image.")
    blur_sigma: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        [0.1, 2.0],
        min_length=2,
        max_length=2,
        description="Smallest and largest standard deviation of the blur, in pixels.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("scale", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the lower end {low} is above the upper end {high}")
        return self


class DataConfig(Section):
    """The data set: images, labels, splits, augmentation and loading."""

    kind: Literal["voc", "cityscapes", "folder", "synthetic"] = Field(
        description="Layout of the data set: voc, cityscapes, folder (one of images, one of labels), or "
        "synthetic (generated images)."
    )
    root: PathString | None = Field(
        None, description="Folder of the data set; required except for kind synthetic."
    )
    labeled: PathString | None = Field(
        None, description="Split file of the labeled images: one id or path a line."
    )
    unlabeled: PathString | None = Field(
        None, description="Split file of the unlabeled images; required for methods that use them."
    )
    val: PathString | None = Field(None, description="Split file of the validation images.")
    classes: list[str] | PathString | None = Field(
        None,
        description="Class names in the order of their ids, or a text file with one name a line; required "
        "for kind folder.",
    )
    images: str = Field(
        "images", description="Kind folder: folder of the images below root, or a path pattern with {name}."
    )
    labels: str = Field(
        "labels", description="Kind folder: folder of the labels below root, or a path pattern with {name}."
    )
    label_map: dict[Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]] | None = Field(
        None,
        description="Class id for each id in the label files; 255 means not labeled. Ids that are not listed "
        "stay unchanged, and are refused where another id is mapped to them.",
    )
    palette: list[Rgb] | None = Field(
        None,
        description="RGB colour of each class, for figures and for reading RGB and palette masks. Colours "
        "after those of the classes mark pixels that are not labeled.",
    )
    ignore: int = Field(
        255, ge=0, le=255, description="Id in the label files of pixels that are not labeled."
    )
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="Images of kind synthetic.")
    crop: Size = Field([512, 512], description="Height and width of a training crop, in pixels.")
    augment: AugmentConfig = AugmentConfig()
    mean: list[float] = Field(
        [0.485, 0.456, 0.406],
        min_length=3,
        max_length=3,
        description="Mean that normalisation subtracts from red, green and blue, for values from 0 to 1; "
        "ImageNet's.",
    )
    std: list[Positive] = Field(
        [0.229, 0.224, 0.225],
        min_length=3,
        max_length=3,
        description="Standard deviation by which normalisation divides red, green and blue; ImageNet's.",
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=2_000_000_000,
        description="Largest number of pixels of one image or label; larger files are refused before they "
        "are decoded, because a small file can hold an image that fills the memory.",
    )
    workers: int = Field(
        2, ge=0, le=256, description="Worker processes that decode images; 0 decodes in the main process."
    )
    cache: Literal["none", "ram", "disk"] = Field(
        "none",
        description="Cache of the decoded training images: none, ram (shared memory, /dev/shm) or disk "
        "(cache_dir).",
    )
    cache_dir: PathString | None = Field(
        None,
        description="Folder of the cache on disk, in which each user gets a private one; null: "
        "$XDG_CACHE_HOME/prcl_fast/images, by default ~/.cache/prcl_fast/images.",
    )
    scan: bool = Field(
        True,
        description="Check all label files before training: readable, known ids, same size as the image, "
        "labeled pixels of every class.",
    )

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        needed = {
            "voc": ("root", "labeled", "val"),
            "cityscapes": ("root", "labeled", "val"),
            "folder": ("root", "labeled", "val", "classes"),
            "synthetic": (),
        }[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: required for kind {self.kind}")
        if isinstance(self.classes, list) and len(self.classes) < 2:
            raise ValueError(f"classes: at least 2 are needed, got {len(self.classes)}")
        return self
