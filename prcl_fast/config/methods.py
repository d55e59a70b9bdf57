"""The sections `method` of a configuration, one for each method; the names follow the papers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prcl_fast.config.contrast import ContrastConfig
from prcl_fast.config.types import Count, Fraction, NonNegative, PathString, Positive, Section


class SupervisedConfig(Section):
    """Only the labeled images: L_s, eq. (13)."""

    name: Literal["supervised"]


class UnlabeledConfig(Section):
    """What every method has that learns from unlabeled images, too."""

    mix: Literal["none", "cutout", "cutmix", "classmix"] = Field(
        "classmix", description="What is pasted into, or cut out of, the unlabeled images."
    )
    warmup: int = Field(
        0, ge=0, description="Supervised iterations at the start, before unlabeled images take part."
    )


class ConsistencyConfig(UnlabeledConfig):
    """What every method with a teacher and pseudo-labels has."""

    delta_u: Fraction = Field(0.97, description="Confidence above which a pixel counts for omega.")
    omega: Literal["batch", "image", "pixel"] = Field(
        "batch",
        description="Weight of L_u. batch: the batch's share of confident pixels, IJCV eq. (14); pixel: mean "
        "over the confident pixels times their share, which is 1 for a confident pixel and 0 for others, "
        "AAAI eq. (11); image: each image's share, the PRCL authors' public code.",
    )
    ema: Fraction = Field(0.99, description="Largest decay of the teacher's exponential moving average.")
    forward: Literal["concatenated", "separate"] = Field(
        "concatenated", description="Labeled and unlabeled images in one student pass, or in two."
    )


class MeanTeacherConfig(ConsistencyConfig):
    """Consistency with an EMA teacher: Mean Teacher with mix none; else ClassMix, CutMix or CutOut."""

    name: Literal["mean_teacher"]


class PRCLConfig(ConsistencyConfig, ContrastConfig):
    """Probabilistic representation contrastive learning, both papers' switches."""

    name: Literal["prcl"]
    initial_variance: Annotated[float, Field(gt=1e-6, lt=1)] = Field(
        0.5,
        description="sigma^2 that the probability head starts around. 0.5, a bias of 0, is large beside "
        "normalised means, whose components have squares of 1 / model.dim.",
    )
    delta_w: Fraction = Field(0.7, description="Confidence from which a pixel is valid.")
    confidence: Literal["student", "teacher"] = Field(
        "student", description="Whose probability of the pixel's class picks hard pixels."
    )
    lambda_c: NonNegative = Field(1.0, description="Initial weight of the contrast, eq. (12).")
    alpha: float = Field(-5.0, le=0, description="Decay of that weight, eq. (12); 0 holds it constant.")


class PCRConfig(ConsistencyConfig):
    """Consistency of a linear and a prototype-based predictor [Xu et al., NeurIPS 2022]."""

    name: Literal["pcr"]
    mix: Literal["none", "cutout", "cutmix", "classmix"] = "cutmix"
    delta_u: Fraction = Field(0.8, description="Confidence above which a pseudo-label counts.")
    omega: Literal["batch", "image", "pixel"] = Field(
        "pixel", description="Weight of the losses on unlabeled pixels, as in mean_teacher."
    )
    predictor: Literal["both", "prototype"] = Field(
        "both",
        description="Linear and prototype predictor; or the latter alone, which then also labels the "
        "unlabeled images, table 4. (The linear one alone is mean_teacher.)",
    )
    features: Literal["decoder", "aspp"] = Field(
        "decoder",
        description="What prototypes are made of: what the classifier reads, eq. (3) and Algorithm 2, or "
        "ASPP's output, section 4.1.",
    )
    prototypes: int = Field(4, ge=1, le=64, description="K, prototypes per class.")
    prototypes_from: PathString | None = Field(
        None,
        description="Run folder or checkpoint of method supervised, whose features make the first "
        "prototypes, Algorithm 2, relative to the working directory; null: the warm-up's features do.",
    )
    temperature: Positive = Field(0.1, description="T of the prototype predictor, eq. (2).")
    prototype_ema: Fraction = Field(0.99, description="alpha of the prototypes' running average, eq. (11).")
    lambda_prototype: NonNegative = Field(
        1.0, description="Weight of the prototype predictor's losses beside the linear one's."
    )
    warmup: int = Field(
        1000,
        ge=0,
        description="Supervised iterations of the linear predictor at the start; without prototypes_from "
        "at least 1, for K-means over their features makes the prototypes.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> PCRConfig:
        if self.warmup == 0 and self.prototypes_from is None:
            raise ValueError("warmup: must be at least 1 without prototypes_from, whose place it takes")
        return self


class CPSConfig(UnlabeledConfig):
    """Cross pseudo supervision of two networks [Chen et al., CVPR 2021]."""

    name: Literal["cps"]
    mix: Literal["none", "cutmix"] = "cutmix"
    lambda_cps: NonNegative = Field(1.5, description="Weight of the cross supervision.")


class PPSConfig(UnlabeledConfig):
    """Prototypical contrast and cross supervision of two networks [Chen and Lian, ACM MM 2022]."""

    name: Literal["pps"]
    mix: Literal["none", "cutmix"] = "cutmix"
    prototypes: int = Field(5, ge=1, le=64, description="n, prototypes, or queries, per class.")
    layers: int = Field(6, ge=1, le=12, description="Layers of the transformer decoder: MaskFormer's 6.")
    heads: Count = Field(8, description="Attention heads of the transformer decoder: MaskFormer's 8.")
    shared: Literal["decoder", "queries"] = Field(
        "decoder",
        description="What both networks have in common: transformer decoder and queries, or the queries "
        "alone. The caption of figure 2 can be read either way.",
    )
    assignment: Literal["softmax", "odds"] = Field(
        "softmax",
        description="f of eq. (9), of the sum S of a class's scores: odds is the text's softmax(e^S), with "
        "e^S's tangent beyond S = 3; softmax(S) reads the softmax as what normalises the odds e^S.",
    )
    projection_dim: Count = Field(64, description="Dimension of F_p, which eq. (7) contrasts; ours.")
    anchors: int = Field(256, ge=2, description="n of eq. (7), pixels drawn of each prototype; ours.")
    negatives: Count = Field(512, description="r of eq. (7), negatives of each prototype; ours.")
    tau: Positive = Field(0.1, description="Temperature of eq. (7); ours.")
    normalize: bool = Field(
        True, description="L2-normalise the pixels of eq. (7); the text has their plain dot products."
    )
    lambda_contrast: NonNegative = Field(0.5, description="lambda_1, weight of L_contra, eq. (7).")
    lambda_cross: NonNegative = Field(1.5, description="lambda_2, weight of L_sp, eq. (6).")
    lambda_activation: NonNegative = Field(0.01, description="lambda_3, weight of L_r, eq. (11).")


MethodConfig = Annotated[
    SupervisedConfig | MeanTeacherConfig | PRCLConfig | PCRConfig | CPSConfig | PPSConfig,
    Field(discriminator="name"),
]
