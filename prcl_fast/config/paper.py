"""The settings of the two PRCL papers, and how a configuration differs from them.

A value comes from the "paper" if its text gives it, with the section; else from the same authors' "public
code"; else it is "ours", this project's choice. IJCV is Xie et al., "PRCL: Probabilistic Representation
Contrastive Learning for Semi-Supervised Semantic Segmentation"; AAAI is Xie et al., "Boosting Semi-Supervised
Semantic Segmentation with Probabilistic Representations", AAAI 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prcl_fast.config.methods import PRCLConfig
from prcl_fast.config.schema import Config

Paper = Literal["IJCV", "AAAI"]
Origin = Literal["paper", "public code", "ours"]


@dataclass(frozen=True)
class Difference:
    """One setting that differs from the paper."""

    key: str
    here: str
    there: str
    source: Origin  # of the paper's value
    section: str  # of the paper, if the source is the paper; else ""
    meaning: str


@dataclass(frozen=True)
class _Fact:
    """A value of the paper, found in `section`; without a section it comes from `source`."""

    key: str
    value: Any
    section: str
    meaning: str
    source: Origin = "public code"

    @property
    def origin(self) -> tuple[Origin, str]:
        return ("paper", self.section) if self.section else (self.source, "")


@dataclass(frozen=True)
class _Schedule:
    """Crop, batch and iterations of a run."""

    crop: list[int]
    batch: tuple[int, int]  # labeled and unlabeled images of a step
    iterations: int
    section: str  # of the paper, for crop, images per step and iterations; "": from the public code
    split: Origin  # of the number of labeled images among them


# The IJCV paper gives labeled and unlabeled images of a step in one number.
_SCHEDULES: dict[tuple[Paper, str], _Schedule] = {
    ("IJCV", "voc"): _Schedule([512, 512], (8, 8), 80000, "4.1", "ours"),
    ("IJCV", "cityscapes"): _Schedule([768, 768], (8, 8), 160000, "4.1", "ours"),
    ("AAAI", "voc"): _Schedule([321, 321], (16, 16), 25000, "", "public code"),
    ("AAAI", "cityscapes"): _Schedule([512, 512], (6, 6), 65000, "", "public code"),
}
_ABLATION = _Schedule([512, 512], (4, 4), 40000, "4.1", "ours")  # IJCV, on VOC

# Values that neither text gives. The stem is not listed: both papers use the plain one against baselines and
# the deep one against the state of the art.
_EITHER = (
    _Fact("model.output_stride", 16, "", "8 gives finer maps for more memory and time"),
    _Fact("model.width", 256, "", "another capacity of decoder and heads"),
    _Fact("model.dim", 256, "", "another dimension D of the representation"),
    _Fact("optim.momentum", 0.9, "", "another optimiser"),
    _Fact("optim.weight_decay", 5e-4, "", "another regularisation"),
    _Fact("method.delta_u", 0.97, "", "which pixels count for omega"),
    _Fact("method.ema", 0.99, "", "the teacher follows at another speed"),
)
_EITHER_PRCL = (
    _Fact("method.anchors", 256, "", "anchors of a class: variance of the loss"),
    _Fact("method.tau", 100.0, "", "another sharpness of the contrast"),
    _Fact("method.lambda_c", 1.0, "", "another weight of the contrast"),
)
_SCHEDULER = "another decay of the weight of the contrast, eq. (12)"
_SHARED = "anchors share negatives: same expectation, more variance"
_HARD = "which valid pixels are hard enough for anchors"
_STUDENT = "whose confidence picks the hard pixels; student as in the public code"
_FACTS: dict[Paper, tuple[_Fact, ...]] = {
    "IJCV": (
        _Fact("model.backbone", "resnet101", "4.2", "another capacity: figures cannot be compared"),
        _Fact("optim.lr", 6.4e-3, "4.1", "another learning rate"),
        _Fact("optim.probability_lr", 5e-5, "4.1", "the soft freezing of the probability head"),
        _Fact("optim.power", 0.9, "4.1", "another decay of the learning rate"),
        _Fact("method.mix", "classmix", "", "another mixing of the unlabeled images; none is the row MT"),
        _Fact("method.omega", "batch", "eq. (14)", "image is the public code's, pixel the AAAI paper's"),
        *_EITHER,
    ),
    "AAAI": (
        _Fact("model.backbone", "resnet101", "network structure", "another capacity"),
        _Fact("optim.lr", 3.2e-3, "", "another learning rate"),
        _Fact("optim.probability_lr", 5e-5, "", "the soft freezing of the probability head"),
        _Fact("optim.power", 0.9, "", "another decay of the learning rate"),
        _Fact("method.mix", "classmix", "tables 1 to 3", "another mixing of the unlabeled images"),
        _Fact("method.omega", "pixel", "eq. (11)", "image is the public code's, batch the IJCV paper's"),
        *_EITHER,
    ),
}
_PRCL_FACTS: dict[Paper, tuple[_Fact, ...]] = {
    "IJCV": (
        _Fact("method.delta_w", 0.7, "5.4", "which pixels are valid for the contrast"),
        _Fact("method.delta_s", 0.8, "5.4", _HARD),
        _Fact("method.representation", "probabilistic", "3.2", "deterministic: Baseline or Baseline+"),
        _Fact("method.prototype", "global", "3.3", "local: without GDP; ema: Baseline+, eq. (16)"),
        _Fact("method.prototype_ema", 0.99, "4.2", "another speed of Baseline+'s prototypes, eq. (16)"),
        _Fact("method.virtual_negatives", 4, "5.3", "0: without virtual negatives"),
        _Fact("method.virtual_spread", "prototype", "eq. (10)", "class: the spread of mu, not sigma^2"),
        _Fact("method.memory_bank", 0, "5.3", "table 7's rows MB"),
        _Fact("method.negative_classes", "prototype", "3.5", "whose similarity draws negatives' classes"),
        _Fact("method.beta", 1.0, "5.3", "another radius, eq. (10); table 7 has its best at 0.8"),
        _Fact("method.alpha", -5.0, "", _SCHEDULER),
        _Fact("method.reduction", "sum", "eq. (3)", "mean as in the public code"),
        _Fact("method.normalize", False, "eq. (3)", "true as in the public code"),
        _Fact("method.confidence", "teacher", "3.1, 3.5", _STUDENT),
        _Fact("method.negatives", 512, "", "negatives of an anchor"),
        _Fact("method.anchors_per_set", 1, "", _SHARED),
        *_EITHER_PRCL,
    ),
    "AAAI": (
        _Fact("method.delta_w", 0.7, "table 4", "which pixels are valid for the contrast"),
        _Fact("method.delta_s", 0.8, "table 4", _HARD),
        _Fact("method.alpha", -5.0, "", f"{_SCHEDULER}; 0 in tables 4 and 6"),
        _Fact("method.reduction", "sum", "eq. (9)", "mean as in the public code"),
        _Fact("method.normalize", False, "eq. (9)", "true as in the public code"),
        _Fact(
            "method.confidence", "student", "", "whose confidence picks the hard pixels; no network is named"
        ),
        _Fact("method.negatives", 512, "table 6", "negatives of an anchor"),
        _Fact("method.anchors_per_set", 1, "sampling strategy", _SHARED),
        *_EITHER_PRCL,
    ),
}


def paper_of(config: Config) -> Paper | None:
    """The paper with which a configuration is compared; None for data sets of neither paper.

    Probabilistic PRCL belongs to IJCV. Only with prototypes of the batch alone, no virtual negatives and no
    memory bank does it belong to AAAI, unless it has the schedule of the IJCV paper's ablations.
    Deterministic contrast and all other methods belong to AAAI if they have the crop of its schedule, else to
    IJCV.
    """
    if ("IJCV", config.data.kind) not in _SCHEDULES:
        return None
    method = config.method
    if isinstance(method, PRCLConfig) and method.representation == "probabilistic":
        further = method.prototype != "local" or method.virtual_negatives or method.memory_bank
        return "IJCV" if further or _is_ablation(config) else "AAAI"
    return "AAAI" if config.data.crop == _SCHEDULES["AAAI", config.data.kind].crop else "IJCV"


def paper_batch(config: Config) -> tuple[int, int] | None:
    """The paper's labeled and unlabeled images per step; None for data sets of neither paper."""
    paper = paper_of(config)
    return None if paper is None else _schedule_of(config, paper).batch


def paper_differences(config: Config) -> list[Difference]:
    """The differences from the paper of `paper_of`; none for data sets of neither paper."""
    paper = paper_of(config)
    if paper is None:
        return []
    facts = _FACTS[paper]
    if config.method.name == "prcl":
        facts += _PRCL_FACTS[paper]
    found = [*_schedule(config, _schedule_of(config, paper)), *_method(config), *_weights(config, paper)]
    for fact in facts:
        here = _value_of(config, fact)
        if here != fact.value:
            found.append(Difference(fact.key, _text(here), _text(fact.value), *fact.origin, fact.meaning))
    return found


def _value_of(config: Config, fact: _Fact) -> Any:
    """The run's value of a key, with nulls resolved; the paper's value if the method lacks the key."""
    section, key = fact.key.split(".")
    if key == "probability_lr":
        return config.probability_lr
    if key == "tau" and isinstance(config.method, PRCLConfig):
        return config.method.temperature
    return getattr(getattr(config, section), key, fact.value)


def _is_ablation(config: Config) -> bool:
    return config.data.kind == "voc" and config.train.iterations == _ABLATION.iterations


def _schedule_of(config: Config, paper: Paper) -> _Schedule:
    if paper == "IJCV" and _is_ablation(config):
        return _ABLATION
    return _SCHEDULES[paper, config.data.kind]


def _schedule(config: Config, there: _Schedule) -> list[Difference]:
    """Differences in crop, batch, accumulation and iterations."""
    train, crop = config.train, config.data.crop
    given: tuple[Origin, str] = ("paper", there.section) if there.section else ("public code", "")
    found = []
    if crop != there.crop:
        share = crop[0] * crop[1] / (there.crop[0] * there.crop[1])
        meaning = f"{share:.0%} of the pixels of an image at a time"
        found.append(Difference("data.crop", _text(crop), _text(there.crop), *given, meaning))
    batch = (train.batch_labeled, train.batch_unlabeled)
    if batch != there.batch:
        key, values = "train.batch_labeled + unlabeled", (_pair(batch), _pair(there.batch))
        if sum(batch) == sum(there.batch):
            found.append(
                Difference(key, *values, there.split, "", "as many images, another fraction of labeled ones")
            )
        else:
            change = "noisier" if sum(batch) < sum(there.batch) else "smoother"
            meaning = f"{change} gradients, and batch-norm statistics over another number of images"
            if there.split == "ours":
                meaning += f"; the paper gives {sum(there.batch)}, and not how many of them are labeled"
            found.append(Difference(key, *values, *given, meaning))
    if train.accumulate > 1:
        passes = _pair((batch[0] // train.accumulate, batch[1] // train.accumulate))
        meaning = (
            f"gradients of the whole batch, but batch norm sees {passes} images per pass, and mixing "
            "partners and negatives come from the same pass"
        )
        found.append(Difference("train.accumulate", str(train.accumulate), "1", "ours", "", meaning))
    if train.iterations != there.iterations:
        images = sum(batch) * train.iterations / (sum(there.batch) * there.iterations)
        meaning = f"together with the batch, {images:.3g} times the images"
        values = str(train.iterations), str(there.iterations)
        found.append(Difference("train.iterations", *values, *given, meaning))
    return found


def _method(config: Config) -> list[Difference]:
    name = config.method.name
    if name == "prcl":
        return []
    meaning = "no contrast of probabilistic representations; a method for comparison"
    return [Difference("method.name", name, "prcl", "paper", "3", meaning)]


def _weights(config: Config, paper: Paper) -> list[Difference]:
    if config.model.weights is not None:
        return []
    section = {"IJCV": "4.1", "AAAI": "network structure"}[paper]
    meaning = "the backbone starts from random weights"
    return [Difference("model.weights", "null", "of ImageNet", "paper", section, meaning)]


def _pair(batch: tuple[int, int]) -> str:
    return f"{batch[0]} + {batch[1]}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
