"""Terms of a step's contrast: softmax mass of positives and negatives, spread of virtual negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prcl_fast.ops import PrototypeStatistics, mutual_likelihood_score

# Anchors of each class over which the masses are averaged.
ANCHORS = 4


@dataclass(frozen=True)
class ContrastTerms:
    """The inputs of a step's contrast, kept until the next step for the log.

    Attributes:
        mu, var: [B, D, h, w].
        anchors: [C, 4] int64 into B*h*w, -1 for none.
        negatives: [C, 4, N] int64, likewise.
        positive: the anchors' prototypes.
        virtual_mu, virtual_var: [C, V, D]; None: no virtual negatives, a variance of 0.
        virtual_known: [C] bool.
        deviation: centres and deviations beta s_c of eq. (10), [C, D] each; meaningful where known.
        class_probability: [C, C], from which the negatives' classes are drawn.
        tau, reduction, normalize: as in `probabilistic_info_nce`.
    """

    mu: Tensor
    var: Tensor
    anchors: Tensor
    negatives: Tensor
    positive: PrototypeStatistics
    virtual_mu: Tensor | None
    virtual_var: Tensor | None
    virtual_known: Tensor | None
    deviation: tuple[Tensor, Tensor] | None
    class_probability: Tensor
    tau: float
    reduction: str
    normalize: bool

    @torch.no_grad()
    def masses(self) -> dict[str, float]:
        """Mean softmax mass of the "positive", "real" and "virtual" terms of eq. (15); they sum to 1.

        Over up to 4 anchors of each class; nan if no class has an anchor. Reads from the device.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        count = 0
        rows = [x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (self.mu, self.var)]
        for c in range(len(self.anchors)):
            anchor = self.anchors[c][self.anchors[c] >= 0]
            if not len(anchor):
                continue
            negatives = self.negatives[c, : len(anchor)]
            mu, var = (x[anchor].float()[:, None] for x in rows)  # [K, 1, D]
            groups = [self._scores(mu, var, self.positive.mean[c, None], self.positive.variance[c, None])]
            real_mu, real_var = (x[negatives.clamp(min=0)].float() for x in rows)  # [K, N, D]
            groups.append(self._scores(mu, var, real_mu, real_var).masked_fill(negatives < 0, -torch.inf))
            groups.append(self._virtual_scores(c, mu, var))
            softmax = torch.cat(groups, dim=1).softmax(dim=1)
            parts = softmax.split([group.shape[1] for group in groups], dim=1)
            sums += torch.stack([part.sum() for part in parts]).double().cpu()
            count += len(anchor)
        mean = sums / count if count else torch.full_like(sums, torch.nan)
        return dict(zip(("positive", "real", "virtual"), mean.tolist(), strict=True))

    def _scores(self, mu: Tensor, var: Tensor, other_mu: Tensor, other_var: Tensor) -> Tensor:
        """Scores of [K, 1, D] with [K or 1, N, D], divided by tau: [K, N]."""
        other_mu, other_var = (
            x.float().expand(len(mu), *x.shape[-2:]).contiguous() for x in (other_mu, other_var)
        )
        score = mutual_likelihood_score(
            mu, var, other_mu, other_var, reduction=self.reduction, normalize=self.normalize
        )
        return score.squeeze(1) / self.tau

    def _virtual_scores(self, c: int, mu: Tensor, var: Tensor) -> Tensor:
        if self.virtual_mu is None or self.virtual_known is None:
            return mu.new_zeros(len(mu), 0)
        usable = self.virtual_known.clone()
        usable[c] = False
        virtual_mu = self.virtual_mu[usable].flatten(0, 1)
        if self.virtual_var is None:
            virtual_var = torch.zeros_like(virtual_mu)
        else:
            virtual_var = self.virtual_var[usable].flatten(0, 1)
        return self._scores(mu, var, virtual_mu, virtual_var)

    @torch.no_grad()
    def negative_classes(self) -> float:
        """Effective number of classes of an anchor's real negatives: exp of the entropy.

        Mean over the classes with negatives; nan without any. Reads from the device.
        """
        p = self.class_probability.double()
        p = p[p.sum(1) > 0]
        return float(torch.special.entr(p).sum(1).exp().mean())

    @torch.no_grad()
    def virtual_spread(self) -> float:
        """Deviation |beta s_c| of virtual negatives over the prototype's norm |mu_c|, mean over classes.

        nan without virtual negatives. Reads from the device.
        """
        if self.deviation is None or self.virtual_known is None:
            return torch.nan
        centre, deviation = self.deviation
        ratio = deviation.double().norm(dim=1) / centre.double().norm(dim=1)
        return float(ratio[self.virtual_known].mean())
