"""The sections `method` of a configuration, one for each method; the names follow the papers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prcl_fast.config_types import Count, Fraction, NonNegative, Positive, Section


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

    delta_u: Fraction = Field(0.97, description="Confidence above which a pixel counts for omega, eq. (14).")
    omega: Literal["batch", "image", "pixel"] = Field(
        "batch",
        description="Weight of L_u: share of confident pixels in the batch, or in each image; or pixel: 1 "
        "for a confident one, 0 for others.",
    )
    ema: Fraction = Field(0.99, description="Largest decay of the teacher's exponential moving average.")
    forward: Literal["concatenated", "separate"] = Field(
        "concatenated", description="Labeled and unlabeled images in one student pass, or in two."
    )


class MeanTeacherConfig(ConsistencyConfig):
    """Consistency with an EMA teacher; `mix` makes it ClassMix, CutMix or CutOut."""

    name: Literal["mean_teacher"]


class PRCLConfig(ConsistencyConfig):
    """Probabilistic representation contrastive learning, both papers' switches."""

    name: Literal["prcl"]
    representation: Literal["probabilistic", "deterministic"] = "probabilistic"
    initial_variance: Annotated[float, Field(gt=1e-6, lt=1)] = Field(
        0.5,
        description="sigma^2 that the probability head starts around. 0.5, a bias of 0, is large beside "
        "normalised means, whose components have squares of 1 / model.dim.",
    )
    prototype: Literal["local", "ema", "global"] = Field(
        "global", description="Eq. (4), EMA, or GDP, eq. (9)."
    )
    prototype_ema: Fraction = Field(0.99, description="Decay of prototype: ema.")
    virtual_negatives: int = Field(4, ge=0, description="Virtual negatives per class, eq. (10).")
    beta: NonNegative = Field(1.0, description="Radius of the virtual negatives, eq. (10).")
    memory_bank: int = Field(
        0,
        ge=0,
        description="Means of earlier batches kept per class, in place of virtual negatives; 0: none.",
    )
    bank_negatives: Count = Field(4, description="Negatives per class drawn from the memory bank.")
    delta_w: Fraction = Field(0.7, description="Confidence from which a pixel is valid.")
    delta_s: Fraction = Field(0.8, description="Confidence below which a valid pixel is hard.")
    confidence: Literal["student", "teacher"] = Field(
        "student", description="Whose probability of the pixel's class picks hard pixels."
    )
    tau: Positive = Field(0.5, description="Temperature of the contrast, eq. (15).")
    reduction: Literal["sum", "mean"] = Field("sum", description="The score over the dimensions, eq. (3).")
    normalize: bool = Field(True, description="L2-normalise mu inside the score, as the authors' code does.")
    anchors: Count = Field(256, description="Anchors per class.")
    negatives: Count = Field(512, description="Negatives per anchor.")
    share: Count = Field(
        1, description="Anchors of a class that share one set of negatives: 16 or 32 is faster, and unbiased."
    )
    lambda_c: NonNegative = Field(1.0, description="Initial weight of the contrast, eq. (12).")
    alpha: float = Field(-5.0, le=0, description="Decay of that weight, eq. (12); 0 holds it constant.")

    @model_validator(mode="after")
    def _consistent(self) -> PRCLConfig:
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


class PCRConfig(ConsistencyConfig):
    """Consistency of a linear and a prototype-based predictor [Xu et al., NeurIPS 2022]."""

    name: Literal["pcr"]
    mix: Literal["none", "cutout", "cutmix", "classmix"] = "cutmix"
    delta_u: Fraction = Field(0.8, description="Confidence above which a pseudo-label counts.")
    omega: Literal["batch", "image", "pixel"] = Field(
        "pixel", description="Weight of the losses on unlabeled pixels, as in mean_teacher."
    )
    prototypes: int = Field(4, ge=1, le=64, description="K, prototypes per class.")
    temperature: Positive = Field(0.1, description="T of the prototype predictor, eq. (2).")
    prototype_ema: Fraction = Field(0.99, description="alpha of the prototypes' running average, eq. (11).")
    lambda_prototype: NonNegative = Field(1.0, description="Weight of the prototype predictor's losses.")
    warmup: Count = Field(
        1000, description="Supervised iterations, after which K-means makes the prototypes, Algorithm 2."
    )


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
        description="f of eq. (9), of the sum S of a class's scores: odds is the text's softmax(e^S), which "
        "learns at small learning rates alone; softmax(S) reads the softmax as what normalises the odds e^S.",
    )
    projection_dim: Count = Field(64, description="Dimension of F_p, which eq. (7) contrasts; ours.")
    anchors: Count = Field(256, description="n of eq. (7), pixels drawn of each prototype; ours.")
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
