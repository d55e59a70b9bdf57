"""The published training step, written from its description: float32, image by image, class by class.

The order is that of the authors' public code. The teacher labels the weakly augmented images. Images,
pseudo-labels and confidences pass through Pillow for a random scale and crop, are mixed, and pass through
Pillow again for colour, blur and flip. The student processes labeled and unlabeled images in two passes. The
contrast is a loop over the classes with a sampler on the host. The confusion matrices of each step are
omitted, which favours the baseline. Its teacher is in evaluation mode, as in all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from bench.ops.baselines import loop_contrast
from bench.step.published_pil import classmix, geometric, photometric, to_picture, to_tensor
from bench.step.setup import Alternative, contrast_settings
from prcl_fast.config import Config
from prcl_fast.data.source import IGNORE, Source
from prcl_fast.models.network import NetworkOutput
from prcl_fast.step_parts import part


class PublishedTraining(Alternative):
    """Satisfies `bench.step.setup.Training`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        train = config.train
        self.labeled = self._loader(_Images(self.source, "labeled", config), train.batch_labeled)
        self.unlabeled = self._loader(_Images(self.source, "unlabeled", config), train.batch_unlabeled)

    def step(self) -> dict[str, float]:
        """One optimiser step; the named losses as Python numbers."""
        config, method = self.config, self.method
        self.set_learning_rates()
        with part("data wait"):
            image, label = self._on_device(next(self.labeled))
            weak, outside = self._on_device(next(self.unlabeled))

        with torch.no_grad(), part("teacher"):
            logits = self.teacher(weak, representations=False).logits
            confidence, pseudo_label = _upsampled(logits, weak).softmax(1).max(1)
            pseudo_label[outside == IGNORE] = IGNORE
            confidence[outside == IGNORE] = 0.0
            pseudo = weak, pseudo_label, confidence
        with torch.no_grad(), part("strong augmentation"):
            pseudo = self._through_pil(*pseudo, scale=config.data.augment.scale, strong=False)
            pseudo = classmix(*pseudo)
            strong, pseudo_label, confidence = self._through_pil(*pseudo, scale=(1.0, 1.0), strong=True)

        with part("student"):
            labeled = self.student(image)
            unlabeled = self.student(strong)
        with part("losses"):
            supervised = F.cross_entropy(_upsampled(labeled.logits, image), label, ignore_index=IGNORE)
            kept = pseudo_label != IGNORE
            omega = (confidence[kept] > method.delta_u).float().mean()
            unsupervised = omega * F.cross_entropy(
                _upsampled(unlabeled.logits, strong), pseudo_label, ignore_index=IGNORE
            )
        with part("contrast"):
            contrast = self._contrast(labeled, unlabeled, label, pseudo_label, confidence)
        loss = supervised + unsupervised + self.contrast_weight() * contrast

        with part("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with part("optimizer"):
            self.optimizer.step()
        with part("ema"):
            self._update_teacher()
        self.iteration += 1
        return {
            "loss": loss.item(),
            "loss_supervised": supervised.item(),
            "loss_unsupervised": unsupervised.item(),
            "loss_contrast": contrast.item(),
        }

    def close(self) -> None:
        """Deletes the loaders, which ends their workers."""
        del self.labeled, self.unlabeled

    def _through_pil(
        self, image: Tensor, label: Tensor, confidence: Tensor, *, scale: Sequence[float], strong: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Augments image by image with Pillow on the host, and returns the batch on the device."""
        data = self.config.data
        images, labels, confidences = [], [], []
        for pixels, classes, certain in zip(image.cpu(), label.cpu(), confidence.cpu(), strict=True):
            picture, (label_map, confidence_map) = geometric(
                to_picture(pixels, data.mean, data.std),
                [
                    (Image.fromarray(classes.to(torch.uint8).numpy()), IGNORE),
                    (Image.fromarray(certain.numpy()), 0.0),
                ],
                scale=scale,
                crop=data.crop,
                flip=data.augment.flip if strong else 0.0,
                fill=data.mean,
            )
            if strong:
                picture = photometric(picture, data.augment)
            images.append(to_tensor(picture, data.mean, data.std))
            labels.append(torch.from_numpy(np.array(label_map)).long())
            confidences.append(torch.from_numpy(np.array(confidence_map)))
        image, label, confidence = self._on_device([torch.stack(x) for x in (images, labels, confidences)])
        return image, label, confidence

    def _contrast(
        self,
        labeled: NetworkOutput,
        unlabeled: NetworkOutput,
        label: Tensor,
        pseudo_label: Tensor,
        confidence: Tensor,
    ) -> Tensor:
        """Over labeled and unlabeled pixels at the resolution of the representation."""
        method = self.method
        assert labeled.mu is not None
        assert labeled.var is not None
        assert unlabeled.mu is not None
        assert unlabeled.var is not None
        mu, var = torch.cat([labeled.mu, unlabeled.mu]), torch.cat([labeled.var, unlabeled.var])
        with torch.no_grad():
            size = mu.shape[2:]
            small_label = F.interpolate(torch.cat([label, pseudo_label])[:, None].float(), size)[:, 0].long()
            certain = torch.cat([torch.ones_like(label, dtype=torch.float32), confidence])
            certain = F.interpolate(certain[:, None], size)[:, 0]
            valid = (small_label != IGNORE) & (certain >= method.delta_w)
            probability = torch.cat([labeled.logits, unlabeled.logits]).softmax(1)
            index = small_label.masked_fill(small_label == IGNORE, 0)
            own = probability.gather(1, index[:, None])[:, 0]
        return loop_contrast(
            mu,
            var,
            small_label,
            valid,
            own,
            self.num_classes,
            method.anchors,
            method.negatives,
            method.virtual_negatives,
            contrast_settings(method),
        )

    @torch.no_grad()
    def _update_teacher(self) -> None:
        decay = self.teacher_decay()
        for average, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            average.mul_(decay).add_(value, alpha=1 - decay)
        for buffer, current in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            if buffer.is_floating_point():
                buffer.mul_(decay).add_(current, alpha=1 - decay)
            else:
                buffer.copy_(current)

    def _loader(self, images: _Images, batch: int) -> Iterator[list[Tensor]]:
        return iter(
            DataLoader(
                images,
                batch,
                sampler=_Endless(len(images)),
                num_workers=self.config.data.workers,
                pin_memory=self.device.type == "cuda",
            )
        )

    def _on_device(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Decoded, weakly augmented and normalised images of a subset with their labels.

    The label of an unlabeled image is 0, and 255 outside of it.
    """

    def __init__(self, source: Source, subset: str, config: Config) -> None:
        self.source, self.subset, self.data = source, subset, config.data
        self.names = source.splits[subset].names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        data, name = self.data, self.names[index]
        picture = Image.fromarray(self.source.image(name))
        if self.subset == "labeled":
            label = Image.fromarray(self.source.label(name))
        else:
            label = Image.new("L", picture.size, 0)
        augment = data.augment
        picture, (label,) = geometric(
            picture,
            [(label, IGNORE)],
            scale=augment.scale,
            crop=data.crop,
            flip=augment.flip,
            fill=data.mean,
        )
        return to_tensor(picture, data.mean, data.std), torch.from_numpy(np.array(label)).long()


class _Endless(Sampler[int]):
    """An endless sequence of random permutations of all images."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


def _upsampled(logits: Tensor, image: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W]."""
    return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=True)
