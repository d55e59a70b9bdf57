"""The papers' settings, and how a configuration differs from them.

"paper" is the IJCV paper where nothing else is said, and "configs" what this program's own configurations of
the papers' experiments (configs/voc, configs/cityscapes) set where the papers' text gives no value here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prcl_fast.config import Config

PAPER_BATCH = (8, 8)  # labeled and unlabeled images of a step
_ABLATION_BATCH = (4, 4)
_ABLATION_ITERATIONS = 40000

Source = Literal["paper", "configs"]


@dataclass(frozen=True)
class Difference:
    """One setting that is not the papers'."""

    key: str
    here: str
    there: str
    source: Source
    meaning: str


@dataclass(frozen=True)
class _Fact:
    key: str
    value: Any
    source: Source
    meaning: str


_CROPS = {"voc": [512, 512], "cityscapes": [768, 768]}
_ITERATIONS = {"voc": 80000, "cityscapes": 160000}
_FACTS = (
    _Fact("model.backbone", "resnet101", "paper", "another capacity: figures cannot be compared"),
    _Fact("model.stem", "plain", "configs", "another first layer, other starting weights"),
    _Fact("model.output_stride", 16, "configs", "8 has finer maps, and takes more memory and time"),
    _Fact("model.width", 256, "configs", "another capacity of decoder and heads"),
    _Fact("model.dim", 256, "configs", "another dimension D of the representation"),
    _Fact("optim.lr", 6.4e-3, "paper", "another learning rate"),
    _Fact("optim.probability_lr", 5e-5, "paper", "the soft freezing of the probability head"),
    _Fact("optim.momentum", 0.9, "paper", "another optimiser"),
    _Fact("optim.power", 0.9, "paper", "another decay of the learning rate"),
    _Fact("optim.weight_decay", 5e-4, "configs", "another regularisation"),
    _Fact("method.mix", "classmix", "configs", "another mixing of the unlabeled images"),
    _Fact("method.delta_u", 0.97, "configs", "which pixels count for omega, eq. (14)"),
    _Fact("method.omega", "batch", "paper", "image is what the authors' public code does"),
    _Fact("method.ema", 0.99, "configs", "the teacher follows at another speed"),
)
_PRCL_FACTS = (
    _Fact("method.delta_w", 0.7, "configs", "which pixels are valid for the contrast"),
    _Fact("method.delta_s", 0.8, "configs", "which valid pixels are hard enough for anchors"),
    _Fact("method.representation", "probabilistic", "paper", "cosine similarity in place of distributions"),
    _Fact("method.prototype", "global", "paper", "local is the AAAI paper's; ema is in neither"),
    _Fact("method.virtual_negatives", 4, "paper", "0 is the AAAI paper's: it has none"),
    _Fact("method.beta", 1.0, "paper", "another radius of the virtual negatives, eq. (10)"),
    _Fact("method.alpha", -5.0, "paper", "another decay of the weight of the contrast, eq. (12)"),
    _Fact("method.reduction", "sum", "paper", "mean is what the authors' public code does"),
    _Fact("method.normalize", False, "paper", "true is what the authors' public code does"),
    _Fact("method.confidence", "teacher", "paper", "student is what the authors' public code does"),
    _Fact("method.share", 1, "paper", "anchors share negatives: the same expectation, more variance"),
)


def paper_batch(config: Config) -> tuple[int, int] | None:
    """The papers' labeled and unlabeled images of a step, None for data sets that are not theirs."""
    return PAPER_BATCH if config.data.kind in _CROPS else None


def paper_differences(config: Config) -> list[Difference]:
    """What differs from the papers, in the order of the configuration; empty for data sets not theirs."""
    kind = config.data.kind
    if kind not in _CROPS:
        return []
    found = [*_crop(config), *_schedule(config), *_method(config), *_weights(config)]
    facts = _FACTS + (_PRCL_FACTS if config.method.name == "prcl" else ())
    for fact in facts:
        section, key = fact.key.split(".")
        holder = getattr(config, section)
        value = config.probability_lr if key == "probability_lr" else getattr(holder, key, fact.value)
        if value != fact.value:
            here, there = _text(value), _text(fact.value)
            found.append(Difference(fact.key, here, there, fact.source, fact.meaning))
    return found


def _crop(config: Config) -> list[Difference]:
    kind, crop = config.data.kind, config.data.crop
    paper = _CROPS[kind]
    if crop == paper:
        return []
    share = crop[0] * crop[1] / (paper[0] * paper[1])
    meaning = f"{share:.0%} of the pixels of an image at a time"
    if kind == "voc" and crop == [321, 321]:
        meaning = f"the AAAI paper's; {meaning}"
    return [Difference("data.crop", _text(crop), _text(paper), "paper", meaning)]


def _schedule(config: Config) -> list[Difference]:
    """Batch, accumulation and iterations, which mean something together."""
    train = config.train
    batch = (train.batch_labeled, train.batch_unlabeled)
    iterations = _ITERATIONS[config.data.kind]
    images = sum(batch) * train.iterations / (sum(PAPER_BATCH) * iterations)
    seen = f"with the batch, {images:.3g} times the paper's images"
    if config.data.kind == "voc" and (batch, train.iterations) == (_ABLATION_BATCH, _ABLATION_ITERATIONS):
        seen = f"the paper's ablations: 40000 iterations of 4 + 4; {seen}"
    found = []
    if batch != PAPER_BATCH:
        change = "noisier" if sum(batch) < sum(PAPER_BATCH) else "smoother"
        meaning = f"{change} gradients, and batch-norm statistics over other numbers of images"
        found.append(
            Difference("train.batch_labeled + unlabeled", _pair(batch), _pair(PAPER_BATCH), "paper", meaning)
        )
    if train.accumulate > 1:
        passes = _pair((batch[0] // train.accumulate, batch[1] // train.accumulate))
        found.append(
            Difference(
                "train.accumulate",
                str(train.accumulate),
                "1",
                "configs",
                f"gradients as of the whole batch, but batch norm sees {passes} images a pass, and mixing "
                "partners and negatives come from one pass",
            )
        )
    if train.iterations != iterations:
        found.append(Difference("train.iterations", str(train.iterations), str(iterations), "paper", seen))
    return found


def _method(config: Config) -> list[Difference]:
    name = config.method.name
    if name == "prcl":
        return []
    return [Difference("method.name", name, "prcl", "paper", "no contrast: a method to compare PRCL with")]


def _weights(config: Config) -> list[Difference]:
    if config.model.weights is not None:
        return []
    meaning = "the backbone starts from random weights"
    return [Difference("model.weights", "null", "resnet101.pth", "configs", meaning)]


def _pair(batch: tuple[int, int]) -> str:
    return f"{batch[0]} + {batch[1]}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
