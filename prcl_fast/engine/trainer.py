"""The training loop, for every method; Algorithm 1 of PRCL is `PRCL.losses` in methods/prcl.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from prcl_fast.config import Config, dump_config
from prcl_fast.console.plain import PlainConsole
from prcl_fast.data.batches import Batch, images_of_step, training_batches, training_cache
from prcl_fast.data.micro_steps import named_images
from prcl_fast.device import choose_device
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.graph import CapturedStep, host_syncs_refused, on_stream, warm_up_steps
from prcl_fast.engine.initial_prototypes import initialize_prototypes
from prcl_fast.engine.initial_weights import load_initial_weights
from prcl_fast.engine.preparation import prepare
from prcl_fast.engine.report import evaluation_record, opening_lines, run_summary
from prcl_fast.engine.resume import NO_CHANGES, AllowedChanges, resume
from prcl_fast.engine.step import TrainStep
from prcl_fast.engine.uncertainty import HeadMovement
from prcl_fast.errors import RunError
from prcl_fast.methods import build_method
from prcl_fast.models.sync_batch_norm import synchronize_batch_norm
from prcl_fast.processes.collectives import rank, world_size
from prcl_fast.processes.replicas import check_alike
from prcl_fast.processes.signals import StopRequest
from prcl_fast.processes.watchdog import Watchdog
from prcl_fast.runs.checkpoint import save_checkpoint, save_last
from prcl_fast.runs.folder import claim_output, store_config
from prcl_fast.runs.log import RunLog
from prcl_fast.runs.provenance import add_record, start_record
from prcl_fast.runs.text_log import TextLog


class InterruptedRunError(RunError):
    """The run was asked to stop; its state is saved, and the same command resumes it."""


class Trainer:
    """One run of a configuration, resumed from its own last checkpoint if there is one.

    All random numbers are a function of (seed, step). The state of a run is therefore the method, the
    optimiser, the gradient scale, the iteration and the progress. In a process group every rank makes a
    Trainer; rank 0 writes the files.

    Args:
        device: of this rank; by default that of `train.device`.
        watchdog: ends the run if it stalls; by default none.
        allowed: changes with which the run in the output folder may go on; by default none.

    Raises:
        InputError: a mistake in the configuration or its files, or a difference of the ranks in them; or the
            run in the output folder cannot go on with them.
    """

    def __init__(
        self,
        config: Config,
        console: PlainConsole | TextLog,
        *,
        device: torch.device | None = None,
        watchdog: Watchdog | None = None,
        allowed: AllowedChanges = NO_CHANGES,
    ) -> None:
        self.config, self.output, self.lines = config, config.output, TextLog.of(console)
        self.device = choose_device(config.train.device) if device is None else device
        prepared = prepare(config, self.device, allowed, self._say)
        self.source, self.data = prepared.source, prepared.data
        torch.manual_seed(config.seed)
        self.method = build_method(config, len(self.source.classes))
        self.method.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Of the random weights, which the seed gives a resumed run again.
        head = self.method.student.probability
        self._head = None if head is None else HeadMovement(head)
        if prepared.former is None:
            load_initial_weights(self.method, config, self.source.classes, self._say)
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
        before = resume(prepared.former, config, self.method, self.train_step, self._say)
        self.iteration, self.progress = before.iteration, before.progress
        self._former_total, self.starts = before.total, before.starts
        self.stop = StopRequest()
        self.watchdog = watchdog or Watchdog()  # inactive unless entered
        self.watchdog.details = lambda: named_images(self._images(self.iteration))
        self.cache = training_cache(self.source, config, say=self._say)
        if prepared.prototypes_from is not None and self.iteration == 0:
            self.watchdog.at("making prototypes")
            initialize_prototypes(
                self.method, prepared.prototypes_from, self.source, config, self.device,
                say=self._say, alive=self.watchdog.alive,
            )  # fmt: skip
        if rank() == 0:  # nothing was written into the output before
            self.lines.open(claim_output(config, extend=allowed.extend))
            store_config(config)
        if config.train.compile:
            for network in self.method.networks().values():
                network.compile()
        self.method.train()
        self._steps_here = 0  # steps since the step's operations last changed

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary of the run.

        Raises:
            NonFiniteLossError: a loss or gradient was not finite.
            InterruptedRunError: SIGINT or SIGTERM came; the state is saved.
            DriftError: the weights of the ranks differ.
        """
        train, total = self.config.train, self.config.train.iterations
        for line in opening_lines(self.config, self.source, self.method, self.device):
            self._say(line)
        if rank() == 0 and self.iteration < total:
            self.starts.append(start_record(self.iteration, total, self.device, world_size(), self.data))
            add_record(self.output, self.starts[-1])
        started = time.monotonic() - self.progress.seconds
        with (
            self._log() as log,
            self.stop.on_signals(self._say),
            contextlib.closing(self.batches()) as batches,
        ):
            if self._evaluation_is_missing():
                self._evaluate(log)
            while self.iteration < total:
                self.step(batches)
                self.progress.seconds = time.monotonic() - started
                done = self.iteration == total
                stopping = self.stop.agreed() and not done
                logs, saves = self._due(train.log_every) or done, self._due(train.save_every) or done
                if logs or saves or stopping or self.device.type == "cpu":
                    self._check_finite()
                if log is not None:
                    log.advance(self.iteration)
                    if logs:
                        log.train(self.iteration, self._record())
                if (self._due(train.eval_every) and not stopping) or done:
                    self._evaluate(log)
                    self.progress.seconds = time.monotonic() - started
                if saves or stopping:
                    self._save("last.pt", log)
                if stopping:
                    raise InterruptedRunError(
                        f"stopped at iteration {self.iteration} of {total}; the state is saved in "
                        f"{self.output}, the same command goes on from there"
                    )
        self._forget_graph()  # before the process group is left
        return self.summary()

    def step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimiser step over the next `accumulate` micro-batches; the named losses, averaged over them.

        With `train.graph`, the next step overwrites the returned tensors.
        """
        train = self.config.train
        self.watchdog.at(f"waiting for data at iteration {self.iteration}")
        micro_batches = [next(batches) for _ in range(train.accumulate)]
        if self.method.begin_step(self.iteration):
            self._steps_here = 0
            self._forget_graph()
        # In the first steps, libraries and compilers set themselves up, and the graph is captured.
        settled = self._steps_here > self._warm_up
        patient = not settled and (train.compile or train.graph)
        self.watchdog.at(f"in the step of iteration {self.iteration}", patient=patient)
        with host_syncs_refused(train.sync_check and settled):
            losses = self._run_step(micro_batches)
        self.iteration += 1
        self._steps_here += 1
        return losses

    def batches(self) -> Generator[Batch, None, None]:
        """This rank's micro-batches from the current iteration on."""
        return training_batches(
            self.source,
            self.config,
            start=self.iteration * self.config.train.accumulate,
            rank=rank(),
            world=world_size(),
            device=self.device,
            cache=self.cache,
        )

    def run_eagerly(self) -> None:
        """Drops the captured graph for good: a profile cannot tell its parts apart."""
        self._run_step = self.train_step

    def summary(self) -> dict[str, Any]:
        """The figures of the last evaluation, and of the run as a whole."""
        return run_summary(self.progress, self.iteration, self.output)

    def _evaluation_is_missing(self) -> bool:
        """Whether the run was interrupted where an evaluation was due: an interrupt does not wait for one."""
        due = self.iteration > 0 and self._due(self.config.train.eval_every)
        return due and self.progress.evaluated != self.iteration

    def _evaluate(self, log: RunLog | None) -> None:
        config, progress = self.config, self.progress
        self.watchdog.at("evaluating")

        def show(done: int, total: int) -> None:
            self.watchdog.alive(f"evaluating, image {done} of {total}")
            if log is not None:
                log.evaluating(done, total)

        with contextlib.nullcontext() if self._head is None else self._head.watching():
            results = evaluate(
                self.method.networks(),
                self.source,
                config.data,
                config.eval,
                self.device,
                amp=config.train.amp,
                progress=show,
            )
        record = evaluation_record(results, self._head, self.iteration, config)
        if log is not None:
            iou = next(iter(results.values())).iou_by_class(self.source.classes)
            log.evaluation(self.iteration, record | {"iou": iou})
        progress.last, progress.evaluated = record, self.iteration
        if record["miou"] > progress.best_miou:
            self._check_finite()
            progress.best_miou, progress.best_iteration = record["miou"], self.iteration
            self._save("best.pt", log)

    def _record(self) -> dict[str, Any]:
        values = self.train_step.take_record()
        return values | {"seconds": round(self.progress.seconds, 2)} | self.method.diagnostics()

    def _check_finite(self) -> None:
        """Ends the run after a step that was not finite, or reports that it was skipped."""
        failure = self.train_step.failure()
        if failure is not None:
            images = self._images(failure.iteration)
            self._say(failure.skipped(self.config.train.on_nonfinite, self.config.seed, images))

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
            "progress": self.progress.to_tree(),
            "data": self.data,
            "starts": self.starts,
            **self.train_step.state_dict(),
        }
        if name == "last.pt":
            save_last(self.output, state, self.config.train.keep)
        else:
            save_checkpoint(self.output / name, state)

    def _log(self) -> contextlib.AbstractContextManager[RunLog | None]:
        if rank() > 0:
            return contextlib.nullcontext()
        total, former = self.config.train.iterations, self._former_total
        return RunLog(self.output, start=self.iteration, total=total, former_total=former, console=self.lines)

    def _forget_graph(self) -> None:
        if isinstance(self._run_step, CapturedStep):
            self._run_step.forget()

    def _images(self, iteration: int) -> list[str]:
        return images_of_step(self.source, self.config, iteration)

    def _say(self, line: str) -> None:
        self.lines.say(line)

    def _due(self, every: int) -> bool:
        return self.iteration % every == 0
