"""Training batches: each is a function of its number, for any number of workers and any start."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from itertools import islice

import numpy as np
import pytest
import torch

from prcl_fast.config import Config, parse_config
from prcl_fast.data.batches import Batch, rank_seed, training_batches
from prcl_fast.data.source import IGNORE, Split
from prcl_fast.data.sources import build_source
from prcl_fast.data.workers import WorkerDiedError
from prcl_fast.errors import InputError

CPU = torch.device("cpu")


def config(**changes) -> Config:
    tree = {
        "output": "unused",
        "data": {"kind": "synthetic", "crop": [48, 56], "workers": 0},
        "method": {"name": "mean_teacher"},
        "train": {"batch_labeled": 4, "batch_unlabeled": 8},
    }
    for path, value in changes.items():
        section, key = path.split("__")
        tree[section] = {**tree[section], key: value}
    return parse_config(tree, "test")


def batches(count: int, settings: Config | None = None, *, source=None, start: int = 0, **changes):
    settings = settings or config()
    source = source or build_source(settings.data)
    options = {"device": CPU, **changes}
    with contextlib.closing(training_batches(source, settings, start=start, **options)) as stream:
        return list(islice(stream, count))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    if batch.unlabeled is not None:
        found |= {"unlabeled_image": batch.unlabeled.image, "inside": batch.unlabeled.inside}
        found |= vars(batch.unlabeled.strong)
    return found


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        one_tensors, other_tensors = tensors(one), tensors(other)
        assert one_tensors.keys() == other_tensors.keys()
        for name, value in one_tensors.items():
            assert torch.equal(value, other_tensors[name]), name


class NumberedSource:
    """Image k has the value k everywhere, and so has its label. Sizes differ from image to image."""

    classes = tuple("abcdefghijklmnopqrstuvwxyz")
    palette = np.zeros((26, 3), dtype=np.uint8)

    def __init__(
        self, labeled: int = 12, unlabeled: int = 24, fails: str = "", how: Callable[[], None] | None = None
    ) -> None:
        self.fails, self.how = fails, how or self._unreadable
        self.splits: Mapping[str, Split] = {
            subset: Split("ids", tuple(f"{subset}_{k}" for k in range(count)), "0" * 12)
            for subset, count in (("labeled", labeled), ("unlabeled", unlabeled), ("val", 0))
        }

    def image(self, name: str) -> np.ndarray:
        if name == self.fails:
            self.how()
        number = int(name.rpartition("_")[2])
        return np.full((50 + number, 70 - number, 3), number, dtype=np.uint8)

    def _unreadable(self) -> None:
        raise InputError(f"{self.fails}.jpg: cannot be decoded")

    def label(self, name: str) -> np.ndarray:
        assert name.startswith("labeled_")
        return self.image(name)[..., 0]


def test_shapes_types_and_ranges():
    (batch,) = batches(1)
    assert batch.labeled_image.shape == (4, 3, 48, 56)
    assert batch.unlabeled.image.shape == (8, 3, 48, 56)
    assert batch.label.shape == (4, 48, 56)
    inside = batch.unlabeled.inside
    assert inside.shape == (8, 48, 56)
    assert (batch.label.dtype, inside.dtype, batch.seed.dtype) == (torch.uint8, torch.bool, torch.int64)
    for image in (batch.labeled_image, batch.unlabeled.image):
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.min() >= 0
        assert image.max() <= 1
    assert set(batch.label.unique().tolist()) <= {0, 1, 2, 3, 4, 5, IGNORE}


def test_two_runs_are_bitwise_equal():
    assert_same(batches(4), batches(4))


def test_a_run_started_in_the_middle_goes_on_bitwise_equal():
    assert_same(batches(7)[3:], batches(4, start=3))


def test_worker_processes_change_nothing():
    assert_same(batches(5), batches(5, config(data__workers=2)))


def test_batches_and_seeds_of_different_steps_differ():
    made = batches(3)
    assert [int(batch.seed[1]) for batch in made] == [0, 1, 2]
    assert len({int(batch.seed[0]) for batch in made}) == 1
    for name in ("labeled_image", "unlabeled_image", "color", "blur", "box", "class_score"):
        assert not torch.equal(tensors(made[0])[name], tensors(made[1])[name])


def test_another_seed_gives_other_batches():
    first = batches(1)[0]
    settings = config()
    other = batches(1, settings.model_copy(update={"seed": 1}))[0]
    assert not torch.equal(first.labeled_image, other.labeled_image)
    assert int(first.seed[0]) != int(other.seed[0])


def test_without_unlabeled_images_none_are_read():
    settings = config(method__name="supervised")
    made = batches(2, settings, source=NumberedSource(unlabeled=0))
    assert [batch.unlabeled for batch in made] == [None, None]
    with pytest.raises(ValueError, match="a method without unlabeled images"):
        made[0].needed_unlabeled()


def test_images_keep_their_labels_and_unlabeled_masks_are_never_asked_for():
    for batch in batches(6, source=NumberedSource()):
        number = (batch.labeled_image[:, 0] * 255).round().byte()
        known = batch.label != IGNORE
        assert known.flatten(1).any(dim=1).all()
        assert torch.equal(number[known], batch.label[known])


def test_an_epoch_shows_every_labeled_and_unlabeled_image_once():
    made = batches(3, source=NumberedSource())
    labeled = [int(image[image != IGNORE][0]) for batch in made for image in batch.label]
    assert sorted(labeled) == list(range(12))
    unlabeled = [
        round(float(image[0][inside][0]) * 255)
        for batch in made
        for image, inside in zip(batch.unlabeled.image, batch.unlabeled.inside, strict=True)
    ]
    assert sorted(unlabeled) == list(range(24))


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_micro_steps_share_out_what_one_process_sees(world, accumulate):
    whole = batches(2)
    settings = config(train__accumulate=accumulate)
    parts = [batches(2 * accumulate, settings, rank=rank, world=world) for rank in range(world)]
    for step in range(2):
        of_step = [parts[r][step * accumulate + k] for k in range(accumulate) for r in range(world)]
        for name in ("labeled_image", "label", "unlabeled_image", "inside", "color", "box", "class_score"):
            joined = torch.cat([tensors(part)[name] for part in of_step])
            # Each part is padded to its own largest image; the padding must not show.
            assert torch.equal(joined, tensors(whole[step])[name]), name


def test_seeds_of_processes_differ_and_fit_in_int64():
    seeds = [rank_seed(seed, rank) for seed in (0, 1, 2**40) for rank in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_an_input_error_with_its_own_message(workers):
    source = NumberedSource(fails="unlabeled_7")
    with pytest.raises(InputError) as caught:
        batches(3, config(data__workers=workers), source=source)
    assert str(caught.value) == "unlabeled_7.jpg: cannot be decoded"
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_any_failure_of_decoding_is_one_line_that_names_the_image(workers):
    def fail() -> None:
        raise ZeroDivisionError("a text\nof two lines")

    with pytest.raises(InputError) as caught:
        batches(3, config(data__workers=workers), source=NumberedSource(fails="unlabeled_7", how=fail))
    assert str(caught.value) == "unlabeled_7: cannot be decoded: ZeroDivisionError: a text of two lines"


def test_a_label_of_another_size_than_its_image_is_an_input_error():
    source = NumberedSource()
    source.label = lambda name: np.zeros((3, 4), dtype=np.uint8)
    with pytest.raises(InputError, match=r"labeled_\d+: the image is 5\d x \d\d pixels, its label 3 x 4"):
        batches(1, source=source)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by signal 9 (SIGKILL)"),
        (lambda: os._exit(3), "ended with exit status 3"),
    ],
)
def test_a_worker_that_dies_is_an_error_that_names_its_images(end, how):
    source = NumberedSource(fails="unlabeled_7", how=end)
    with pytest.raises(WorkerDiedError) as caught:
        batches(3, config(data__workers=2), source=source)
    message = str(caught.value)
    assert message.startswith(f"data.workers: a worker {how} at micro-step ")
    assert message.endswith("; if memory ran out, lower data.workers")
    step = int(message.split("at micro-step ")[1].split()[0])
    images = message.split("(images ")[1].split(")")[0].split(", ")
    assert len(images) == 4 + 8
    assert "unlabeled_7" in images
    assert step in range(3)
    assert multiprocessing.active_children() == []


def test_a_dying_worker_disturbs_nothing_but_the_stream():
    settings = config(data__workers=2)
    handler = signal.getsignal(signal.SIGCHLD)
    stream = training_batches(NumberedSource(), settings, start=0, device=CPU)
    with contextlib.closing(stream):
        next(stream)
        assert signal.getsignal(signal.SIGCHLD) == handler
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(60)
        sum(range(10**6))  # a handler would raise here
        with pytest.raises(WorkerDiedError, match=r"killed by signal 9"):
            list(islice(stream, 20))
    assert multiprocessing.active_children() == []


def test_closing_ends_the_workers():
    settings = config(data__workers=2)
    stream = training_batches(build_source(settings.data), settings, start=0, device=CPU)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []


def test_sigterm_to_the_whole_job_leaves_the_workers_at_work():
    settings = config(data__workers=2)
    stream = training_batches(build_source(settings.data), settings, start=0, device=CPU)
    with contextlib.closing(stream):
        list(islice(stream, 2))
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
        assert len(list(islice(stream, 8))) == 8
        assert all(worker.is_alive() for worker in workers)
    assert multiprocessing.active_children() == []


def test_an_exit_with_an_open_stream_ends_the_workers():
    script = """
        import torch
        from prcl_fast.config import parse_config
        from prcl_fast.data.batches import training_batches
        from prcl_fast.data.sources import build_source
        tree = {"output": "unused", "data": {"kind": "synthetic"}, "method": {"name": "supervised"}}
        config = parse_config(tree, "test")
        source = build_source(config.data)
        stream = training_batches(source, config, start=0, device=torch.device("cpu"))
        next(stream)
        raise SystemExit(7)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=60, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (7, "")


def test_ctrl_c_ends_main_process_and_workers_without_worker_tracebacks(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(
        textwrap.dedent(
            """
            import contextlib, signal, torch
            from prcl_fast.config import parse_config
            from prcl_fast.data.batches import training_batches
            from prcl_fast.data.sources import build_source

            if __name__ == "__main__":
                # A background job of a shell inherits SIGINT ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                torch.set_num_threads(1)
                config = parse_config({
                    "output": "unused",
                    "data": {"kind": "synthetic", "crop": [32, 32], "workers": 2},
                    "method": {"name": "mean_teacher"},
                }, "test")
                source = build_source(config.data)
                stream = training_batches(source, config, start=0, device=torch.device("cpu"))
                try:
                    with contextlib.closing(stream):
                        for number, batch in enumerate(stream):
                            if number == 2:
                                print("running", flush=True)
                except KeyboardInterrupt:
                    print("interrupted", flush=True)
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "running\n"
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert output == "interrupted\n"
    assert errors == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"train__batch_labeled": 3},
            2,
            "train.batch_labeled: 3 is not a multiple of 2 processes x train.accumulate 1",
        ),
        (
            {"train__batch_unlabeled": 2},
            2,
            "train.batch_unlabeled: 2 leaves one image to each pass of each of 2 processes",
        ),
    ],
)
def test_batches_that_cannot_be_shared_out_are_input_errors(changes, world, message):
    with pytest.raises(InputError, match=message):
        batches(1, config(**changes), world=world)


def test_an_empty_split_is_an_input_error():
    with pytest.raises(InputError, match=r"data\.unlabeled: no images"):
        batches(1, source=NumberedSource(unlabeled=0))
