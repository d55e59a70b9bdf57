"""The probabilistic contrast L_c: prototypes, sampling, virtual negatives and InfoNCE in one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.distributed import start_sum, world_size
from prcl_fast.losses.feature_bank import FeatureBank
from prcl_fast.ops import (
    PrototypeStatistics,
    Purpose,
    class_lists,
    mutual_likelihood_score,
    philox_normal,
    probabilistic_info_nce,
    prototype_statistics,
    sample_anchors,
    sample_negatives,
)

PROTOTYPES = ("global", "ema", "local")
# Variance of every distribution in the deterministic case: two of them add up to one.
_CONSTANT_VARIANCE = 0.5


class ProbabilisticContrast(nn.Module):
    """L_c, eq. (15) of the IJCV paper, with everything that leads to it.

    A class takes part in a step if it has valid pixels in the batch. Its prototype is the positive of its
    anchors:

    - "global": the merge of the local prototypes of all steps so far, eq. (9); grows ever more certain;
    - "ema": an exponential moving average of the local prototypes' means and variances;
    - "local": this batch's, eq. (4).

    The states are buffers. With several processes the prototypes are those of all pixels: the processes add
    up their statistics, [C, 2D + 4] numbers, and hold the same prototypes bit for bit. Each draws anchors and
    negatives from its own pixels. What it returns is such that the mean over the processes is the loss: a
    class's anchors on a process stand for that process's share of the class's hard pixels.

    With `deterministic` every variance, the prototypes' included, is the constant 0.5 and means are
    L2-normalised and summed over (`reduction` and `normalize` are not looked at): the score is then exactly
    the cosine similarity less one, up to the constant of eq. (3), and the loss is the common deterministic
    pixel contrast.

    Args:
        num_classes: C.
        dim: D.
        tau: temperature. Its useful range depends on `reduction` and `normalize`: see `explain_inert`.
        num_anchors: A, per class.
        num_negatives: N, per anchor.
        share: how many anchors of a class share one set of negatives, a divisor of num_anchors. Each anchor's
            loss keeps its law, so the expectation of loss and gradient does not change; only their variance
            grows. 16 or 32 make the loss several times cheaper.
        delta_s: valid pixels with confidence below it are hard, and may become anchors.
        reduction: "mean" or "sum" over the D dimensions of a score.
        normalize: whether means are L2-normalised inside a score.
        prototype: "global", "ema" or "local".
        ema_decay: share of the old state in the moving average.
        virtual_negatives: V, per class; 0 for none.
        beta: spread of the virtual negatives, eq. (10).
        memory_bank: M, representations of this and earlier batches kept per class; 0 for none. Negatives
            drawn from them, of all classes, are what virtual negatives are an alternative to [IJCV, table 7].
        bank_negatives: V of the memory bank, per class.
        deterministic: plain cosine similarities instead of distributions.
    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    # State of the "global" (natural parameters) and the "ema" prototypes; each kind registers its own.
    precision: Tensor
    weighted_mean: Tensor
    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        tau: float,
        num_anchors: int = 256,
        num_negatives: int = 512,
        share: int = 1,
        delta_s: float = 0.8,
        reduction: str = "mean",
        normalize: bool = True,
        prototype: str = "global",
        ema_decay: float = 0.99,
        virtual_negatives: int = 4,
        beta: float = 1.0,
        memory_bank: int = 0,
        bank_negatives: int = 4,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau must be positive; got {tau}")
        if share < 1 or num_anchors % share:
            raise ValueError(f"share must divide the {num_anchors} anchors; got {share}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be sum or mean; got {reduction!r}")
        if prototype not in PROTOTYPES:
            raise ValueError(f"prototype must be one of {', '.join(PROTOTYPES)}; got {prototype!r}")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay must be between 0 and 1; got {ema_decay}")
        if virtual_negatives < 0:
            raise ValueError(f"virtual_negatives must not be negative; got {virtual_negatives}")
        if deterministic and virtual_negatives:
            raise ValueError(
                f"virtual_negatives must be 0 where deterministic is set; got {virtual_negatives}"
            )
        if memory_bank and (virtual_negatives or deterministic):
            raise ValueError("memory_bank must be 0 beside virtual_negatives, and where deterministic is set")
        self.num_classes = num_classes
        self.tau = tau
        self.num_anchors = num_anchors
        self.num_negatives = num_negatives
        self.share = share
        self.delta_s = delta_s
        self.reduction = "sum" if deterministic else reduction
        self.normalize = normalize or deterministic
        self.prototype = prototype
        self.ema_decay = ema_decay
        self.virtual_negatives = virtual_negatives
        self.beta = beta
        self.bank = FeatureBank(num_classes, dim, dim, size=memory_bank) if memory_bank else None
        self.bank_negatives = bank_negatives if memory_bank else 0
        self.deterministic = deterministic
        if prototype == "global":
            # Sums over a whole training: float32 would stop growing.
            self.register_buffer("precision", torch.zeros(num_classes, dim, dtype=torch.float64))
            self.register_buffer("weighted_mean", torch.zeros(num_classes, dim, dtype=torch.float64))
        if prototype == "ema":
            self.register_buffer("mean", torch.zeros(num_classes, dim))
            self.register_buffer("variance", torch.ones(num_classes, dim))
        if prototype != "local":
            self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.diagnostics: dict[str, Tensor] = {}

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, tau={self.tau}, num_anchors={self.num_anchors}, "
            f"num_negatives={self.num_negatives}, share={self.share}, prototype={self.prototype}, "
            f"reduction={self.reduction}, normalize={self.normalize}, "
            f"virtual_negatives={self.virtual_negatives}, bank_negatives={self.bank_negatives}"
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
        """The loss of one batch; updates the prototypes' state and `diagnostics`.

        Args:
            mu: [B, D, h, w] means, any floating dtype and memory format.
            var: [B, D, h, w] variances, dtype of mu, or float32 beside bfloat16 or float16. Where
                `deterministic` is set it is not looked at, and may be None.
            label: [B, h, w] integer, labels and pseudo-labels; outside 0 .. C-1 means "none".
            valid: [B, h, w] bool, labeled, or with confidence of at least delta_w.
            confidence: [B, h, w] floating, what is compared with delta_s.
            seed: int64 [2] = (seed, step), on mu's device.
        Returns:
            scalar, float32; with fewer than two classes present, or no anchor, a 0 that stays in the graph.
        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        if self.deterministic:
            var = torch.full_like(mu, _CONSTANT_VARIANCE, requires_grad=False)
        elif var is None:
            raise TypeError("var must be a tensor; only a deterministic contrast goes without")
        if confidence.shape != label.shape:
            raise ValueError(
                f"confidence must have label's shape {list(label.shape)}; got {list(confidence.shape)}"
            )
        with torch.autocast(mu.device.type, enabled=False):
            hard = valid & (confidence < self.delta_s)
            with torch.no_grad():
                lists = class_lists(label, valid, hard, self.num_classes)
                inverse_norm = None
                if self.normalize:
                    local, inverse_norm = prototype_statistics(
                        mu, var, label, valid, self.num_classes, lists=lists, with_norms=True
                    )
                else:
                    local = prototype_statistics(mu, var, label, valid, self.num_classes, lists=lists)
                total = _start_adding_up(local, lists.hard_start.diff().long())
                before = self._kept_mean()
                # Needs no other process: goes on while the numbers travel.
                anchors = sample_anchors(
                    label, valid, hard, self.num_classes, self.num_anchors, seed, lists=lists
                )
                batch = total()
                positive = self._updated(batch.statistics)
                negatives = sample_negatives(
                    self._negative_classes(positive),
                    label,
                    valid,
                    self.num_classes,
                    self.num_anchors // self.share,
                    self.num_negatives,
                    seed,
                    lists=lists,
                )
                virtual_mu = virtual_var = virtual_known = None
                if self.virtual_negatives:
                    virtual_mu = virtual_negatives(positive, self.virtual_negatives, self.beta, seed)
                if self.bank is not None:
                    self.bank.add((mu, var), label, valid, seed, lists=lists)
                    virtual_mu, virtual_var, virtual_known = self.bank.draw(self.bank_negatives, seed)
            loss = probabilistic_info_nce(
                mu,
                var,
                anchors,
                negatives,
                positive,
                virtual_mu,
                tau=self.tau,
                reduction=self.reduction,
                normalize=self.normalize,
                virtual_var=virtual_var,
                virtual_known=virtual_known,
                class_factor=batch.share,
                inverse_norm=inverse_norm,
            )
        self._record(loss, batch, negatives, before)
        return loss

    def _kept_mean(self) -> Tensor | None:
        """[C, D]: the means of the prototypes kept from step to step, nan where there is none yet."""
        if self.prototype == "local":
            return None
        mean = self.mean if self.prototype == "ema" else self.weighted_mean / self.precision
        return torch.where(self.count[:, None] > 0, mean, torch.nan)

    def _updated(self, batch: PrototypeStatistics) -> PrototypeStatistics:
        """Merges the batch into the state; returns the prototypes to use, with the batch's pixel counts."""
        # One step that is not finite makes its own loss so, but must not spoil the state for good.
        finite = torch.isfinite(batch.precision) & torch.isfinite(batch.weighted_mean)
        known = finite.all(1) & (batch.count > 0)
        if self.prototype == "local":
            precision, mean = batch.precision, batch.mean
        elif self.prototype == "global":
            self.precision += torch.where(known[:, None], batch.precision, 0.0)
            self.weighted_mean += torch.where(known[:, None], batch.weighted_mean, 0.0)
            self.count += torch.where(known, batch.count, 0)
            state = PrototypeStatistics(self.precision, self.weighted_mean, self.count)
            precision, mean = self.precision.float(), state.mean.float()
        else:
            new_mean = batch.mean
            new_variance = torch.where(known[:, None], batch.variance, 1.0)
            seen = self.count[:, None] > 0
            for state_value, new_value in ((self.mean, new_mean), (self.variance, new_variance)):
                moved = torch.where(seen, torch.lerp(new_value, state_value, self.ema_decay), new_value)
                state_value.copy_(torch.where(known[:, None], moved, state_value))
            self.count += torch.where(known, batch.count, 0)
            precision, mean = self.variance.reciprocal(), self.mean
        if self.deterministic:
            precision = torch.full_like(mean, 1.0 / _CONSTANT_VARIANCE)
        return PrototypeStatistics(precision, precision * mean, batch.count)

    def _negative_classes(self, positive: PrototypeStatistics) -> Tensor:
        """[C, C]: softmax of the prototypes' scores over tau, over the other classes present."""
        present = positive.count > 0
        mean = positive.mean
        variance = torch.where(present[:, None], positive.variance, 1.0)
        score = mutual_likelihood_score(
            mean, variance, mean, variance, reduction=self.reduction, normalize=self.normalize
        )
        itself = torch.eye(self.num_classes, dtype=torch.bool, device=score.device)
        allowed = present[:, None] & present[None, :] & ~itself
        probability = torch.softmax((score / self.tau).masked_fill(~allowed, -torch.inf), dim=1)
        return torch.where(allowed, probability, 0.0)

    @torch.no_grad()
    def _record(self, loss: Tensor, batch: _Total, negatives: Tensor, before: Tensor | None) -> None:
        """Fills `diagnostics` with tensors on the device; nothing waits for them.

        valid_per_class, hard_per_class, anchors_per_class [C]: pixels and distinct draws at most, of all
        processes; present_classes; negatives: how many this process's anchors were set against; loss;
        chance_level: the loss of an anchor whose scores are all equal; prototype_shift [C], where prototypes
        are kept: the distance between a class's L2-normalised one before and after the step, nan where it has
        none.
        """
        present = (batch.statistics.count > 0).sum()
        others = (present - 1).clamp(min=0)
        points = self.virtual_negatives + self.bank_negatives
        self.diagnostics = {
            "valid_per_class": batch.statistics.count,
            "hard_per_class": batch.hard,
            "anchors_per_class": batch.hard.clamp(max=self.num_anchors * world_size()),
            "present_classes": present,
            # A class has all of its negatives or none: one look at each is enough.
            "negatives": (negatives[:, 0, 0] >= 0).sum() * (self.num_anchors * self.num_negatives),
            "loss": loss.detach(),
            "chance_level": torch.log1p((self.num_negatives + points * others).float()),
        }
        after = self._kept_mean()
        if before is not None and after is not None:
            shift = F.normalize(after, dim=1) - F.normalize(before, dim=1)
            self.diagnostics["prototype_shift"] = shift.norm(dim=1)


def virtual_negatives(prototypes: PrototypeStatistics, number: int, beta: float, seed: Tensor) -> Tensor:
    """Draws from the prototypes' distributions, IJCV eq. (10): mu_c + beta * eps * s_c, eps ~ N(0, I).

    s_c is the variance, as there. A class without pixels has a variance of 0.

    Args:
        prototypes: of C classes, D dimensions.
        number: V, per class.
        beta: spread.
        seed: int64 [2] = (seed, step), on the prototypes' device.
    Returns:
        [C, V, D], dtype of the prototypes' means.
    """
    mean = prototypes.mean[:, None]
    variance = torch.where(prototypes.count[:, None] > 0, prototypes.variance, 0.0)[:, None]
    noise = philox_normal(seed, (mean.shape[0], number, mean.shape[2]), Purpose.VIRTUAL_NEGATIVES)
    return mean + beta * noise * variance


@dataclass(frozen=True)
class _Total:
    """The batch of all processes."""

    statistics: PrototypeStatistics
    hard: Tensor  # [C] int64, hard pixels
    share: Tensor | None  # [C] float32: this process's hard pixels over the mean of all processes'


# Counts travel as two float32 numbers, so that sums are exact up to 2^36 pixels on 4096 processes.
_HALF = 4096


def _start_adding_up(local: PrototypeStatistics, hard: Tensor) -> Callable[[], _Total]:
    """One all-reduce of [C, 2D + 4] numbers in place of gathering feature maps: the sums are the same."""
    if world_size() == 1:
        return lambda: _Total(local, hard, None)
    dim = local.precision.shape[1]
    counts = torch.stack([local.count, hard], dim=1)
    wait = start_sum(
        torch.cat([local.precision, local.weighted_mean, counts % _HALF, counts // _HALF], dim=1)
    )

    def total() -> _Total:
        precision, weighted_mean, low, high = wait().split([dim, dim, 2, 2], dim=1)
        count, all_hard = (low.long() + _HALF * high.long()).unbind(1)
        share = world_size() * hard / all_hard.clamp(min=1)
        return _Total(PrototypeStatistics(precision, weighted_mean, count), all_hard, share)

    return total
