"""Settings of the probabilistic contrast: one set of names, ranges and defaults for module and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from prcl_fast.config.messages import first_message
from prcl_fast.config.types import Count, Fraction, NonNegative, Positive, Section

# The authors' public code's, for a mean over normalised mu, which it leaves at chance; and this project's.
_TAU, _COSINE_TAU = 100.0, 0.5


class ContrastConfig(Section):
    """The contrast L_c, eq. (15) of the IJCV paper.

    `losses.ProbabilisticContrast` takes these settings, and the section `method` of a PRCL run contains them.
    `reduction` and `normalize` have the same defaults in `ops.probabilistic_info_nce`.
    """

    representation: Literal["probabilistic", "deterministic"] = Field(
        "probabilistic", description="Gaussians, or points: a variance of 1/2 everywhere, cosine similarity."
    )
    prototype: Literal["local", "ema", "global"] = Field(
        "global", description="Positive of an anchor: eq. (4), EMA of eq. (16), or GDP, eq. (9)."
    )
    prototype_ema: Fraction = Field(0.99, description="alpha of prototype: ema, eq. (16).")
    virtual_negatives: int = Field(
        4, ge=0, description="Virtual negatives of each class that has a GDP, eq. (10); 0: none."
    )
    virtual_spread: Literal["prototype", "class"] = Field(
        "prototype",
        description="What beta multiplies: the GDP's sigma^2, as eq. (10) prints it, or the running standard "
        "deviation of the class's mu.",
    )
    beta: NonNegative = Field(1.0, description="Virtual radius, eq. (10).")
    memory_bank: int = Field(
        0,
        ge=0,
        description="Representations of recent batches kept per class, in place of virtual negatives; "
        "0: none.",
    )
    bank_negatives: Count = Field(4, description="Negatives per class drawn from the memory bank.")
    delta_s: Fraction = Field(0.8, description="Confidence below which a valid pixel is hard.")
    tau: Positive | None = Field(
        None,
        description="Temperature of the contrast, eq. (15); null: 100, or 0.5 for cosine similarities.",
    )
    reduction: Literal["sum", "mean"] = Field("sum", description="The score over the dimensions, eq. (3).")
    normalize: bool = Field(False, description="L2-normalise mu inside the score, as the authors' code does.")
    anchors: Count = Field(256, description="Anchors per class.")
    negatives: Count = Field(512, description="Real negatives per anchor.")
    negative_classes: Literal["prototype", "local", "uniform"] = Field(
        "prototype",
        description="Whose scores the classes of real negatives are drawn by: the anchors' positives', the "
        "batch's own prototypes', or nobody's, all alike.",
    )
    share: Count = Field(
        1, description="Anchors of a class that share one set of negatives: 16 or 32 is faster, and unbiased."
    )

    def changed(self, options: Mapping[str, Any]) -> ContrastConfig:
        """These settings with some of them changed.

        Raises:
            ValueError: an option that is unknown, or out of its range.
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
        """tau, or what its null stands for."""
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
        if self.anchors % self.share:
            raise ValueError(f"share: must divide anchors ({self.anchors})")
        return self
