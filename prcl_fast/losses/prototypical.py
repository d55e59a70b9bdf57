"""The losses on prototypes of PPS: contrast between two networks' prototypes, and their even use.

Source: Chen and Lian, "Semi-supervised Semantic Segmentation via Prototypical Contrastive Learning" (ACM MM
2022), equation numbers are that paper's. Neither its text nor code of its authors is public: the forms below
are this project's reading of what the equations are for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prcl_fast.distributed import summed, world_size


def prototypical_contrast(prototypes: Tensor, other: Tensor, tau: float) -> Tensor:
    """Eq. (7): InfoNCE between the prototypes of two networks for the same images.

    The positive of prototype (c, j) is the other network's (c, j); its negatives are all other prototypes of
    that network for the image, those of its own class included. Scores are cosines over tau; the other
    network's prototypes are constants.

    Args:
        prototypes: [B, C, n, D] floating.
        other: the same, of the other network.
        tau: temperature.
    Returns:
        scalar, the mean over images and prototypes.
    """
    own = F.normalize(prototypes.flatten(1, 2).float(), dim=-1)
    constant = F.normalize(other.detach().flatten(1, 2).float(), dim=-1)
    with torch.autocast(own.device.type, enabled=False):
        scores = own @ constant.mT / tau  # [B, C n, C n]
    positive = torch.arange(scores.shape[-1], device=scores.device).expand(len(scores), -1)
    return F.cross_entropy(scores.flatten(0, 1), positive.flatten())


def activation_regularization(scores: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Eq. (10) and (11): a class's prototypes shall share its pixels.

    a_cj, the mean over the class's pixels of the softmax over j of their scores for its prototypes, shall be
    1 / n: the loss is the mean over the classes present of KL(a_c || uniform), 0 where all are used alike and
    log n where one does everything. With several processes a_cj is that of all pixels, and the mean of what
    the processes return is the loss, its gradient included.

    Args:
        scores: [B, C * n, h, w].
        label: [B, h, w] integer; outside 0 .. C-1 means "none".
        num_classes: C.
    Returns:
        scalar, float32; a 0 that stays in the graph where no class is present.
    """
    own = label.long().clamp(0, num_classes - 1)
    inside = (label >= 0) & (label < num_classes)
    rows = scores.float().permute(0, 2, 3, 1).unflatten(-1, (num_classes, -1))  # [B, h, w, C, n]
    per_class = rows.shape[-1]
    index = own[..., None, None].expand(-1, -1, -1, 1, per_class)
    share = rows.gather(3, index).squeeze(3).softmax(dim=-1)  # [B, h, w, n]
    # Not one_hot, which reads values on a CPU.
    is_class = own[..., None] == torch.arange(num_classes, device=own.device)
    member = (is_class & inside[..., None]).to(share.dtype)  # [B, h, w, C]
    with torch.autocast(share.device.type, enabled=False):  # float16 ends at 65504 pixels
        sums = torch.einsum("bhwc,bhwn->cn", member, share)
    total = summed(torch.cat([sums.detach(), member.sum((0, 1, 2))[:, None]], dim=1))
    count = total[:, per_class:]
    # The sum over j of a_cj is constant: the gradient of a log(n a) is that of a times a constant log(n a).
    logarithm = (per_class * total[:, :per_class] / count.clamp(min=1)).clamp(min=1e-12).log()
    divergence = (sums * world_size() / count.clamp(min=1) * logarithm).sum(1)
    return divergence.sum() / (count > 0).sum().clamp(min=1)
