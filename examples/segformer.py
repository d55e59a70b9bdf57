"""The probabilistic contrast on a network that is not the package's: a small SegFormer.

    python examples/segformer.py

trains on generated images in ten seconds on a CPU. It prints the losses of every tenth step, then the pixel
accuracy on new images. The network is written below in plain PyTorch, after SegFormer [Xie et al., NeurIPS
2021], with two stages in place of four. The contrast needs two 1x1 convolutions on its features, for mu and
sigma^2 of every pixel, and one more term of the loss. The pseudo-labels are the network's own; own_loop.py
has a teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.models.network import at_resolution
from prcl_fast.ops import pseudo_label

STEPS, BATCH, CLASSES, DIM = 100, 4, 4, 32
DELTA_W = 0.9  # confidence from which a pseudo-label is valid
LAMBDA_C = 0.1  # weight of the contrast


class Block(nn.Module):
    """Self-attention whose keys and values are `reduction` times coarser, then a Mix-FFN."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.reduce = nn.Conv2d(channels, channels, reduction, stride=reduction)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.widen, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        # The 3x3 convolution takes the place of a positional encoding.
        self.mix = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        size = x.shape[-2:]
        x = rows(x)
        query = self.norm1(x)
        key = rows(self.reduce(pixels(query, size)))
        x = x + self.attention(query, key, key, need_weights=False)[0]
        mixed = self.mix(pixels(self.widen(self.norm2(x)), size))
        return pixels(x + self.narrow(F.gelu(rows(mixed))), size)


class SegFormer(nn.Module):
    """Images [B, 3, H, W] -> logits [B, num_classes, H/4, W/4], mu and variance [B, dim, H/4, W/4]."""

    def __init__(self, num_classes: int, dim: int, channels: tuple[int, int] = (16, 32)) -> None:
        super().__init__()
        first, second = channels
        self.fine = nn.Sequential(nn.Conv2d(3, first, 7, stride=4, padding=3), Block(first, 1, 4))
        self.coarse = nn.Sequential(nn.Conv2d(first, second, 3, stride=2, padding=1), Block(second, 2, 2))
        self.fuse = nn.Sequential(nn.Conv2d(first + second, second, 1), nn.GroupNorm(8, second), nn.ReLU())
        self.classifier = nn.Conv2d(second, num_classes, 1)
        # What PRCL adds.
        self.representation = nn.Conv2d(second, dim, 1)
        self.probability = nn.Conv2d(second, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(image)
        coarse = F.interpolate(self.coarse(fine), fine.shape[-2:], mode="bilinear", align_corners=True)
        features = self.fuse(torch.cat([fine, coarse], dim=1))
        variance = (
            torch.sigmoid(self.probability(features).float()) + 1e-6
        )  # positive, and float32 under autocast
        return self.classifier(features), self.representation(features), variance


def losses(
    network: SegFormer,
    contrast: ProbabilisticContrast,
    image: Tensor,  # [B, 3, H, W], labeled
    label: Tensor,  # [B, H, W] int64, 255 where not labeled
    unlabeled: Tensor,  # [B, 3, H, W]
    step: int,
) -> dict[str, Tensor]:
    """Cross-entropy on the labels, and the contrast of labeled and unlabeled pixels."""
    logits, mu, variance = network(torch.cat([image, unlabeled]))
    labeled_logits, unlabeled_logits = logits.split([len(image), len(unlabeled)])
    full = F.interpolate(labeled_logits, label.shape[-2:], mode="bilinear", align_corners=True)
    cross_entropy = F.cross_entropy(full, label, ignore_index=255)

    pseudo, certainty = pseudo_label(unlabeled_logits.detach(), label.shape[-2:])
    classes = at_resolution(torch.cat([label, pseudo]), mu.shape[-2:])
    certainty = at_resolution(
        torch.cat([torch.ones_like(label, dtype=torch.float32), certainty]), mu.shape[-2:]
    )
    valid = (classes < CLASSES) & (certainty >= DELTA_W)
    index = classes.masked_fill(classes >= CLASSES, 0).long().unsqueeze(1)
    confidence = logits.detach().softmax(dim=1).gather(1, index).squeeze(1)
    contrastive = contrast(
        mu, variance, classes, valid, confidence, torch.tensor([0, step], device=mu.device)
    )
    total = cross_entropy + LAMBDA_C * contrastive
    return {"loss": total, "cross-entropy": cross_entropy, "contrast": contrastive}


def main() -> None:
    torch.manual_seed(0)
    network = SegFormer(CLASSES, DIM)
    contrast = ProbabilisticContrast(CLASSES, DIM, tau=10.0, anchors=64, negatives=128)
    # Soft freezing: sigma^2 learns more slowly than the rest.
    slow = list(network.probability.parameters())
    fast = [p for name, p in network.named_parameters() if not name.startswith("probability")]
    optimizer = torch.optim.AdamW([{"params": fast}, {"params": slow, "lr": 1e-4}], lr=2e-3)
    image, label = generated(16)  # all labels that there are
    for step in range(STEPS):
        chosen = torch.randint(len(label), (BATCH,))
        terms = losses(network, contrast, image[chosen], label[chosen], generated(BATCH)[0], step)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in terms.items()))
    image, label = generated(16)
    right = pseudo_label(network.eval()(image)[0], label.shape[-2:])[0] == label
    print(f"pixel accuracy on new images: {right.float().mean():.3f}")


def generated(count: int) -> tuple[Tensor, Tensor]:
    """Noisy squares of three colours: images [count, 3, 64, 64] and labels [count, 64, 64]."""
    label = torch.zeros(count, 64, 64, dtype=torch.int64)
    for one in label:
        for class_id, (row, column) in enumerate(torch.randint(0, 40, (CLASSES - 1, 2)).tolist(), start=1):
            one[row : row + 24, column : column + 24] = class_id
    image = torch.eye(CLASSES)[label, 1:].permute(0, 3, 1, 2)
    return image + 0.7 * torch.randn_like(image), label


def rows(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w, C]."""
    return x.flatten(2).transpose(1, 2)


def pixels(x: Tensor, size: torch.Size) -> Tensor:
    """[B, h w, C] -> [B, C, h, w]."""
    return x.transpose(1, 2).unflatten(2, size)


if __name__ == "__main__":
    main()
