"""The configuration of a run: its sections, their ranges, and how files and overrides become one.

Every mistake becomes an InputError of one line that names the file and the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from prcl_fast.config.data import DataConfig
from prcl_fast.config.files import (
    PATH_KEYS,
    RUN_KEYS,
    apply_override,
    plain_path,
    read_tree,
    say_on_stderr,
)
from prcl_fast.config.messages import first_message
from prcl_fast.config.methods import MethodConfig
from prcl_fast.config.renamed import with_new_names
from prcl_fast.config.sections import EvalConfig, ModelConfig, OptimConfig, TrainConfig
from prcl_fast.config.types import PathString, Section
from prcl_fast.errors import InputError

# Soft freezing, IJCV paper, section 4.1. Its shortest runs, the ablations, have 40000 iterations. The AAAI
# paper gives no rate.
PAPER_PROBABILITY_LR = 5.0e-5
PAPER_ITERATIONS = 40000
MAX_PASS_PIXELS = 2**31  # the ops have 32-bit indices of pixels


class Config(Section):
    """A run: seed, output folder, and one section for each part."""

    seed: int = Field(
        0, ge=0, description="Random seed of weights, order of images, augmentation and sampling."
    )
    output: PathString = Field(
        description="Folder of the run: configuration, log, metrics, checkpoints. Relative to the working "
        "directory, unlike other paths, which are relative to the file that contains them."
    )
    data: DataConfig
    model: ModelConfig = ModelConfig()
    method: MethodConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def probability_lr(self) -> float:
        """`optim.probability_lr`, or the default used for null."""
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
        method, train = self.method, self.train
        if method.needs_unlabeled and self.data.kind != "synthetic" and self.data.unlabeled is None:
            raise ValueError(f"data.unlabeled: required for method {method.name}")
        if method.mixes_pairs and train.batch_unlabeled // train.accumulate < 2:
            raise ValueError(
                f"train.batch_unlabeled: mix {method.mixing} needs at least 2 images in each pass"
            )
        if method.warmup_iterations >= train.iterations:
            raise ValueError(
                f"method.warmup: must be below train.iterations {train.iterations}, "
                f"got {method.warmup_iterations}"
            )
        method.check_dim(self.model.dim)
        images = -(-train.batch_labeled // train.accumulate) + -(-train.batch_unlabeled // train.accumulate)
        pixels = images * self.data.crop[0] * self.data.crop[1]
        if pixels >= MAX_PASS_PIXELS:
            raise ValueError(
                f"data.crop: {images} crops of {self.data.crop} in one pass have {pixels} pixels, at most "
                "2^31 - 1 are possible; lower it or train.batch_labeled, or raise train.accumulate"
            )
        for key in ("batch_labeled", "batch_unlabeled"):
            if getattr(self.train, key) % self.train.accumulate:
                raise ValueError(
                    f"train.{key}: must be a multiple of train.accumulate {self.train.accumulate}"
                )
        return self


# Keys that the processes of a run may set differently. Threads, worker processes and the image cache suit the
# machine; the processes agree on the kind of device where they meet. Rank 0 alone scans the labels and writes
# the output. Files may lie elsewhere: their content must be equal.
PROCESS_KEYS = (
    "output",
    *(".".join(key) for key in (*PATH_KEYS, *RUN_KEYS)),
    *(f"data.{key}" for key in ("workers", "scan", "cache")),
    *(f"train.{key}" for key in ("threads", "device")),
)

# Keys that do not affect the result of a run.
NEUTRAL_KEYS = (
    "output",
    *(f"data.{key}" for key in ("max_pixels", "workers", "scan", "cache", "cache_dir")),
    *(f"train.{key}" for key in ("threads", "device", "graph", "sync_check")),
    "train.on_nonfinite",  # a run stopped by a value that is not finite may resume with another setting
    *(f"train.{key}" for key in ("stall_timeout", "log_every", "save_every", "keep")),
)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = say_on_stderr
) -> Config:
    """Reads a YAML file, its chain of `base:` files and `key.path=value` overrides.

    A `path` such as configs/demo.yaml that does not exist is read from the package, and `say` takes a line.

    Paths in `data` and `model` are relative to the file that contains them. `output`, paths to other runs,
    and all paths in overrides are relative to the working directory.

    Raises:
        InputError: naming the file and the key.
    """
    tree = read_tree(Path(path), say)
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


def load_stored_config(path: str | Path) -> Config:
    """The config.yaml that a run has written, also a run of a former version. Raises InputError."""
    return parse_stored_config(read_tree(Path(path)), str(path))


def parse_stored_config(tree: Mapping[str, Any], origin: str) -> Config:
    """`parse_config` for a tree that a run has stored: keys renamed since then are translated."""
    return parse_config(with_new_names(tree), origin)


def dump_config(config: Config) -> dict[str, Any]:
    """A plain tree of YAML types, paths absolute and without `..`, that `parse_config` reads back.

    `data.synthetic` is left out where the data set is of another kind.
    """
    tree = config.model_dump()
    if config.data.kind != "synthetic":
        del tree["data"]["synthetic"]
    for section, key in (("", "output"), *PATH_KEYS, *RUN_KEYS):
        holder = tree[section] if section else tree
        if isinstance(holder.get(key), Path):
            holder[key] = str(plain_path(holder[key]))
    return tree


def flat_config(config: Config, without: Collection[str] = ()) -> dict[str, Any]:
    """key.path: value of every key that is not in `without`; paths absolute."""
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], above: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and key != "label_map":
                walk(value, f"{above}{key}.")
            elif above + key not in without:
                flat[above + key] = value

    walk(dump_config(config), "")
    return flat


def config_fingerprint(config: Config) -> str:
    """A hash of all keys that affect a run's result: runs with the same hash may use one output folder."""
    tree = dump_config(config)
    for path in NEUTRAL_KEYS:
        section, _, key = path.rpartition(".")
        del (tree[section] if section else tree)[key]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for completion in editors; a file may leave out any key."""
    schema = Config.model_json_schema()
    schema["properties"]["base"] = {
        "type": "string",
        "description": "File to inherit from, relative to this one.",
    }
    schema.pop("required", None)
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    return schema
