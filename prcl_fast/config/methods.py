"""The section `method` of a configuration: one class for each method, with the papers' names."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from prcl_fast.config.contrast import ContrastConfig
from prcl_fast.config.types import Drawn, Few, Fraction, NonNegative, PathString, Positive, Section


class MethodSection(Section):
    """Base of the sections `method`: properties that other packages query.

    The defaults are those of a method that learns from labeled images alone.
    """

    needs_unlabeled: ClassVar[bool] = False

    @property
    def mixing(self) -> str:
        """Kind of mixing of the unlabeled images."""
        return "none"

    @property
    def mixes_pairs(self) -> bool:
        """Whether mixing pastes from a second unlabeled image of the same pass."""
        return self.mixing in ("cutmix", "classmix")

    @property
    def warmup_iterations(self) -> int:
        """Supervised iterations at the start, before unlabeled images take part."""
        return 0

    def smallest_pass(self, labeled: int, unlabeled: int) -> int:
        """Images in the smallest training pass over so many labeled and unlabeled ones."""
        return labeled

    def check_dim(self, dim: int) -> None:
        """Raises ValueError where the method cannot have `model.dim` channels."""


class SupervisedConfig(MethodSection):
    """Supervised training on the labeled images alone: L_s, eq. (13)."""

    name: Literal["supervised"]


class UnlabeledConfig(MethodSection):
    """Settings common to all methods that learn from unlabeled images."""

    mix: Literal["none", "cutout", "cutmix", "classmix"] = Field(
        "classmix",
        description="Mixing of the unlabeled images. cutmix: a box of another image is pasted in; classmix: "
        "the pixels of half of another image's classes are pasted in; cutout: a box is erased; none: no "
        "mixing.",
    )
    warmup: int = Field(
        0, ge=0, description="Supervised iterations at the start, before the unlabeled images are used."
    )
    needs_unlabeled: ClassVar[bool] = True

    @property
    def mixing(self) -> str:
        """`mix`."""
        return self.mix

    @property
    def warmup_iterations(self) -> int:
        """`warmup`."""
        return self.warmup

    def smallest_pass(self, labeled: int, unlabeled: int) -> int:
        """One pass has all images, except in the warm-up."""
        return labeled if self.warmup else labeled + unlabeled


class ConsistencyConfig(UnlabeledConfig):
    """Settings common to all methods with an EMA teacher and pseudo-labels."""

    delta_u: Fraction = Field(
        0.97,
        description="Confidence, from 0 to 1, above which a pseudo-label counts as confident (see omega).",
    )
    omega: Literal["batch", "image", "pixel"] = Field(
        "batch",
        description="Weight of the unlabeled loss L_u. batch: the fraction of confident pixels in the "
        "batch, for every pixel (IJCV paper, eq. 14); pixel: 1 for confident pixels and 0 for all others "
        "(AAAI paper, eq. 11); image: the fraction of confident pixels in each image (the PRCL authors' "
        "public code).",
    )
    ema: Fraction = Field(
        0.99, description="Decay of the teacher's exponential moving average; it is lower in the first steps."
    )
    forward: Literal["concatenated", "separate"] = Field(
        "concatenated",
        description="concatenated: one student pass over labeled and unlabeled images, with common "
        "batch-norm statistics; separate: one pass for each.",
    )

    def smallest_pass(self, labeled: int, unlabeled: int) -> int:
        """That of the labeled or the unlabeled images with `forward: separate`."""
        separate = self.forward == "separate"
        return min(labeled, unlabeled) if separate else super().smallest_pass(labeled, unlabeled)


class MeanTeacherConfig(ConsistencyConfig):
    """Consistency with an EMA teacher: Mean Teacher for mix none, else ClassMix, CutMix or CutOut."""

    name: Literal["mean_teacher"]


class PRCLConfig(ConsistencyConfig, ContrastConfig):
    """Probabilistic representation contrastive learning, with the options of both papers."""

    name: Literal["prcl"]
    initial_variance: Annotated[float, Field(gt=1e-6, lt=1)] = Field(
        0.5,
        description="Variance sigma^2 that the probability head predicts at the start of training, between "
        "1e-6 and 1. The squared components of L2-normalised means are much smaller, about 1 / model.dim.",
    )
    delta_w: Fraction = Field(
        0.7,
        description="Confidence of the teacher, 0 to 1: unlabeled pixels with confidence >= this value are "
        "valid for the contrast.",
    )
    confidence: Literal["student", "teacher"] = Field(
        "student",
        description="Network whose confidence decides which unlabeled pixels are hard (below delta_s).",
    )
    lambda_c: NonNegative = Field(1.0, description="Weight of the contrastive loss at the start, eq. (12).")
    alpha: float = Field(
        -5.0,
        le=0,
        description="Decay of the contrast's weight, lambda_c * exp(alpha * (iteration / iterations)^2), "
        "eq. (12); 0 keeps it constant.",
    )


class PCRConfig(ConsistencyConfig):
    """Consistency of a linear and a prototype-based predictor (Xu et al., NeurIPS 2022)."""

    name: Literal["pcr"]
    mix: Literal["none", "cutout", "cutmix", "classmix"] = Field(
        "cutmix", description="Mixing of the unlabeled images, as in mean_teacher."
    )
    delta_u: Fraction = Field(0.8, description="Confidence, from 0 to 1, above which a pseudo-label counts.")
    omega: Literal["batch", "image", "pixel"] = Field(
        "pixel", description="Weight of the losses on unlabeled images, as in mean_teacher."
    )
    predictor: Literal["both", "prototype"] = Field(
        "both",
        description="both: linear and prototype-based predictor; prototype: the prototype-based one alone, "
        "which then also makes the pseudo-labels (table 4). For the linear one alone, use mean_teacher.",
    )
    features: Literal["decoder", "aspp"] = Field(
        "decoder",
        description="Features of the prototypes. decoder: the classifier's input (eq. 3 and Algorithm 2); "
        "aspp: the output of the ASPP (section 4.1).",
    )
    prototypes: int = Field(4, ge=1, le=64, description="Prototypes per class, K.")
    prototypes_from: PathString | None = Field(
        None,
        description="Run folder or checkpoint of a supervised run whose features give the first prototypes "
        "(Algorithm 2), relative to the working directory; null: the features at the end of the warm-up.",
    )
    temperature: Positive = Field(0.1, description="Temperature T of the prototype-based predictor, eq. (2).")
    prototype_ema: Fraction = Field(
        0.99, description="Decay alpha of the prototypes' moving average, eq. (11)."
    )
    lambda_prototype: NonNegative = Field(
        1.0, description="Weight of the prototype-based predictor's losses; the linear one's have weight 1."
    )
    warmup: int = Field(
        1000,
        ge=0,
        description="Supervised iterations of the linear predictor at the start. Without prototypes_from at "
        "least 1: K-means over the features at their end gives the first prototypes.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> PCRConfig:
        if self.warmup == 0 and self.prototypes_from is None:
            raise ValueError("warmup: must be at least 1 without prototypes_from, whose place it takes")
        return self


class CrossSupervisionConfig(UnlabeledConfig):
    """Base of the methods in which two networks learn from each other's pseudo-labels."""

    mix: Literal["none", "cutmix"] = Field(
        "cutmix", description="Mixing of the unlabeled images: a box of another image is pasted in, or none."
    )


class CPSConfig(CrossSupervisionConfig):
    """Cross pseudo supervision of two networks (Chen et al., CVPR 2021)."""

    name: Literal["cps"]
    lambda_cps: NonNegative = Field(1.5, description="Weight lambda of the cross supervision.")


class PPSConfig(CrossSupervisionConfig):
    """Prototypical contrast and cross supervision of two networks (Chen and Lian, ACM MM 2022)."""

    name: Literal["pps"]
    prototypes: int = Field(5, ge=1, le=64, description="Prototypes (queries) per class, n.")
    layers: int = Field(6, ge=1, le=12, description="Layers of the transformer decoder; 6 as in MaskFormer.")
    heads: Few = Field(
        8,
        description="Attention heads of the transformer decoder; 8 as in MaskFormer. They must divide "
        "model.dim.",
    )
    shared: Literal["decoder", "queries"] = Field(
        "decoder",
        description="Parameters common to both networks: the whole transformer decoder, or its queries "
        "alone. Figure 2 of the paper allows either reading.",
    )
    assignment: Literal["softmax", "odds"] = Field(
        "softmax",
        description="Function f of eq. (9) that turns a class's summed scores S into probabilities. "
        "softmax: softmax(S); odds: softmax(e^S) as the paper prints it, with the tangent of e^S beyond S = "
        "3.",
    )
    projection_dim: Few = Field(
        64, description="Dimension of the projected features F_p of eq. (7); not given in the paper."
    )
    anchors: int = Field(
        256,
        ge=2,
        le=65536,
        description="Pixels drawn for each prototype, n of eq. (7); not given in the paper.",
    )
    negatives: Drawn = Field(
        512, description="Negatives of each prototype, r of eq. (7); not given in the paper."
    )
    tau: Positive = Field(0.1, description="Temperature of eq. (7); not given in the paper.")
    normalize: bool = Field(
        True, description="L2-normalise the features of eq. (7); the paper has plain dot products."
    )
    lambda_contrast: NonNegative = Field(
        0.5, description="Weight lambda_1 of the contrast L_contra, eq. (7)."
    )
    lambda_cross: NonNegative = Field(
        1.5, description="Weight lambda_2 of the cross supervision L_sp, eq. (6)."
    )
    lambda_activation: NonNegative = Field(
        0.01, description="Weight lambda_3 of the prototype activation loss L_r, eq. (11)."
    )

    def check_dim(self, dim: int) -> None:
        """Heads share the channels evenly; a position's sines and cosines need four each."""
        if dim % self.heads:
            raise ValueError(f"method.heads: must divide model.dim {dim}, got {self.heads}")
        if dim % 4:
            raise ValueError(f"model.dim: must be a multiple of 4 for method pps, got {dim}")


MethodConfig = Annotated[
    SupervisedConfig | MeanTeacherConfig | PRCLConfig | PCRConfig | CPSConfig | PPSConfig,
    Field(discriminator="name"),
]
