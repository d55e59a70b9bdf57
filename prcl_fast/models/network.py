"""The segmentation network: backbone f, DeepLabv3+ decoder, and the heads g, h, p on its features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prcl_fast.errors import InputError
from prcl_fast.models.autocast_weights import autocast_weights
from prcl_fast.models.batch_norm import count_together
from prcl_fast.models.deeplab import DeepLabDecoder
from prcl_fast.models.heads import ProbabilityHead, RepresentationHead, SegmentationHead
from prcl_fast.models.mobilenet import MobileNetV2
from prcl_fast.models.query_head import QueryHead
from prcl_fast.models.resnet import ResNet

DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
BACKBONES = (*DEPTHS, "mobilenet_v2")


class NetworkOutput(NamedTuple):
    """A network's maps at the decoder's resolution, h = ceil(H/4) and w = ceil(W/4); None without a head."""

    logits: Tensor  # [B, num_classes, h, w]
    mu: Tensor | None  # [B, D, h, w]
    var: Tensor | None  # [B, D, h, w], float32
    features: Tensor  # [B, decoder.out_channels, h, w], the decoder's, which all heads read
    prototype_scores: Tensor | None = None  # [B, num_classes * n, h, w], of a query head
    projection: Tensor | None = None  # [B, projection_dim, h, w], of a query head


def joined(outputs: Sequence[NetworkOutput]) -> NetworkOutput:
    """The outputs of several passes as one, images in order; for networks with a linear classifier."""
    if len(outputs) == 1:
        return outputs[0]
    assert all(output.prototype_scores is None for output in outputs)
    logits, mu, var, features, _, _ = (
        [tensor for tensor in tensors if tensor is not None] for tensors in zip(*outputs, strict=True)
    )
    return NetworkOutput(
        torch.cat(logits),
        torch.cat(mu) if mu else None,
        torch.cat(var) if var else None,
        torch.cat(features),
    )


def at_resolution(full: Tensor, size: torch.Size) -> Tensor:
    """[B, H, W] -> [B, h, w]: values at the pixels nearest to the aligned-corner positions."""
    rows = torch.linspace(0, full.shape[-2] - 1, size[0], device=full.device).round().long()
    columns = torch.linspace(0, full.shape[-1] - 1, size[1], device=full.device).round().long()
    return full[:, rows[:, None], columns]


class SegmentationNetwork(nn.Module):
    """Backbone, decoder and heads; the heads are `classifier`, `representation` and `probability`.

    Args:
        backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "mobilenet_v2".
        stem: "plain" or, for a ResNet, "deep".
        output_stride: 8 or 16.
        base_width: channels of a ResNet's first stage.
        num_classes: channels of the logits.
        width: channels of the decoder and of the heads' hidden layer.
        representation_dim: D, the dimension of the latent space; None builds no representation head.
        probability: whether to build the probability head, of dimension D.
        initial_variance: of the probability head.
        query_head: builds a query head from (in_channels, hidden_channels, high_channels), in place of the
            linear classifier.

    Raises:
        InputError: an unknown backbone, stem or output stride, a stem or width that the backbone lacks, or a
            probability head without a representation head.
    """

    def __init__(
        self,
        backbone: str,
        stem: str = "plain",
        output_stride: int = 16,
        *,
        base_width: int = 64,
        num_classes: int,
        width: int = 256,
        representation_dim: int | None = None,
        probability: bool = False,
        initial_variance: float = 0.5,
        query_head: Callable[[int, int, int], QueryHead] | None = None,
    ) -> None:
        super().__init__()
        if probability and representation_dim is None:
            raise InputError("probability: a probability head needs a representation_dim")
        self.num_classes = num_classes
        self.backbone = build_backbone(backbone, stem, output_stride, base_width)
        self.decoder = DeepLabDecoder(
            self.backbone.low_channels, self.backbone.out_channels, output_stride, width
        )
        features = self.decoder.out_channels
        self.classifier: SegmentationHead | QueryHead = (
            SegmentationHead(features, width, num_classes)
            if query_head is None
            else query_head(features, width, self.backbone.out_channels)
        )
        self.representation: RepresentationHead | None = None
        self.probability: ProbabilityHead | None = None
        if representation_dim is not None:
            self.representation = RepresentationHead(features, width, representation_dim)
            if probability:
                self.probability = ProbabilityHead(features, representation_dim, initial_variance)
        self._passes = count_together(self)

    def forward(self, x: Tensor, *, representations: bool = True) -> NetworkOutput:
        """Segments images and embeds their pixels.

        Args:
            x: images [B, 3, H, W], at least as large as the output stride; channels_last is fastest. A
                training batch must have more than one pixel at the output stride.
            representations: False skips representation head, probability head and the query head's
            projection.

        Returns:
            The output; None for skipped heads. Under autocast logits and mu have the autocast type; var is
            always float32. Logits are to be upsampled with align_corners=True.
        """
        if torch.compiler.is_compiling():
            output = self._pass(x, representations)
        else:
            with autocast_weights(self._parts(representations), x.device):
                try:
                    output = self._pass(x, representations)
                except BaseException:
                    self._passes.drop()
                    raise
        return output

    def _pass(self, x: Tensor, representations: bool) -> NetworkOutput:
        self._passes.begin()
        low, high = self.backbone(x)
        features = self.decoder(low, high)
        prototype_scores = projection = None
        if isinstance(self.classifier, QueryHead):
            logits, prototype_scores, projection = self.classifier(features, high, project=representations)
        else:
            logits = self.classifier(features)
        mu = var = None
        if representations and self.representation is not None:
            mu = self.representation(features)
            if self.probability is not None:
                var = self.probability(features)
        self._passes.end()
        return NetworkOutput(logits, mu, var, features, prototype_scores, projection)

    def _parts(self, representations: bool) -> list[nn.Module]:
        """The parts used in a forward pass: the stages of the backbone, the decoder and the heads."""
        heads = (self.classifier, *((self.representation, self.probability) if representations else ()))
        return [*self.backbone.children(), self.decoder, *(head for head in heads if head is not None)]

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone."""
        return self.backbone.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the decoder, the segmentation head and the representation head."""
        modules = (self.decoder, self.classifier, self.representation)
        return chain.from_iterable(module.parameters() for module in modules if module is not None)

    def probability_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the probability head, which has its own learning rate; none without the head."""
        return iter(()) if self.probability is None else self.probability.parameters()


def build_backbone(name: str, stem: str, output_stride: int, base_width: int) -> ResNet | MobileNetV2:
    """The backbone for these arguments of `SegmentationNetwork`. Raises InputError."""
    if name in DEPTHS:
        return ResNet(DEPTHS[name], stem, output_stride, base_width=base_width)
    if name != "mobilenet_v2":
        raise InputError(f"backbone: '{name}' is not one of {', '.join(BACKBONES)}")
    if stem != "plain":
        raise InputError(f"stem: '{stem}' is a ResNet's, {name} has one stem")
    if base_width != 64:
        raise InputError(f"base_width: {base_width} is a ResNet's, {name} has one width")
    return MobileNetV2(output_stride)
