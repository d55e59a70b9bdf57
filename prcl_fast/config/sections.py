"""The sections `model`, `optim`, `train` and `eval` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from prcl_fast.config.types import Count, Few, Fraction, NonNegative, PathString, Positive, Section, Size


def _off_is_a_word(value: Any) -> Any:
    """The word for a bare `off`, which YAML reads as false."""
    return "off" if value is False else value


class ModelConfig(Section):
    """The network: backbone, DeepLabv3+ decoder, heads."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"] = Field(
        "resnet101", description="Backbone, with dilation in place of the last strides."
    )
    stem: Literal["plain", "deep"] = Field(
        "plain",
        description="First layers of a ResNet: one 7x7 convolution (plain) or three 3x3 convolutions (deep).",
    )
    output_stride: Literal[8, 16] = Field(
        16,
        description="Pixels of the image per pixel of the backbone's last map, along each side; 8 takes "
        "more time and memory.",
    )
    base_width: int = Field(
        64,
        ge=8,
        le=256,
        description="Channels of a ResNet's first stage: 64 in the published networks. Smaller values make "
        "a faster network, for which no pretrained weights exist.",
    )
    width: int = Field(
        256, ge=16, le=4096, description="Channels of the decoder and of the hidden layers of the heads."
    )
    dim: int = Field(
        256, ge=2, le=4096, description="Dimension D of the pixel representation (methods prcl and pps)."
    )
    weights: PathString | None = Field(
        None,
        description="Initial weights: a file with torchvision's key names for the backbone; or a run folder "
        "(best.pt, else last.pt), a checkpoint or a network file of this program, whose heads are used if "
        "they fit; null: random weights.",
    )

    @model_validator(mode="after")
    def _shaped(self) -> ModelConfig:
        if self.backbone == "mobilenet_v2":
            for key, only in (("stem", "plain"), ("base_width", 64)):
                if getattr(self, key) != only:
                    raise ValueError(
                        f"{key}: {getattr(self, key)} is for a ResNet; leave it out for mobilenet_v2"
                    )
        return self


class OptimConfig(Section):
    """SGD with the polynomial schedule lr * (1 - iteration / iterations)^power."""

    lr: Positive = Field(6.4e-3, description="Initial learning rate of decoder and heads.")
    backbone_lr: Positive | None = Field(None, description="Initial learning rate of the backbone; null: lr.")
    probability_lr: NonNegative | None = Field(
        None,
        description="Initial learning rate of the probability head (soft freezing). null: 5e-5 as in the "
        "IJCV paper for 40000 iterations or more, 5e-5 * 40000 / iterations for fewer, at most lr.",
    )
    momentum: Fraction = Field(0.9, description="Momentum of SGD.")
    weight_decay: NonNegative = Field(5.0e-4, description="Weight decay (L2 penalty) of SGD.")
    power: NonNegative = Field(0.9, description="Exponent of the polynomial learning-rate schedule.")


class TrainConfig(Section):
    """The training loop: length, batches, precision, device, logging."""

    iterations: Count = Field(40000, description="Optimiser steps of the run.")
    batch_labeled: Few = Field(8, description="Labeled images per step, summed over all processes.")
    batch_unlabeled: Few = Field(8, description="Unlabeled images per step, summed over all processes.")
    accumulate: Count = Field(
        1, description="Micro-batches per step: forward and backward passes whose gradients are accumulated."
    )
    amp: Annotated[Literal["off", "bf16", "fp16"], BeforeValidator(_off_is_a_word)] = Field(
        "off", description="Automatic mixed precision: bfloat16, float16 with loss scaling, or off (float32)."
    )
    tf32: bool = Field(
        True, description="CUDA: TF32 (10-bit mantissa) for float32 matrix products and convolutions."
    )
    compile: bool = Field(False, description="Compile the networks with torch.compile.")
    graph: bool = Field(False, description="CUDA: capture the whole training step as one CUDA graph.")
    sync_check: bool = Field(
        False,
        description="CUDA: raise an error if a training step synchronises the host with the device (a "
        "debugging aid).",
    )
    device: str = Field("auto", description="Device: auto (a GPU if there is one), cpu, cuda or cuda:N.")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of PyTorch; null: PyTorch's default."
    )
    sync_bn: bool = Field(
        True,
        description="Batch-norm statistics over the images of all processes; false: of each process alone.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="Reaction to a loss or gradient that is not finite: stop the run, or skip the step.",
    )
    stall_timeout: Positive | None = Field(
        600.0, description="Seconds without progress after which the watchdog ends the run; null: never."
    )
    log_every: Count = Field(20, description="Steps between two log records.")
    eval_every: Count = Field(1000, description="Steps between two evaluations.")
    save_every: Count = Field(1000, description="Steps between two checkpoints.")
    keep: Count = Field(2, description="Number of checkpoints kept for resuming: last.pt, last-1.pt, ...")


class EvalConfig(Section):
    """Evaluation, during training and by `prcl eval`."""

    mode: Literal["whole", "center", "sliding"] = Field(
        "whole",
        description="Evaluated area: the whole image at once, its centre crop, or overlapping windows over "
        "the whole image.",
    )
    crop: Size | None = Field(
        None, description="Height and width of the centre crop in pixels (mode center); null: data.crop."
    )
    window: Size | None = Field(
        None, description="Height and width of a window in pixels (mode sliding); null: data.crop."
    )
    stride: Fraction = Field(
        2 / 3, gt=0, description="Distance of neighbouring windows as a fraction of their size, above 0 to 1."
    )
    average: Literal["logits", "softmax"] = Field(
        "softmax",
        description="Values averaged over windows, scales and flips: logits or softmax probabilities.",
    )
    scales: list[Annotated[float, Field(gt=0, le=16)]] = Field(
        [1.0],
        min_length=1,
        max_length=64,
        description="Scales of the image over which predictions are averaged.",
    )
    flip: bool = Field(False, description="Also average with the prediction of the mirrored image.")
    batch: Few = Field(4, description="Images (or windows) per forward pass.")
