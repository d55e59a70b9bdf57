"""Preparation of a run: what can be wrong is compared and checked, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from prcl_fast.config import Config
from prcl_fast.data.batches import check_batches
from prcl_fast.data.identity import data_identity
from prcl_fast.data.source import Source
from prcl_fast.data.sources import build_source
from prcl_fast.data.tools.label_check import check_labels
from prcl_fast.device import prepare_device
from prcl_fast.engine.graph import check_capture
from prcl_fast.engine.initial_prototypes import trained_network
from prcl_fast.engine.rank_facts import check_same_settings, check_same_weights
from prcl_fast.engine.resume import AllowedChanges, Former, former_state
from prcl_fast.processes.agreement import check_same
from prcl_fast.processes.collectives import rank, world_size
from prcl_fast.runs.checkpoint import LoadedRun
from prcl_fast.runs.folder import check_output, label_scan_cache


@dataclass(frozen=True)
class Prepared:
    """The parts of a run that exist before its networks.

    Attributes:
        source: the data set.
        data: its identity.
        prototypes_from: the run of `method.prototypes_from`, if a new run needs it.
        former: the checkpoint to go on from; None in a new run.
    """

    source: Source
    data: dict[str, str]
    prototypes_from: LoadedRun | None
    former: Former | None


def prepare(
    config: Config, device: torch.device, allowed: AllowedChanges, say: Callable[[str], None]
) -> Prepared:
    """Sets up the device, reads the data set's lists and the checkpoint, and checks all of them.

    First come comparisons that take no time, then those of files, and last the labels, which are all read. A
    run with a checkpoint has its weights and prototypes there: the files of a new run are not read. A damaged
    checkpoint is renamed. A collective: every rank must call it.

    Args:
        allowed: changes with which the run in the output folder may go on.
        say: takes notes for the user.

    Raises:
        InputError: a mistake in the configuration or its files, a difference of the ranks in them, or a run
            in the output folder that cannot go on with them.
        RunError: a damaged checkpoint cannot be renamed.
    """
    check_same_settings(config, {"--extend": allowed.extend, "--accept-data": allowed.data})
    if rank() == 0:
        check_output(config, extend=allowed.extend)
    check_capture(config, device)
    prepare_device(device, threads=config.train.threads, tf32=config.train.tf32)
    source = build_source(config.data)
    check_batches(source, config, world_size())
    data = data_identity(source)
    check_same(data)
    former = former_state(config, data, allowed, say)
    prototypes_from = None
    if former is None:
        prototypes_from = trained_network(config, source.classes, device)
        check_same_weights(config, prototypes_from)
    if config.data.scan and rank() == 0:
        for note in check_labels(source, cache=label_scan_cache()):
            say(f"note: {note}")
    return Prepared(source, data, prototypes_from, former)
