"""The configuration of a run: strict models, YAML with `base:` inheritance, `key.path=value` overrides.

Every mistake becomes an InputError of one line that names the file and the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from prcl_fast.config.files import (
    PATH_KEYS,
    RUN_KEYS,
    apply_override,
    plain_path,
    read_tree,
    say_on_stderr,
)
from prcl_fast.config.messages import first_message
from prcl_fast.config.methods import MethodConfig, PPSConfig, UnlabeledConfig
from prcl_fast.config.types import Count, Fraction, NonNegative, PathString, Positive, Rgb, Section, Size
from prcl_fast.errors import InputError


def _off_is_a_word(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class SyntheticConfig(Section):
    """The generated data set of `data.kind: synthetic`: the same images as `prcl data synth` writes."""

    size: Size = Field([64, 64], description="Height and width of every image, 64 to 128 pixels.")
    labeled: Count = Field(5, description="Number of labeled images.")
    unlabeled: Count = Field(200, description="Number of unlabeled images.")
    val: Count = Field(96, description="Number of validation images.")
    seed: int = Field(0, ge=0, description="Seed of the images, apart from the seed of the run.")


class AugmentConfig(Section):
    """Weak geometric augmentation of all images, strong photometric augmentation of unlabeled ones."""

    scale: list[Positive] = Field(
        [0.5, 2.0], min_length=2, max_length=2, description="Range of random scaling."
    )
    flip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    jitter: Fraction = Field(0.8, description="Probability of colour jitter on an unlabeled image.")
    brightness: Fraction = 0.5
    contrast: Fraction = 0.5
    saturation: Fraction = 0.5
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    grayscale: Fraction = Field(0.2, description="Probability of grey on an unlabeled image.")
    blur: Fraction = Field(0.5, description="Probability of a Gaussian blur on an unlabeled image.")
    blur_sigma: list[Positive] = Field(
        [0.1, 2.0], min_length=2, max_length=2, description="Range of the blur's standard deviation, pixels."
    )

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("scale", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the lower end {low} is above the upper end {high}")
        return self


class DataConfig(Section):
    """Which images, which labels, and how they become batches."""

    kind: Literal["voc", "cityscapes", "folder", "synthetic"]
    root: PathString | None = Field(None, description="Folder of the data set; not for kind synthetic.")
    labeled: PathString | None = Field(None, description="Split file of the labeled images.")
    unlabeled: PathString | None = Field(None, description="Split file of the unlabeled images.")
    val: PathString | None = Field(None, description="Split file of the validation images.")
    classes: list[str] | PathString | None = Field(
        None, description="Class names in the order of their ids, or a text file with one name a line."
    )
    images: str = Field("images", description="Folder below root, or pattern with {name} (kind folder).")
    labels: str = Field("labels", description="Folder below root, or pattern with {name} (kind folder).")
    label_map: dict[Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]] | None = Field(
        None, description="From the ids on disk to class ids; ids not named here stay as they are."
    )
    palette: list[Rgb] | None = Field(
        None,
        description="A colour per class: for pictures, and to read RGB masks (kind folder), where further "
        "colours mean: not labeled.",
    )
    ignore: int = Field(255, ge=0, le=255, description="The id on disk that means: not labeled.")
    synthetic: SyntheticConfig = SyntheticConfig()
    crop: Size = Field([512, 512], description="Height and width of a training crop, pixels.")
    augment: AugmentConfig = AugmentConfig()
    mean: list[float] = Field([0.485, 0.456, 0.406], min_length=3, max_length=3)
    std: list[Positive] = Field([0.229, 0.224, 0.225], min_length=3, max_length=3)
    workers: int = Field(
        2, ge=0, le=256, description="Processes that decode images; 0 decodes in the main process."
    )
    cache: Literal["none", "ram", "disk"] = Field(
        "none", description="Keep the decoded training images: in memory that processes share, or on disk."
    )
    cache_dir: PathString | None = Field(
        None, description="Folder of cache: disk; null: prcl_fast/images in the user's cache folder."
    )
    scan: bool = Field(True, description="Check every label file for ids out of range before training.")

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


class ModelConfig(Section):
    """The network: encoder, DeepLabv3+ decoder, heads."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"] = "resnet101"
    stem: Literal["plain", "deep"] = Field("plain", description="The first layers of a ResNet.")
    output_stride: Literal[8, 16] = 16
    base_width: int = Field(
        64,
        ge=8,
        description="Channels of a ResNet's first stage: 64 in the published networks, less for small "
        "images and machines (without their weights).",
    )
    width: int = Field(256, ge=16, description="Channels of the decoder.")
    dim: int = Field(256, ge=2, description="D, channels of the representation.")
    weights: PathString | None = Field(
        None, description="Initial weights: torchvision's key names, or a network file."
    )

    @model_validator(mode="after")
    def _shaped(self) -> ModelConfig:
        if self.backbone == "mobilenet_v2":
            for key, only in (("stem", "plain"), ("base_width", 64)):
                if getattr(self, key) != only:
                    raise ValueError(
                        f"{key}: {getattr(self, key)} is for a ResNet; leave it out for mobilenet_v2"
                    )
        return self


class OptimConfig(Section):
    """SGD with the polynomial schedule base * (1 - iter/total)^power."""

    lr: Positive = Field(6.4e-3, description="Learning rate of decoder and heads.")
    backbone_lr: Positive | None = Field(None, description="Learning rate of the backbone; null: lr.")
    probability_lr: NonNegative | None = Field(
        None,
        description="Learning rate of the probability head (soft freezing); null: the IJCV paper's 5e-5 for "
        "40000 iterations and more, 5e-5 * 40000 / iterations for fewer, at most lr.",
    )
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5.0e-4
    power: NonNegative = 0.9


class TrainConfig(Section):
    """The loop."""

    iterations: Count = 40000
    batch_labeled: Count = Field(8, description="Labeled images of a step, over all processes.")
    batch_unlabeled: Count = Field(8, description="Unlabeled images of a step, over all processes.")
    accumulate: Count = Field(1, description="Forward and backward passes that share one optimiser step.")
    amp: Annotated[Literal["off", "bf16", "fp16"], BeforeValidator(_off_is_a_word)] = "off"
    tf32: bool = Field(
        True, description="CUDA: float32 products and convolutions with TF32's 10-bit mantissa."
    )
    compile: bool = Field(False, description="torch.compile for the networks.")
    graph: bool = Field(False, description="CUDA: the whole step as one captured graph.")
    sync_check: bool = Field(
        False, description="CUDA: an error where a step makes the host wait for the device."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; null: PyTorch's choice.")
    sync_bn: bool = Field(
        True, description="Batch norm over the images of all processes; false: over those of each."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite ends the run, or its step is left out."
    )
    stall_timeout: Positive | None = Field(
        600.0, description="Seconds without progress after which a run is ended; null: never."
    )
    log_every: Count = 20
    eval_every: Count = 1000
    save_every: Count = 1000
    keep: Count = Field(2, description="Checkpoints kept for resuming: last.pt, last-1.pt, ...")


class EvalConfig(Section):
    """How a network is evaluated, during training and by `prcl eval`."""

    mode: Literal["whole", "center", "sliding"] = "whole"
    crop: Size | None = Field(None, description="Size of the centre crop (mode center); null: data.crop.")
    window: Size | None = Field(None, description="Size of the sliding window; null: data.crop.")
    stride: Fraction = Field(2 / 3, gt=0, description="Stride of the window as a share of its size.")
    average: Literal["logits", "softmax"] = Field(
        "softmax", description="What overlapping windows and scales average."
    )
    scales: list[Positive] = Field([1.0], min_length=1, description="Image scales that are averaged.")
    flip: bool = Field(False, description="Average with the mirrored image.")
    batch: Count = Field(4, description="Images, or windows, of one forward pass.")


# Soft freezing, section 4.1 of the IJCV paper, whose shortest runs, the ablations, have this many iterations.
# The AAAI paper gives no rate.
PAPER_PROBABILITY_LR = 5.0e-5
PAPER_ITERATIONS = 40000


class Config(Section):
    """A whole run."""

    seed: int = Field(0, ge=0)
    output: PathString = Field(description="Folder for everything that the run writes.")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    method: MethodConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def probability_lr(self) -> float:
        """`optim.probability_lr`, or what its null stands for."""
        if self.optim.probability_lr is not None:
            return self.optim.probability_lr
        longer = max(1.0, PAPER_ITERATIONS / self.train.iterations)
        return min(self.optim.lr, PAPER_PROBABILITY_LR * longer)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        stride = self.model.output_stride
        if min(self.data.crop) < stride:
            raise ValueError(f"data.crop: {self.data.crop} is smaller than model.output_stride {stride}")
        for key, size in (("eval.window", self.eval.window), ("eval.crop", self.eval.crop)):
            if size is not None and min(size) < stride:
                raise ValueError(f"{key}: {size} is smaller than model.output_stride {stride}")
        if isinstance(self.method, UnlabeledConfig):
            if self.data.kind != "synthetic" and self.data.unlabeled is None:
                raise ValueError(f"data.unlabeled: required for method {self.method.name}")
            mixes = self.method.mix in ("cutmix", "classmix")
            if mixes and self.train.batch_unlabeled // self.train.accumulate < 2:
                raise ValueError(
                    f"train.batch_unlabeled: mix {self.method.mix} needs at least 2 images in each pass"
                )
        if isinstance(self.method, UnlabeledConfig) and self.method.warmup >= self.train.iterations:
            raise ValueError(
                f"method.warmup: must be below train.iterations {self.train.iterations}, "
                f"got {self.method.warmup}"
            )
        if isinstance(self.method, PPSConfig) and self.model.dim % self.method.heads:
            raise ValueError(f"method.heads: must divide model.dim {self.model.dim}, got {self.method.heads}")
        if isinstance(self.method, PPSConfig) and self.model.dim % 4:
            raise ValueError(f"model.dim: must be a multiple of 4 for method pps, got {self.model.dim}")
        for key in ("batch_labeled", "batch_unlabeled"):
            if getattr(self.train, key) % self.train.accumulate:
                raise ValueError(
                    f"train.{key}: must be a multiple of train.accumulate {self.train.accumulate}"
                )
        return self


# What does not shape a run's result.
NEUTRAL_KEYS = (
    "output",
    *(f"data.{key}" for key in ("workers", "scan", "cache", "cache_dir")),
    *(f"train.{key}" for key in ("threads", "device", "graph", "sync_check")),
    "train.on_nonfinite",  # what a run that met one is told to change
    *(f"train.{key}" for key in ("stall_timeout", "log_every", "save_every", "keep")),
)


def load_config(
    path: Path, overrides: Sequence[str] = (), say: Callable[[str], None] = say_on_stderr
) -> Config:
    """Reads a YAML file, its chain of `base:` files and `key.path=value` overrides.

    A `path` such as configs/demo.yaml that does not exist is read from the package, and `say` takes a line.

    Relative paths inside `data` and `model` are relative to the file that names them; `output`, and a path to
    another run's, are relative to the working directory, as is every path in an override.

    Raises:
        InputError: naming the file and the key.
    """
    tree = read_tree(path, say)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, str(path))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of `config` with `key.path=value` overrides applied. Raises InputError."""
    tree = dump_config(config)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, "command line")


def parse_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Validates a plain tree; `origin` names its source in messages. Raises InputError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}: {first_message(error, tree, Config)}") from None


def dump_config(config: Config) -> dict[str, Any]:
    """A plain tree of YAML types, paths absolute and without `..`, that `parse_config` reads back."""
    tree = config.model_dump()
    for section, key in (("", "output"), *PATH_KEYS, *RUN_KEYS):
        holder = tree[section] if section else tree
        if isinstance(holder.get(key), Path):
            holder[key] = str(plain_path(holder[key]))
    return tree


def config_fingerprint(config: Config) -> str:
    """A hash of all that shapes a run's result: two runs of one fingerprint may share an output directory."""
    tree = dump_config(config)
    for path in NEUTRAL_KEYS:
        section, _, key = path.rpartition(".")
        del (tree[section] if section else tree)[key]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for completion in editors; no key is required in one file."""
    schema = Config.model_json_schema()
    schema["properties"]["base"] = {
        "type": "string",
        "description": "File to inherit from, relative to this one.",
    }
    schema.pop("required", None)
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    return schema
