"""Cross-entropy of bilinearly upsampled logits, eq. (13) and (14) of the IJCV paper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prcl_fast.reference.upsample_bilinear import upsample_bilinear_backward


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    mean: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and, if asked for, its gradient, one image at a time.

    Returns:
        loss, a scalar, and its gradient [B, C, h, w], empty unless `needs_grad`; both in float32, float64 for
        float64 logits: the gradient must survive the loss scaling of float16 training before it is rounded.
    """
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = target.shape[1:]
    kept = target.long() != ignore_index
    pixel_scale = kept.to(work)  # [B, H, W]
    if mean:
        pixel_scale /= kept.sum().clamp(min=1)
    if weight is not None:
        pixel_scale = pixel_scale * weight.to(work).reshape(*weight.shape, *[1] * (3 - weight.dim()))

    loss = torch.zeros((), dtype=work, device=logits.device)
    grad = torch.empty(logits.shape if needs_grad else (0,), dtype=work, device=logits.device)
    for b in range(logits.shape[0]):
        image = logits[b : b + 1].to(work)
        full = F.interpolate(image, size, mode="bilinear", align_corners=True)
        log_probability = F.log_softmax(full, dim=1)
        index = torch.where(kept[b], target[b].long(), 0)[None, None]  # [1, 1, H, W]
        loss -= (log_probability.gather(1, index)[0, 0] * pixel_scale[b]).sum()
        if needs_grad:
            grad_full = log_probability.exp_().scatter_add_(
                1, index, index.new_full((), -1).to(work).expand_as(index)
            )
            grad_full *= pixel_scale[b]
            # PyTorch's own adds atomically on CUDA.
            height, width = image.shape[2:]
            grad[b] = upsample_bilinear_backward(grad_full, height, width, False)[0]
    return loss, grad
