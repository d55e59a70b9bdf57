"""Settings of the probabilistic contrast: names, ranges and defaults for the module and for YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from prcl_fast.config.messages import first_message
from prcl_fast.config.types import Drawn, Fraction, NonNegative, Positive, Section

# 100 is the public code's value, and leaves normalised scores at chance level; 0.5 is this project's.
_TAU, _COSINE_TAU = 100.0, 0.5


class ContrastConfig(Section):
    """The contrast L_c, eq. (15) of the IJCV paper.

    `losses.ProbabilisticContrast` takes these settings, and the section `method` of a PRCL run contains them.
    `reduction` and `normalize` have the same defaults in `ops.probabilistic_info_nce`.
    """

    representation: Literal["probabilistic", "deterministic"] = Field(
        "probabilistic",
        description="probabilistic: Gaussians with a predicted variance; deterministic: points, compared by "
        "cosine similarity.",
    )
    prototype: Literal["local", "ema", "global"] = Field(
        "global",
        description="Prototype that is the positive of an anchor. local: of the batch, eq. (4); ema: moving "
        "average over batches, eq. (16); global: global distribution prototype (GDP) of all batches so far, "
        "eq. (9).",
    )
    prototype_ema: Fraction = Field(
        0.99,
        description="Decay alpha of the moving averages of eq. (16): prototypes of kind ema, and "
        "virtual_spread class.",
    )
    virtual_negatives: int = Field(
        4,
        ge=0,
        le=65536,
        description="Virtual negatives drawn from each class's global prototype, eq. (10); 0: none.",
    )
    virtual_spread: Literal["prototype", "class"] = Field(
        "prototype",
        description="Spread s of virtual negatives mu + beta * s * noise. prototype: the variance sigma^2 "
        "of the global prototype, as eq. (10) prints it; class: the running standard deviation of the "
        "class's means mu.",
    )
    beta: NonNegative = Field(1.0, description="Radius beta of the virtual negatives, eq. (10).")
    memory_bank: int = Field(
        0,
        ge=0,
        le=2**20,
        description="Representations of earlier batches kept per class, as further negatives in place of "
        "virtual ones; 0: no memory bank.",
    )
    bank_negatives: Drawn = Field(4, description="Negatives drawn from the memory bank per class and step.")
    delta_s: Fraction = Field(
        0.8, description="Confidence, from 0 to 1, below which a pixel is hard; anchors are hard pixels."
    )
    tau: Positive | None = Field(
        None,
        description="Temperature of the contrast, eq. (15); null: 100 for probabilistic, 0.5 for "
        "deterministic representations.",
    )
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="Score of eq. (3): sum or mean over the dimensions."
    )
    normalize: bool = Field(
        False, description="L2-normalise the means mu inside the score, as the authors' public code does."
    )
    anchors: Drawn = Field(256, description="Anchors per class and step.")
    negatives: Drawn = Field(512, description="Real negatives per anchor.")
    negative_classes: Literal["prototype", "local", "uniform"] = Field(
        "prototype",
        description="Scores by which the classes of real negatives are drawn. prototype: of the anchors' "
        "positives; local: of the batch's prototypes; uniform: all other classes alike.",
    )
    anchors_per_set: Drawn = Field(
        1,
        description="Anchors of a class that use the same set of negatives; must divide anchors. 16 or 32 "
        "is faster; the expectation of the loss stays, its variance grows.",
    )

    def changed(self, options: Mapping[str, Any]) -> ContrastConfig:
        """These settings with some of them changed.

        Raises:
            ValueError: an option is unknown or out of its range.
        """
        if not options:
            return self
        given = self.model_dump(include=set(ContrastConfig.model_fields)) | dict(options)
        try:
            return ContrastConfig(**given)
        except ValidationError as error:
            raise ValueError(first_message(error, given, ContrastConfig)) from None

    @property
    def temperature(self) -> float:
        """tau, or the default used for null."""
        if self.tau is not None:
            return self.tau
        return _COSINE_TAU if self.representation == "deterministic" else _TAU

    @model_validator(mode="after")
    def _consistent(self) -> ContrastConfig:
        if self.representation == "deterministic" and self.virtual_negatives:
            raise ValueError(
                "virtual_negatives: must be 0 with representation deterministic (it has no variance)"
            )
        if self.memory_bank and (self.virtual_negatives or self.representation == "deterministic"):
            raise ValueError(
                "memory_bank: takes the place of virtual_negatives, which must be 0, and needs "
                "representation probabilistic"
            )
        if self.anchors % self.anchors_per_set:
            raise ValueError(f"anchors_per_set: must divide anchors ({self.anchors})")
        return self
