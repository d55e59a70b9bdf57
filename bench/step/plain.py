"""The training step in plain PyTorch as an expert would write it: vectorised, without host synchronisation.

Mixed precision where the configuration asks for it, channels_last, the package's own batches with its batched
augmentation and mixing, one student pass over all images, foreach updates of optimiser and teacher, and the
contrast of `bench.ops.eager` with PyTorch's own random numbers. With `train.compile`, networks and losses are
compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.eager import eager_contrast
from bench.step.setup import Alternative, contrast_settings
from prcl_fast.config import Config
from prcl_fast.data.augment import normalize, strong_augment
from prcl_fast.data.batches import Batch, training_batches
from prcl_fast.data.mix import mix
from prcl_fast.data.source import IGNORE
from prcl_fast.step_parts import part


class PlainTraining(Alternative):
    """Satisfies `bench.step.setup.Training`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for network in (self.student, self.teacher):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.batches = training_batches(self.source, config, start=0, device=self.device)
        self.averages = [*self.teacher.parameters(), *self.teacher.buffers()]
        self.values = [*self.student.parameters(), *self.student.buffers()]
        self.segmentation_losses, self.contrast = segmentation_losses, eager_contrast
        if config.train.compile:
            self.student.compile()
            self.teacher.compile()
            self.segmentation_losses = torch.compile(segmentation_losses)
            self.contrast = torch.compile(eager_contrast)

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the named losses, on the device."""
        self.set_learning_rates()
        losses = self.losses(next(self.batches))
        with part("backward"):
            losses["loss"].backward()
        with part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with part("ema"):
            self._update_teacher()
        self.iteration += 1
        return {name: value.detach() for name, value in losses.items()}

    def losses(self, batch: Batch, seed: Tensor | None = None) -> dict[str, Tensor]:
        """The losses of one batch; `seed` takes the package's draws for the contrast instead of PyTorch's."""
        method = self.method
        unlabeled = batch.needed_unlabeled()
        amp = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.train.amp == "bf16")
        with torch.no_grad(), amp, part("teacher"):
            weak = unlabeled.image
            logits = self.teacher(self._normalized(weak), representations=False).logits
            confidence, pseudo_label = _upsampled(logits, weak.shape[2:]).softmax(1).max(1)
            pseudo_label = pseudo_label.masked_fill(~unlabeled.inside, IGNORE)
            confidence = confidence.masked_fill(~unlabeled.inside, 0.0)
        with torch.no_grad(), amp, part("strong augmentation"):
            strong = strong_augment(weak, unlabeled.strong)
            strong, pseudo_label, confidence = mix(
                strong, pseudo_label, confidence, unlabeled.strong, method.mix
            )
        with amp, part("student"):
            images = torch.cat([self._normalized(batch.labeled_image), self._normalized(strong)])
            output = self.student(images)
        label = batch.label.long()
        with part("losses"):
            supervised, unsupervised = self.segmentation_losses(
                output.logits, label, pseudo_label, confidence, method.delta_u
            )
        with part("contrast"):
            contrast = self._contrast(
                output.logits, output.mu, output.var, label, pseudo_label, confidence, seed
            )
        return {
            "loss": supervised + unsupervised + self.contrast_weight() * contrast,
            "loss_supervised": supervised,
            "loss_unsupervised": unsupervised,
            "loss_contrast": contrast,
        }

    def close(self) -> None:
        """Ends the data workers."""
        self.batches.close()

    def _contrast(
        self,
        logits: Tensor,
        mu: Tensor,
        var: Tensor,
        label: Tensor,
        pseudo_label: Tensor,
        confidence: Tensor,
        seed: Tensor | None,
    ) -> Tensor:
        method = self.method
        with torch.no_grad():
            size = logits.shape[2:]
            small_label = _nearest(torch.cat([label, pseudo_label]), size)
            certain = _nearest(
                torch.cat([torch.ones_like(label, dtype=torch.float32), confidence.float()]), size
            )
            valid = (small_label != IGNORE) & (certain >= method.delta_w)
            index = small_label.masked_fill(small_label == IGNORE, 0)
            own = logits.float().softmax(1).gather(1, index[:, None])[:, 0]
        return self.contrast(
            mu,
            var,
            small_label,
            valid,
            own,
            seed,
            self.num_classes,
            method.anchors,
            method.negatives,
            method.virtual_negatives,
            contrast_settings(method),
        )

    @torch.no_grad()
    def _update_teacher(self) -> None:
        decay = self.teacher_decay()
        floating = [value.is_floating_point() for value in self.values]
        pairs = list(zip(self.averages, self.values, floating, strict=True))
        torch._foreach_lerp_([x for x, _, f in pairs if f], [y for _, y, f in pairs if f], 1 - decay)
        torch._foreach_copy_([x for x, _, f in pairs if not f], [y for _, y, f in pairs if not f])

    def _normalized(self, image: Tensor) -> Tensor:
        return normalize(image, self.config.data.mean, self.config.data.std)


def segmentation_losses(
    logits: Tensor,  # [Bl + Bu, C, h, w]
    label: Tensor,  # [Bl, H, W] int64
    pseudo_label: Tensor,  # [Bu, H, W] int64
    confidence: Tensor,  # [Bu, H, W]
    delta_u: float,
) -> tuple[Tensor, Tensor]:
    """L_s and L_u, eq. (13) and (14) of the IJCV paper, on logits upsampled to the size of the labels."""
    labeled, unlabeled = _upsampled(logits, label.shape[1:]).float().split([len(label), len(pseudo_label)])
    supervised = F.cross_entropy(labeled, label, ignore_index=IGNORE)
    kept = pseudo_label != IGNORE
    omega = (kept & (confidence > delta_u)).sum() / kept.sum().clamp(min=1)
    return supervised, omega * F.cross_entropy(unlabeled, pseudo_label, ignore_index=IGNORE)


def _upsampled(logits: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def _nearest(full: Tensor, size: torch.Size) -> Tensor:
    """[B, H, W] -> [B, h, w], at the pixels that upsampling with aligned corners lays the logits on."""
    rows, columns = (
        torch.linspace(0, before - 1, after, device=full.device).round().long()
        for before, after in zip(full.shape[1:], size, strict=True)
    )
    return full[:, rows[:, None], columns]
