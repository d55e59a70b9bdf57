"""The training loop: Algorithm 1 of the paper, for any method."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prcl_fast.config import Config, dump_config
from prcl_fast.data.batches import Batch, images_of_step, training_batches, training_cache
from prcl_fast.data.source import build_source
from prcl_fast.data.tools.scan import scan_labels
from prcl_fast.device import choose_device, prepare_device
from prcl_fast.engine.describe import describe_run
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.graph import CapturedStep, on_stream, warm_up_steps
from prcl_fast.engine.guard import NonFiniteLossError, named
from prcl_fast.engine.initial_prototypes import initialize_prototypes, trained_network
from prcl_fast.engine.step import TrainStep
from prcl_fast.engine.uncertainty import HeadMovement, Uncertainty, explain_unlearned
from prcl_fast.errors import InputError, RunError
from prcl_fast.methods import build_method
from prcl_fast.models.sync_batch_norm import synchronize_batch_norm
from prcl_fast.processes.collectives import backend, first_says, rank, world_size
from prcl_fast.processes.replicas import check_alike
from prcl_fast.processes.signals import StopRequest
from prcl_fast.processes.watchdog import Watchdog
from prcl_fast.runs.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    restore,
    save_checkpoint,
    save_last,
)
from prcl_fast.runs.checkpoint_file import check_optimizer
from prcl_fast.runs.folder import claim_output, label_scan_cache
from prcl_fast.runs.log import RunLog

_SKIPPED_IN_A_ROW = 10  # so many steps left out one after the other end the run
_OF_VARIANCE = ("variance_auroc", "variance_auroc_student", "confidence_auroc", "variance_moved")


class InterruptedRunError(RunError):
    """The run was asked to stop; its state is saved and the same command goes on from there."""


class Trainer:
    """One run of a configuration, from its own last checkpoint if there is one.

    Everything random is a function of (seed, step), so the state is: the method, the optimiser, the gradient
    scale, and how far the run has come. In a process group, every process makes a Trainer; process 0 writes.

    Args:
        device: where this process computes; by default what `train.device` says.
        watchdog: what ends the run if it stalls; by default nothing does.

    Raises:
        InputError: whatever is wrong with the configuration's files, before anything is written.
    """

    def __init__(
        self,
        config: Config,
        console: Console,
        *,
        device: torch.device | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config, self.console = config, console
        self.device = choose_device(config.train.device) if device is None else device
        _check_graph(config, self.device)
        prepare_device(self.device, threads=config.train.threads, tf32=config.train.tf32)
        self.source = build_source(config.data)
        if config.data.scan and rank() == 0:
            scan_labels(self.source, cache=label_scan_cache())
        prototypes_from = trained_network(config, self.source.classes, self.device)
        torch.manual_seed(config.seed)
        self.method = build_method(config, len(self.source.classes))
        self.method.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Seed and file of weights give a run that goes on the same start again, before it is restored.
        head = self.method.student.probability
        self._head = None if head is None else HeadMovement(head)
        if world_size() > 1 and config.train.sync_bn:
            synchronize_batch_norm(self.method)
        self.method.lay_out()
        stream = torch.cuda.Stream() if config.train.graph else None
        with on_stream(stream):
            self.train_step = TrainStep(self.method, config, self.device)
        self._run_step: CapturedStep | TrainStep = self.train_step
        if stream is not None:
            self._run_step = CapturedStep(self.train_step, stream)
        self._warm_up = warm_up_steps()
        self.iteration = 0
        self.progress: dict[str, Any] = {
            "seconds": 0.0,
            "best_miou": -1.0,
            "best_iteration": 0,
            "last": {},
            "evaluated": 0,  # iteration of the last evaluation
        }
        self.stop = StopRequest()
        self.watchdog = watchdog or Watchdog(0, 1, None, stall_s=None, say=self._say)
        self.watchdog.details = lambda: named(self._images(self.iteration))
        self.cache = training_cache(self.source, config, unlabeled=self.method.needs_unlabeled, say=self._say)
        self.output = config.output
        if rank() == 0:
            claim_output(config)
        self._resume()
        if prototypes_from is not None and self.iteration == 0:
            self.watchdog.at("making prototypes")
            initialize_prototypes(
                self.method, prototypes_from, self.source, config, self.device,
                say=self._say, alive=self.watchdog.alive,
            )  # fmt: skip
        if config.train.compile:
            for network in self.method.networks().values():
                network.compile()
        self.method.train()
        self._steps_here = 0

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary of the run.

        Raises:
            NonFiniteLossError: a loss or gradient was not finite.
            InterruptedRunError: SIGINT or SIGTERM came; the state is saved.
            DriftError: processes came to hold different weights.
        """
        train, total = self.config.train, self.config.train.iterations
        for line in describe_run(self.config, self.source, self.method, self.device):
            self._say(line)
        started = time.monotonic() - self.progress["seconds"]
        with (
            self._log() as log,
            self.stop.on_signals(self._say),
            contextlib.closing(self.batches()) as batches,
        ):
            if self._evaluation_is_missing():
                self._evaluate(log)
            while self.iteration < total:
                self.step(batches)
                self.progress["seconds"] = time.monotonic() - started
                done = self.iteration == total
                stopping = self.stop.agreed() and not done
                logs, saves = self._due(train.log_every) or done, self._due(train.save_every) or done
                if logs or saves or stopping or self.device.type == "cpu":
                    self._check_finite()
                if log is not None:
                    if logs:
                        log.train(self.iteration, self._record())
                    log.advance(self.iteration)
                if (self._due(train.eval_every) and not stopping) or done:
                    self._evaluate(log)
                    self.progress["seconds"] = time.monotonic() - started
                if saves or stopping:
                    self._save("last.pt", log)
                if stopping:
                    raise InterruptedRunError(
                        f"stopped at iteration {self.iteration} of {total}; the state is saved in "
                        f"{self.output}, the same command goes on from there"
                    )
        self._forget_graph()  # the process group is left next
        return self.summary()

    def run_eagerly(self) -> None:
        """Without the captured graph from here on: its parts cannot be told apart."""
        self._run_step = self.train_step

    def summary(self) -> dict[str, Any]:
        """The figures of the last evaluation, and of the run as a whole."""
        last, progress = self.progress["last"], self.progress
        return {
            "miou": last["miou"],
            "miou_student": last["miou_student"],
            **{key: last[key] for key in _OF_VARIANCE if key in last},
            "best_miou": progress["best_miou"],
            "best_iteration": progress["best_iteration"],
            "iterations": self.iteration,
            "seconds": round(progress["seconds"], 1),
            "output": str(self.output),
        }

    def step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimiser step over the next `accumulate` micro-batches; the named losses, averaged over them.

        On CUDA the losses are written anew by the next step where `train.graph` is set.
        """
        self.watchdog.at(f"waiting for data at iteration {self.iteration}")
        micro_batches = [next(batches) for _ in range(self.config.train.accumulate)]
        if self.method.begin_step(self.iteration):
            self._steps_here = 0
            self._forget_graph()
        # The first steps may compile and capture for as long as that takes.
        patient = self._steps_here <= self._warm_up and (self.config.train.compile or self.config.train.graph)
        self.watchdog.at(f"in the step of iteration {self.iteration}", patient=patient)
        with self._no_waiting():
            losses = self._run_step(micro_batches)
        self.iteration += 1
        self._steps_here += 1
        return losses

    def _forget_graph(self) -> None:
        if isinstance(self._run_step, CapturedStep):
            self._run_step.forget()

    def _evaluation_is_missing(self) -> bool:
        """Whether the run was stopped where an evaluation was due: who stops it may not wait for one."""
        due = self.iteration > 0 and self._due(self.config.train.eval_every)
        return due and self.progress["evaluated"] != self.iteration

    def _evaluate(self, log: RunLog | None) -> None:
        config = self.config
        self.watchdog.at("evaluating")
        with contextlib.nullcontext() if self._head is None else self._head.watching():
            results = evaluate(
                self.method.networks(),
                self.source,
                config.data,
                config.eval,
                self.device,
                amp=config.train.amp,
                progress=lambda done, total: self.watchdog.alive(f"evaluating, image {done} of {total}"),
            )
        main = next(iter(results.values()))
        iou = dict(zip(self.source.classes, (100 * main.iou).tolist(), strict=True))
        last = {"miou": main.miou, "miou_student": results["student"].miou}
        if "teacher_prototypes" in results:
            last["miou_teacher_prototypes"] = results["teacher_prototypes"].miou
        last |= self._uncertainty(main.uncertainty, results["student"].uncertainty)
        if log is not None:
            log.evaluation(self.iteration, last | {"iou": iou})
        self.progress |= {"last": last, "evaluated": self.iteration}
        if main.miou > self.progress["best_miou"]:
            self._check_finite()
            self.progress |= {"best_miou": main.miou, "best_iteration": self.iteration}
            self._save("best.pt", log)

    def _uncertainty(self, main: Uncertainty | None, student: Uncertainty | None) -> dict[str, Any]:
        """What an evaluation logs about sigma^2; nothing without a probability head."""
        if self._head is None or main is None or student is None:
            return {}
        moved = self._head.moved()
        values: dict[str, Any] = main.summary() | {"variance_moved": moved}
        if not math.isnan(student.variance.auroc):
            values["variance_auroc_student"] = student.variance.auroc
        # In the first half of a run there is time left to move.
        note = explain_unlearned(moved, self.config.probability_lr)
        late = 2 * self.iteration >= self.config.train.iterations
        return values | ({"note": note} if late and note is not None else {})

    def _record(self) -> dict[str, Any]:
        values = self.train_step.take_record()
        return values | {"seconds": round(self.progress["seconds"], 2)} | self.method.diagnostics()

    def _check_finite(self) -> None:
        """Ends the run after a step that was not finite, or says that it was left out."""
        failure = self.train_step.failure()
        if failure is None:
            return
        found = failure.describe(self.config.seed, self._images(failure.iteration))
        if self.config.train.on_nonfinite == "stop":
            raise NonFiniteLossError(
                f"{found}; the last checkpoint is from before it, and the same command replays it from "
                "there. A smaller optim.lr, a larger method.tau or train.amp=bf16 instead of fp16 often "
                "helps; train.on_nonfinite=skip leaves such steps out."
            )
        if failure.in_a_row >= _SKIPPED_IN_A_ROW:
            raise NonFiniteLossError(
                f"{found}, as were {failure.in_a_row} steps in a row: the run is stopped"
            )
        self._say(f"{found}: left out, {failure.steps} such steps since the start of this command")

    def _images(self, iteration: int) -> list[str]:
        return images_of_step(self.source, self.config, iteration, unlabeled=self.method.needs_unlabeled)

    def _save(self, name: str, log: RunLog | None) -> None:
        self.watchdog.at(f"saving {name} of iteration {self.iteration}")
        method = self.method.state_dict()
        check_alike(method)
        if log is None:
            return
        log.flush()
        state = {
            "config": dump_config(self.config),
            "classes": list(self.source.classes),
            "palette": self.source.palette.tolist(),
            "iteration": self.iteration,
            "method": method,
            "progress": self.progress,
            **self.train_step.state_dict(),
        }
        if name == "last.pt":
            save_last(self.output, state, self.config.train.keep)
        else:
            save_checkpoint(self.output / name, state)

    def _resume(self) -> None:
        """Goes on from the newest checkpoint that process 0 finds whole, in all processes."""
        found = newest_checkpoint(self.output, self._say) if rank() == 0 else None
        name = first_says("" if found is None else found[0].name)
        if not name:
            return
        path = self.output / name
        if found is None:
            try:
                found = path, load_checkpoint(path)
            except InputError as error:
                raise InputError(
                    f"output: process {rank()} cannot read what process 0 reads: {error}"
                ) from None
        state = found[1]
        restore(self.method, state["method"], path)
        self.iteration, self.progress = state["iteration"], state["progress"]
        optimizer = self.train_step.optimizer
        shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
        check_optimizer(state["optimizer"], optimizer.state_dict(), shapes, path)
        self.train_step.load_state_dict(state, self.iteration)
        self._say(f"{path}: going on from iteration {self.iteration}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _log(self) -> contextlib.AbstractContextManager[RunLog | None]:
        if rank() > 0:
            return contextlib.nullcontext()
        total = self.config.train.iterations
        return RunLog(self.output, start=self.iteration, total=total, console=self.console)

    def batches(self) -> Generator[Batch, None, None]:
        return training_batches(
            self.source,
            self.config,
            start=self.iteration * self.config.train.accumulate,
            rank=rank(),
            world=world_size(),
            device=self.device,
            unlabeled=self.method.needs_unlabeled,
            cache=self.cache,
        )

    @contextlib.contextmanager
    def _no_waiting(self) -> Iterator[None]:
        """With `train.sync_check`, what makes the host wait for the device is an error."""
        # In the first steps libraries and compilers set themselves up, and the graph is captured.
        if not self.config.train.sync_check or self._steps_here <= self._warm_up:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _due(self, every: int) -> bool:
        return self.iteration % every == 0


def _check_graph(config: Config, device: torch.device) -> None:
    for key in ("graph", "sync_check"):
        if getattr(config.train, key) and device.type != "cuda":
            raise InputError(f"train.{key}: needs a CUDA device; this run is on {device}")
        if getattr(config.train, key) and world_size() > 1 and getattr(config.method, "warmup", 0) > 0:
            # DistributedDataParallel asks the device which parameters a warm-up leaves out.
            raise InputError(
                f"train.{key}: the step of {world_size()} processes waits for the device where there is a "
                f"warm-up; set method.warmup=0 or train.{key}=false"
            )
    if config.train.graph and world_size() > 1 and backend("cuda") != "nccl":
        raise InputError(
            f"train.graph: a graph can hold the collectives of NCCL alone; these {world_size()} processes "
            f"use {backend('cuda')}, set it to false"
        )
    if config.train.graph and world_size() > 1 and config.train.stall_timeout is None:
        raise InputError(
            f"train.stall_timeout: must be set where train.graph captures the step of {world_size()} "
            "processes: nothing else ends one that waits for a lost one"
        )
