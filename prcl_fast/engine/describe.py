"""What a run says of itself before it begins."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prcl_fast.config import Config
from prcl_fast.config.paper import paper_batch, paper_of
from prcl_fast.data.source import Source
from prcl_fast.methods import Method
from prcl_fast.processes.collectives import world_size


def describe_run(config: Config, source: Source, method: Method, device: torch.device) -> Iterator[str]:
    """Lines about the splits, the network, where and how precisely it computes, and the batch."""
    train = config.train
    for name, split in source.splits.items():
        if split.names:
            yield f"{name}: {len(split.names)} images, {split.family}, list {split.fingerprint}"
    learners = method.learners()
    parameters = sum(p.numel() for p in method.student.parameters())
    networks = f"{len(learners)} networks of " if len(learners) > 1 else ""
    precision = "float32" if train.amp == "off" else f"{train.amp} autocast"
    if device.type == "cuda":
        precision += ", TF32" if train.tf32 else ", no TF32"
    yield (
        f"{config.method.name}: {config.model.backbone}, {networks}{parameters / 1e6:.1f} M parameters, "
        f"{len(source.classes)} classes, on {device} in {precision}; output {config.output}"
    )
    batch = (train.batch_labeled, train.batch_unlabeled)
    if world_size() > 1:
        share = [count // (world_size() * train.accumulate) for count in batch]
        yield (
            f"{world_size()} processes of {share[0]} + {share[1]} images a pass, batch norm over the images "
            f"of {'all of them' if train.sync_bn else 'each'}"
        )
    paper, there = paper_of(config), paper_batch(config)
    if there is not None and batch != there:
        yield (
            f"note: {batch[0]} + {batch[1]} images a step over all processes, {there[0]} + {there[1]} in "
            f"this program's settings of the {paper} paper; the learning rate stays {config.optim.lr:g}, as "
            "configured"
        )
