"""The probabilistic contrast L_c as one module: prototypes, sampling, virtual negatives, InfoNCE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prcl_fast.config.contrast import ContrastConfig
from prcl_fast.losses.batch_prototypes import BatchPrototypes, start_summing
from prcl_fast.losses.contrast_terms import ANCHORS, ContrastTerms
from prcl_fast.losses.diagnostics import step_diagnostics
from prcl_fast.losses.feature_bank import FeatureBank
from prcl_fast.losses.negative_classes import negative_class_probability
from prcl_fast.losses.virtual_negatives import draw_virtual_negatives, moments_of_means, variance_of_means
from prcl_fast.ops import (
    PrototypeStatistics,
    class_lists,
    probabilistic_info_nce,
    prototype_statistics,
    sample_anchors,
    sample_negatives,
)
from prcl_fast.ops.arguments import (
    FLOATING,
    check_count,
    check_features,
    check_pixel_maps,
    check_tensor,
    check_variance,
)

# Of every distribution in the deterministic case: the sum of two variances is then 1.
_CONSTANT_VARIANCE = 0.5


class ProbabilisticContrast(nn.Module):
    """L_c, eq. (15) of the IJCV paper: prototypes, sampling of anchors and negatives, InfoNCE.

    A class takes part in a step if it has valid pixels in the batch. Its prototype is the positive of its
    anchors:

    - "global": the merge of the local prototypes of all steps so far, eq. (9); its precision only grows;
    - "ema": an exponential moving average of the local prototypes' means and variances, eq. (16);
    - "local": the prototype of this batch, eq. (4).

    Virtual negatives are drawn from the global prototype of every class that has one, even if the class is
    not in the batch (section 3.4), and whatever the positive is.

    The prototypes are buffers. With several processes they are those of all pixels: an all-reduce of the
    statistics, [C, 2D + 4] numbers, gives all processes bitwise the same prototypes. Each process draws
    anchors and negatives from its own pixels. The mean of the returned values over the processes is the loss:
    a class's anchors on a process are weighted by the process's fraction of the class's hard pixels.

    With representation "deterministic" every variance, the prototypes' included, is the constant 0.5. The
    score is then the sum with L2-normalised means, regardless of `reduction` and `normalize`: the cosine
    similarity minus one, up to the constant of eq. (3). The loss is the usual deterministic pixel contrast.

    Args:
        num_classes: C.
        dim: D.
        settings: all settings; None: the defaults of `ContrastConfig`.
        options: fields of `ContrastConfig` that differ from `settings`, as in `ProbabilisticContrast(21, 256,
            tau=50.0)`.
    Raises:
        TypeError, ValueError: an argument is unknown or out of its range; the message names it.
    """

    # Buffers: natural parameters of the "global", moments of the "ema" prototypes; registered only if used.
    precision: Tensor
    weighted_mean: Tensor
    mean: Tensor
    variance: Tensor
    count: Tensor
    spread: Tensor  # [C, D], running variance of a class's mu

    def __init__(
        self, num_classes: int, dim: int, settings: ContrastConfig | None = None, **options: Any
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, least=2)
        check_count("dim", dim)
        if settings is not None and not isinstance(settings, ContrastConfig):
            raise TypeError(f"settings must be a ContrastConfig; got {type(settings).__name__}")
        self.num_classes, self.dim = num_classes, dim
        self.settings = settings = (settings or ContrastConfig()).changed(options)
        self.deterministic = settings.representation == "deterministic"
        self.reduction = "sum" if self.deterministic else settings.reduction
        self.normalize = settings.normalize or self.deterministic
        self.tau = settings.temperature
        self.bank: FeatureBank | None = None
        if settings.memory_bank:
            self.bank = FeatureBank(num_classes, dim, dim, size=settings.memory_bank)
        self.keeps_global = settings.prototype == "global" or settings.virtual_negatives > 0
        if self.keeps_global:
            # Sums over a whole training: float32 would stop growing.
            self.register_buffer("precision", torch.zeros(num_classes, dim, dtype=torch.float64))
            self.register_buffer("weighted_mean", torch.zeros(num_classes, dim, dtype=torch.float64))
        if settings.prototype == "ema":
            self.register_buffer("mean", torch.zeros(num_classes, dim))
            self.register_buffer("variance", torch.ones(num_classes, dim))
        if self.keeps_global or settings.prototype == "ema":
            self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.measures_spread = settings.virtual_spread == "class" and settings.virtual_negatives > 0
        if self.measures_spread:
            self.register_buffer("spread", torch.zeros(num_classes, dim))
        self.diagnostics: dict[str, Tensor] = {}
        self.terms: ContrastTerms | None = None

    def extra_repr(self) -> str:
        values = self.settings.model_dump(include=set(ContrastConfig.model_fields))
        return f"num_classes={self.num_classes}, dim={self.dim}, " + ", ".join(
            f"{name}={value}" for name, value in values.items()
        )

    def forward(
        self,
        mu: Tensor,  # [B, D, h, w]
        var: Tensor | None,  # [B, D, h, w]
        label: Tensor,  # [B, h, w]
        valid: Tensor,  # [B, h, w]
        confidence: Tensor,  # [B, h, w]
        seed: Tensor,  # [2]
    ) -> Tensor:
        """The loss of one batch; updates the prototypes' state, `diagnostics` and `terms`.

        Args:
            mu: [B, D, h, w] means, any floating dtype and memory format.
            var: [B, D, h, w] variances > 0, dtype of mu, or float32 if mu is bfloat16 or float16. With
                representation "deterministic" it is ignored and may be None.
            label: [B, h, w] integer, labels and pseudo-labels; values outside 0 .. C-1 are no class.
            valid: [B, h, w] bool, labeled, or with confidence of at least delta_w.
            confidence: [B, h, w] floating; a valid pixel below delta_s is hard.
            seed: int64 [2] = (seed, step), on mu's device.
        Returns:
            scalar, float32; a 0 that stays in the graph if no anchor has any negative, real or virtual.
        Raises:
            TypeError, ValueError: an argument does not fit; the message names it. That variances are positive
                is checked on the CPU only, because the host would have to wait for a GPU.
        """
        settings = self.settings
        var = self._checked(mu, var, seed, label=label, valid=valid, confidence=confidence)
        with torch.autocast(mu.device.type, enabled=False):
            hard = valid & (confidence < settings.delta_s)
            with torch.no_grad():
                lists = class_lists(label, valid, hard, self.num_classes)
                inverse_norm = None
                if self.normalize:
                    local, inverse_norm = prototype_statistics(
                        mu, var, label, valid, self.num_classes, lists=lists, with_norms=True
                    )
                else:
                    local = prototype_statistics(mu, var, label, valid, self.num_classes, lists=lists)
                moments = None
                if self.measures_spread:
                    moments = moments_of_means(mu, label, valid, self.num_classes, seed, lists)
                total = start_summing(local, lists.hard_start.diff().long(), moments)
                before = self._kept_mean()
                # Local to this process: overlaps with the all-reduce.
                anchors = sample_anchors(
                    label, valid, hard, self.num_classes, settings.anchors, seed, lists=lists
                )
                batch = total()
                positive = self._updated(batch)
                by_local = settings.negative_classes == "local"
                class_probability = negative_class_probability(
                    self._as_scored(batch.statistics) if by_local else positive,
                    self.tau,
                    reduction=self.reduction,
                    normalize=self.normalize,
                    uniform=settings.negative_classes == "uniform",
                )
                negatives = sample_negatives(
                    class_probability,
                    label,
                    valid,
                    self.num_classes,
                    settings.anchors // settings.anchors_per_set,
                    settings.negatives,
                    seed,
                    lists=lists,
                )
                virtual_mu = virtual_var = known = deviation = None
                if settings.virtual_negatives:
                    virtual_mu, known, deviation = self._virtual_negatives(seed)
                elif self.bank is not None:
                    self.bank.add((mu, var), label, valid, seed, lists=lists)
                    virtual_mu, virtual_var, known = self.bank.draw(settings.bank_negatives, seed)
            loss = probabilistic_info_nce(
                mu,
                var,
                anchors,
                negatives,
                positive,
                virtual_mu,
                virtual_var=virtual_var,
                virtual_known=known,
                tau=self.tau,
                reduction=self.reduction,
                normalize=self.normalize,
                class_factor=batch.class_factor,
                inverse_norm=inverse_norm,
            )
        self.diagnostics = step_diagnostics(
            settings, loss, batch, negatives, known, before, self._kept_mean()
        )
        group = torch.arange(min(ANCHORS, settings.anchors), device=mu.device) // settings.anchors_per_set
        self.terms = ContrastTerms(
            mu=mu.detach(),
            var=var.detach(),
            anchors=anchors[:, :ANCHORS].clone(),
            negatives=negatives[:, group],
            positive=positive,
            virtual_mu=virtual_mu,
            virtual_var=virtual_var,
            virtual_known=known,
            deviation=deviation,
            class_probability=class_probability,
            tau=self.tau,
            reduction=self.reduction,
            normalize=self.normalize,
        )
        return loss

    def _checked(self, mu: Tensor, var: Tensor | None, seed: Tensor, **maps: Tensor) -> Tensor:
        """Checks the arguments of `forward`; returns the variances."""
        check_tensor("mu", mu, ("B", self.dim, "h", "w"), FLOATING)
        if self.deterministic:
            var = torch.full_like(mu, _CONSTANT_VARIANCE, requires_grad=False)
        elif var is None:
            raise TypeError("var must be a tensor; only representation deterministic takes None")
        check_features(mu, var)
        if not self.deterministic:
            check_variance("var", var)
        check_pixel_maps("mu", mu, seed, **maps)
        return var

    def _kept_mean(self) -> Tensor | None:
        """[C, D]: means of the stored positives, nan for a class without one; None with prototype "local"."""
        if self.settings.prototype == "local":
            return None
        mean = self.mean if self.settings.prototype == "ema" else self.weighted_mean / self.precision
        return torch.where(self.count[:, None] > 0, mean, torch.nan)

    def _updated(self, batch: BatchPrototypes) -> PrototypeStatistics:
        """Merges the batch into the stored prototypes; returns the positives, with counts of the batch."""
        local, kind = batch.statistics, self.settings.prototype
        # A class whose statistics are not finite spoils the loss of this step, but not the stored prototypes.
        finite = torch.isfinite(local.precision) & torch.isfinite(local.weighted_mean)
        known = finite.all(1) & (local.count > 0)
        if self.keeps_global:
            self.precision += torch.where(known[:, None], local.precision, 0.0)
            self.weighted_mean += torch.where(known[:, None], local.weighted_mean, 0.0)
        if kind == "ema":
            new_variance = torch.where(known[:, None], local.variance, 1.0)
            self._move(self.mean, local.mean, known)
            self._move(self.variance, new_variance, known)
        if self.measures_spread:
            assert batch.moments is not None
            self._move(self.spread, variance_of_means(batch.moments), known)
        if self.keeps_global or kind == "ema":
            self.count += torch.where(known, local.count, 0)
        if kind == "local":
            return self._as_scored(local)
        if kind == "ema":
            precision, mean = self.variance.reciprocal(), self.mean
        else:
            state = self._global()
            precision, mean = state.precision, state.mean
        return self._as_scored(PrototypeStatistics(precision, precision * mean, local.count))

    def _move(self, state: Tensor, new: Tensor, known: Tensor) -> None:
        """One step of the moving average of eq. (16); the first value of a class starts it."""
        seen = self.count[:, None] > 0
        moved = torch.where(seen, torch.lerp(new, state, self.settings.prototype_ema), new)
        state.copy_(torch.where(known[:, None], moved, state))

    def _global(self) -> PrototypeStatistics:
        """The global prototypes, eq. (9); their counts are the pixels of all steps."""
        mean = PrototypeStatistics(self.precision, self.weighted_mean, self.count).mean.float()
        precision = self.precision.float()
        return PrototypeStatistics(precision, precision * mean, self.count)

    def _as_scored(self, prototypes: PrototypeStatistics) -> PrototypeStatistics:
        mean = prototypes.mean
        precision = prototypes.precision
        if self.deterministic:
            precision = torch.full_like(mean, 1.0 / _CONSTANT_VARIANCE)
        return PrototypeStatistics(precision, precision * mean, prototypes.count)

    def _virtual_negatives(self, seed: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Eq. (10): virtual negatives [C, V, D], mask of classes with any [C], centre, deviation [C, D]."""
        settings, prototypes = self.settings, self._global()
        known = self.count > 0
        spread = self.spread.sqrt() if self.measures_spread else prototypes.variance
        virtual_mu = draw_virtual_negatives(
            prototypes, settings.virtual_negatives, settings.beta, seed, spread
        )
        return virtual_mu, known, (prototypes.mean, settings.beta * spread)
