"""Natural parameters of the class prototypes, eq. (4) of the IJCV paper."""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.reference.norm import inverse_norm


def prototype_statistics(
    mu: Tensor,
    var: Tensor,
    label: Tensor,
    valid: Tensor,
    num_classes: int,
    with_norms: bool,
    order: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of 1 / s and of mu / s over each class's valid pixels, in float64, one image at a time.

    Pixels that do not count are masked before the sums, so what they hold, even NaN, never enters. The class
    lists `order` and `start` spare kernels a sort; here labels are compared.

    Returns:
        precision [C, D] float32, weighted mean [C, D] float32, count [C] int64; inverse norm [B, h, w] of the
        pixels' means, float32 or float64 where mu is, 0 at those that do not count, [0] unless `with_norms`.
    """
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    dim = mu.shape[1]
    classes = torch.arange(num_classes, device=mu.device)
    precision = torch.zeros(num_classes, dim, dtype=torch.float64, device=mu.device)
    weighted_mean = torch.zeros_like(precision)
    count = torch.zeros(num_classes, dtype=torch.int64, device=mu.device)
    norms = []
    for mu_b, var_b, label_b, valid_b in zip(mu, var, label, valid, strict=True):
        # [C, h*w]: 1 where the pixel counts for the class. The product with it is the sum over the class's
        # pixels, in a fixed order and for either memory format.
        member = (label_b.flatten() == classes[:, None]) & valid_b.flatten()
        counts = member.any(0)
        pixel_precision = torch.where(counts, var_b.flatten(1).double().reciprocal(), 0.0)  # [D, h*w]
        pixel_mean = torch.where(counts, mu_b.flatten(1).double(), 0.0)
        precision += member.double() @ pixel_precision.T
        weighted_mean += member.double() @ (pixel_precision * pixel_mean).T
        count += member.sum(1)
        if with_norms:
            norms.append(torch.where(counts.view_as(label_b), inverse_norm(mu_b, 0, work), 0.0))
    norm = torch.stack(norms) if with_norms else mu.new_empty((0,), dtype=work)
    return precision.float(), weighted_mean.float(), count, norm
