"""PRCL in a training loop of your own: the package's network, ops and losses, without its trainer.

    python examples/own_loop.py

trains on generated images in ten seconds on a CPU. It prints the losses of every tenth step, then the pixel
accuracy of the teacher. `losses` is one iteration of Algorithm 1 of the IJCV paper, with its equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prcl_fast.losses import ProbabilisticContrast, lambda_c, poly_lr, supervised_loss, unsupervised_loss
from prcl_fast.models.network import SegmentationNetwork, at_resolution
from prcl_fast.models.teacher import EMATeacher
from prcl_fast.ops import pseudo_label

STEPS, BATCH, CLASSES, DIM, IGNORE = 120, 4, 4, 32, 255
DELTA_U, DELTA_W = 0.9, 0.7  # confidence above which a pixel counts for L_u, and from which it is valid
LR, PROBABILITY_LR = 5e-2, 5e-3  # soft freezing: the probability head learns more slowly


def losses(
    student: SegmentationNetwork,
    teacher: EMATeacher,
    contrast: ProbabilisticContrast,
    image: Tensor,  # [B, 3, H, W], labeled
    label: Tensor,  # [B, H, W] uint8
    weak: Tensor,  # [B, 3, H, W], unlabeled
    strong: Tensor,  # [B, 3, H, W], the same with strong augmentation
    iteration: Tensor,  # int64 scalar
    total: int,
) -> dict[str, Tensor]:
    """L_s, L_u and L_c of one batch, and L, which the student minimises."""
    # Eq. (1): pseudo-labels and the teacher's confidence in them.
    pseudo, teacher_confidence = pseudo_label(teacher(weak).logits, weak.shape[-2:])
    # Eq. (2): class scores, mu and sigma^2 of every pixel at a quarter of the image's size.
    output = student(torch.cat([image, strong]))
    logits_labeled, logits_unlabeled = output.logits.split([len(image), len(strong)])
    l_s = supervised_loss(logits_labeled, label)  # eq. (13)
    l_u = unsupervised_loss(logits_unlabeled, pseudo, teacher_confidence, DELTA_U)  # eq. (14)

    # A labeled pixel is valid, an unlabeled one where the teacher is confident.
    classes = at_resolution(torch.cat([label, pseudo]), output.mu.shape[-2:])
    certainty = torch.cat([torch.ones_like(label, dtype=torch.float32), teacher_confidence])
    valid = (classes != IGNORE) & (at_resolution(certainty, output.mu.shape[-2:]) >= DELTA_W)
    # A valid pixel is hard, and may become an anchor, where the student gives its class less than delta_s.
    index = classes.masked_fill(classes == IGNORE, 0).long().unsqueeze(1)
    confidence = output.logits.detach().softmax(dim=1).gather(1, index).squeeze(1)
    seed = torch.stack([torch.zeros_like(iteration), iteration])  # of the anchors, negatives and virtual ones
    l_c = contrast(output.mu, output.var, classes, valid, confidence, seed)  # eq. (4), (9), (10), (15)

    weight = lambda_c(1.0, iteration, total).to(l_c.dtype)  # eq. (12)
    return {"L": l_s + l_u + weight * l_c, "L_s": l_s, "L_u": l_u, "L_c": l_c}  # eq. (11)


def main() -> None:
    torch.manual_seed(0)
    student = SegmentationNetwork(
        "resnet18", base_width=16, num_classes=CLASSES, width=32, representation_dim=DIM, probability=True
    )
    teacher = EMATeacher(student, decay=0.97)
    # A smaller temperature than the default of 100, for fewer dimensions than 256 and a short run.
    contrast = ProbabilisticContrast(CLASSES, DIM, tau=10.0, anchors=64, negatives=128)
    parts = ([*student.backbone_parameters(), *student.head_parameters()], student.probability_parameters())
    optimizer = torch.optim.SGD([{"params": part} for part in parts], LR, momentum=0.9, weight_decay=5e-4)
    image, label = generated(16)  # all labels that there are
    for step in range(STEPS):
        iteration = torch.tensor(step)
        for group, rate in zip(optimizer.param_groups, (LR, PROBABILITY_LR), strict=True):
            group["lr"] = float(poly_lr(rate, iteration, STEPS))
        chosen = torch.randint(len(label), (BATCH,))
        weak, _ = generated(BATCH)
        strong = weak * torch.empty(BATCH, 3, 1, 1).uniform_(0.7, 1.3) + 0.2 * torch.randn_like(weak)
        batch = (image[chosen], label[chosen], weak, strong)
        terms = losses(student, teacher, contrast, *batch, iteration, STEPS)
        optimizer.zero_grad()
        terms["L"].backward()
        optimizer.step()
        teacher.update(iteration)
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in terms.items()))
    image, label = generated(16)
    right = pseudo_label(teacher(image).logits, label.shape[-2:])[0] == label
    print(f"pixel accuracy of the teacher on new images: {right.float().mean():.3f}")


def generated(count: int) -> tuple[Tensor, Tensor]:
    """Noisy squares of three colours: images [count, 3, 64, 64] and labels [count, 64, 64] uint8."""
    label = torch.zeros(count, 64, 64, dtype=torch.uint8)
    for one in label:
        for class_id, (row, column) in enumerate(torch.randint(0, 40, (CLASSES - 1, 2)).tolist(), start=1):
            one[row : row + 24, column : column + 24] = class_id
    image = torch.eye(CLASSES)[label.long(), 1:].permute(0, 3, 1, 2)
    return image + 0.7 * torch.randn_like(image), label


if __name__ == "__main__":
    main()
