"""The training loop: Algorithm 1 of the paper, for any method."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prcl_fast.config import Config, config_fingerprint, dump_config
from prcl_fast.data.batches import Batch, training_batches
from prcl_fast.data.scan import scan_labels
from prcl_fast.data.source import build_source
from prcl_fast.device import choose_device
from prcl_fast.engine.checkpoint import load_checkpoint, restore, save_checkpoint
from prcl_fast.engine.evaluate import evaluate
from prcl_fast.engine.guard import FiniteGuard
from prcl_fast.engine.logging import RunLog
from prcl_fast.engine.rundir import claim_output, label_scan_cache
from prcl_fast.losses import poly_lr
from prcl_fast.methods import Step, build_method


class InterruptedRunError(RuntimeError):
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
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        self.source = build_source(config.data)
        if config.data.scan:
            scan_labels(self.source, cache=label_scan_cache())
        torch.manual_seed(config.seed)
        self.method = build_method(config, len(self.source.classes))
        self.method.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.groups = self.method.parameter_groups()
        self.base_lr = [group["lr"] for group in self.groups]
        optim = config.optim
        self.optimizer = torch.optim.SGD(
            self.groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, foreach=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.amp == "fp16")
        self.guard = FiniteGuard()
        self.iteration = 0
        self.progress: dict[str, Any] = {"seconds": 0.0, "best_miou": -1.0, "best_iteration": 0, "last": {}}
        self.stopping = False
        self.output = claim_output(config)
        self._resume()
        if config.train.compile:
            for network in self.method.networks().values():
                network.compile()

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
            contextlib.closing(self._batches()) as batches,
        ):
            sums = _Means()
            while self.iteration < total:
                losses = self._step(batches)
                self.iteration += 1
                sums.add(losses)
                self.progress["seconds"] = time.monotonic() - started
                done = self.iteration == total
                if self._due(train.log_every) or done:
                    self.guard.check()
                    log.train(self.iteration, self._record(sums))
                    sums = _Means()
                log.advance(self.iteration)
                if self._due(train.eval_every) or done:
                    self._evaluate(log)
                    self.progress["seconds"] = time.monotonic() - started
                if self._due(train.save_every) or done or self.stopping:
                    self.guard.check()
                    log.flush()
                    self._save("last.pt")
                if self.stopping and not done:
                    raise InterruptedRunError(
                        f"stopped at iteration {self.iteration} of {total}; the state is saved in "
                        f"{self.output}, the same command goes on from there"
                    )
        return self.summary()

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

    def _step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimiser step over `accumulate` micro-batches; the named losses, averaged over them."""
        config, step = self.config, Step(self.iteration, self.config.train.iterations)
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = poly_lr(base, step.iteration, step.total, power=config.optim.power)
        self.method.train()
        means = _Means()
        for _ in range(config.train.accumulate):
            batch = next(batches)
            with self._autocast():
                losses = self.method.losses(batch, step)
            self.scaler.scale(losses["loss"] / config.train.accumulate).backward()
            means.add(losses)
        mean = means.tensors()
        self.guard.watch(mean, self.iteration)
        if self.device.type == "cpu":  # nothing to synchronise with: stop before the weights are spoilt
            self.guard.check()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.iteration)
        return mean

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
            self.guard.check()
            self.progress |= {"best_miou": main.miou, "best_iteration": self.iteration}
            self._save("best.pt")

    def _record(self, means: _Means) -> dict[str, Any]:
        values = {name: float(value) for name, value in means.tensors().items()}
        values |= {"seconds": round(self.progress["seconds"], 2), "lr": self.optimizer.param_groups[0]["lr"]}
        return values | self.method.diagnostics()

    def _save(self, name: str) -> None:
        state = {
            "config": dump_config(self.config),
            "fingerprint": config_fingerprint(self.config),
            "classes": list(self.source.classes),
            "palette": self.source.palette.tolist(),
            "iteration": self.iteration,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress,
        }
        save_checkpoint(self.output / name, state)

    def _resume(self) -> None:
        path = self.output / "last.pt"
        if not path.exists():
            return
        state = load_checkpoint(path)
        restore(self.method, state["method"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.progress = state["iteration"], state["progress"]
        self.console.print(f"{path}: going on from iteration {self.iteration}", highlight=False)

    def _batches(self) -> Generator[Batch, None, None]:
        return training_batches(
            self.source,
            self.config,
            start=self.iteration * self.config.train.accumulate,
            device=self.device,
            unlabeled=self.method.needs_unlabeled,
        )

    def _autocast(self) -> torch.autocast:
        amp = self.config.train.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=amp != "off")

    def _due(self, every: int) -> bool:
        return self.iteration % every == 0

    def _describe(self) -> None:
        for name, split in self.source.splits.items():
            if split.names:
                text = f"{name}: {len(split.names)} images, {split.family}, list {split.fingerprint}"
                self.console.print(text, highlight=False)
        parameters = sum(p.numel() for p in self.method.student.parameters())
        self.console.print(
            f"{self.config.method.name}: {self.config.model.backbone}, {parameters / 1e6:.1f} M parameters, "
            f"{len(self.source.classes)} classes, on {self.device}; output {self.output}",
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


class _Means:
    """Means of named scalars, kept on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def tensors(self) -> dict[str, Tensor]:
        return {name: total / self._count for name, total in self._sums.items()}
