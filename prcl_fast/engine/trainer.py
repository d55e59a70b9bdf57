"""The training loop: Algorithm 1 of the paper, for any method."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prcl_fast.config import Config, config_fingerprint, dump_config
from prcl_fast.data.batches import Batch, training_batches, training_cache
from prcl_fast.data.scan import scan_labels
from prcl_fast.data.source import build_source
from prcl_fast.device import choose_device, prepare_device
from prcl_fast.engine.checkpoint import load_checkpoint, restore, save_checkpoint
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.graph import WARM_UP, CapturedStep
from prcl_fast.engine.logging import RunLog
from prcl_fast.engine.rundir import claim_output, label_scan_cache
from prcl_fast.engine.step import TrainStep
from prcl_fast.errors import InputError, RunError
from prcl_fast.methods import build_method


class InterruptedRunError(RunError):
    """The run was asked to stop; its state is saved and the same command goes on from there."""


class Trainer:
    """One run of a configuration, from its own last checkpoint if there is one.

    Everything random is a function of (seed, step), so the state is: the method, the optimiser, the gradient
    scale, and how far the run has come.

    Raises:
        InputError: whatever is wrong with the configuration's files, before anything is written.
    """

    def __init__(self, config: Config, console: Console) -> None:
        self.config, self.console = config, console
        self.device = choose_device(config.train.device)
        if self.device.type != "cuda":
            for key in ("graph", "sync_check"):
                if getattr(config.train, key):
                    raise InputError(f"train.{key}: needs a CUDA device; this run is on {self.device}")
        prepare_device(self.device, threads=config.train.threads, tf32=config.train.tf32)
        self.source = build_source(config.data)
        if config.data.scan:
            scan_labels(self.source, cache=label_scan_cache())
        torch.manual_seed(config.seed)
        self.method = build_method(config, len(self.source.classes))
        self.method.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train_step = TrainStep(self.method, config, self.device)
        self._run_step: CapturedStep | TrainStep = self.train_step
        if config.train.graph:
            self._run_step = CapturedStep(self.train_step)
        self.iteration = 0
        self.progress: dict[str, Any] = {"seconds": 0.0, "best_miou": -1.0, "best_iteration": 0, "last": {}}
        self.stopping = False
        self.cache = training_cache(
            self.source,
            config,
            unlabeled=self.method.needs_unlabeled,
            say=lambda line: console.print(line, highlight=False),
        )
        self.output = claim_output(config)
        self._resume()
        if config.train.compile:
            for network in self.method.networks().values():
                network.compile()
        self.method.train()
        self._steps_here = 0

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary of the run.

        Raises:
            NonFiniteLossError: a loss was not finite.
            InterruptedRunError: SIGINT or SIGTERM came; the state is saved.
        """
        train, total = self.config.train, self.config.train.iterations
        self._describe()
        started = time.monotonic() - self.progress["seconds"]
        with (
            RunLog(self.output, start=self.iteration, total=total, console=self.console) as log,
            self._stop_on_signal(),
            contextlib.closing(self.batches()) as batches,
        ):
            while self.iteration < total:
                self.step(batches)
                self.progress["seconds"] = time.monotonic() - started
                done = self.iteration == total
                if self._due(train.log_every) or done:
                    self.train_step.check_finite()
                    log.train(self.iteration, self._record())
                log.advance(self.iteration)
                if self._due(train.eval_every) or done:
                    self._evaluate(log)
                    self.progress["seconds"] = time.monotonic() - started
                if self._due(train.save_every) or done or self.stopping:
                    self.train_step.check_finite()
                    log.flush()
                    self._save("last.pt")
                if self.stopping and not done:
                    raise InterruptedRunError(
                        f"stopped at iteration {self.iteration} of {total}; the state is saved in "
                        f"{self.output}, the same command goes on from there"
                    )
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
        micro_batches = [next(batches) for _ in range(self.config.train.accumulate)]
        with self._no_waiting():
            losses = self._run_step(micro_batches)
        self.iteration += 1
        self._steps_here += 1
        return losses

    def _evaluate(self, log: RunLog) -> None:
        config = self.config
        results = evaluate(
            self.method.networks(),
            self.source,
            config.data,
            config.eval,
            self.device,
            amp=config.train.amp,
        )
        main = next(iter(results.values()))
        iou = dict(zip(self.source.classes, (100 * main.iou).tolist(), strict=True))
        last = {"miou": main.miou, "miou_student": results["student"].miou}
        log.evaluation(self.iteration, last | {"iou": iou})
        self.progress["last"] = last
        if main.miou > self.progress["best_miou"]:
            self.train_step.check_finite()
            self.progress |= {"best_miou": main.miou, "best_iteration": self.iteration}
            self._save("best.pt")

    def _record(self) -> dict[str, Any]:
        values: dict[str, Any] = dict(self.train_step.take_means())
        values |= {"seconds": round(self.progress["seconds"], 2), "lr": self.train_step.learning_rate()}
        return values | self.method.diagnostics()

    def _save(self, name: str) -> None:
        state = {
            "config": dump_config(self.config),
            "fingerprint": config_fingerprint(self.config),
            "classes": list(self.source.classes),
            "palette": self.source.palette.tolist(),
            "iteration": self.iteration,
            "method": self.method.state_dict(),
            "progress": self.progress,
            **self.train_step.state_dict(),
        }
        save_checkpoint(self.output / name, state)

    def _resume(self) -> None:
        path = self.output / "last.pt"
        if not path.exists():
            return
        state = load_checkpoint(path)
        restore(self.method, state["method"], path)
        self.iteration, self.progress = state["iteration"], state["progress"]
        self.train_step.load_state_dict(state, self.iteration)
        self.console.print(f"{path}: going on from iteration {self.iteration}", highlight=False)

    def batches(self) -> Generator[Batch, None, None]:
        return training_batches(
            self.source,
            self.config,
            start=self.iteration * self.config.train.accumulate,
            device=self.device,
            unlabeled=self.method.needs_unlabeled,
            cache=self.cache,
        )

    @contextlib.contextmanager
    def _no_waiting(self) -> Iterator[None]:
        """With `train.sync_check`, what makes the host wait for the device is an error."""
        # In the first steps libraries and compilers set themselves up, and the graph is captured.
        if not self.config.train.sync_check or self._steps_here <= WARM_UP:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _due(self, every: int) -> bool:
        return self.iteration % every == 0

    def _describe(self) -> None:
        for name, split in self.source.splits.items():
            if split.names:
                text = f"{name}: {len(split.names)} images, {split.family}, list {split.fingerprint}"
                self.console.print(text, highlight=False)
        parameters = sum(p.numel() for p in self.method.student.parameters())
        train = self.config.train
        precision = "float32" if train.amp == "off" else f"{train.amp} autocast"
        if self.device.type == "cuda":
            precision += ", TF32" if train.tf32 else ", no TF32"
        self.console.print(
            f"{self.config.method.name}: {self.config.model.backbone}, {parameters / 1e6:.1f} M parameters, "
            f"{len(self.source.classes)} classes, on {self.device} in {precision}; output {self.output}",
            highlight=False,
        )

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the step finish and saves; a second one ends at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.console.print("stopping after this step; once more to end at once", highlight=False)

        former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
