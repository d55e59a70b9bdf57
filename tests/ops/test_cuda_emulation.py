"""The emulation of CUDA: its values, and the mistakes in a kernel that it shows."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from support import cuda_emulation

reason = cuda_emulation.load()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


def run(kernel: str, values: Tensor, *, blocks: int = 1, threads: int = 64, option: int = 0) -> Tensor:
    return torch.ops.prcl_fast_emulation_test.run(values, kernel, blocks, threads, option)


@pytest.fixture
def values() -> Tensor:
    return torch.randint(0, 5, (256,), generator=torch.Generator().manual_seed(0))


def test_collectives_give_each_lane_what_cuda_says(values: Tensor) -> None:
    got = run("collectives", values)
    warps = values[:64].view(2, 32)
    lane = torch.arange(32)
    bit = (1 << lane)[None, :]

    def picked(source: Tensor) -> Tensor:
        return warps[:, source].flatten()

    assert torch.equal(got[0], picked(torch.full((32,), 5)))
    assert torch.equal(got[1], picked(torch.where(lane >= 3, lane - 3, lane)))
    assert torch.equal(got[2], picked(torch.where(lane < 29, lane + 3, lane)))
    assert torch.equal(got[3], picked(lane ^ 16))
    assert torch.equal(got[4], picked(torch.where(lane % 8 < 7, lane + 1, lane)))
    assert torch.equal(got[5].view(2, 32), ((warps > 2) * bit).sum(1, keepdim=True).expand(2, 32))
    same = warps[:, :, None] == warps[:, None, :]
    assert torch.equal(got[6].view(2, 32), (same * bit).sum(2))
    assert torch.equal(got[7].view(2, 32), warps.sum(1, keepdim=True).expand(2, 32))
    assert (got[8] == (values[:64] > 2).sum()).all()


def test_barriers_order_the_threads_of_a_block_and_do_not_wait_for_ended_ones(values: Tensor) -> None:
    for live in (64, 33, 1):
        sums = run("scan", values, blocks=3, option=live)
        assert torch.equal(sums[:, :live], values[:192].view(3, 64)[:, :live].cumsum(1))


def test_missing_barrier_gives_wrong_values_whichever_thread_is_the_later_one(values: Tensor) -> None:
    for neighbour in (1, -1):
        got = run("race", values + 10, blocks=2, option=neighbour)
        wrong = got != (values + 10)[:64].roll(-neighbour)
        assert (wrong.sum(1) == torch.tensor([63, 1] if neighbour == 1 else [1, 63])).all()


def test_blocks_share_nothing_and_find_no_zeros(values: Tensor) -> None:
    assert (run("fresh_memory", values, blocks=3) == -1).all()


def test_divergent_barrier_is_reported_with_its_lines(values: Tensor) -> None:
    with pytest.raises(
        RuntimeError, match=r"wait for ever.*barrier at .*test_kernels\.cu:15.*test_kernels\.cu:17"
    ):
        run("divergent", values)
    run("divergent", values, option=1)


def test_lane_that_a_shuffle_waits_for_in_vain_is_reported(values: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"a barrier at .*collective at"):
        run("absent_lane", values)
    test_collectives_give_each_lane_what_cuda_says(values)


def test_block_that_no_device_takes_is_refused(values: Tensor) -> None:
    with pytest.raises(RuntimeError, match="no device takes"):
        run("fresh_memory", values, threads=2048)


def test_source_that_does_not_compile_is_an_error_with_the_compilers_text(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("int value = undeclared;")
    with pytest.raises(RuntimeError, match=r"undeclared.* was not declared"):
        cuda_emulation._library(cuda_emulation._build_flags(), [wrong])


def test_processes_that_want_the_same_library_build_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(cuda_emulation, "_ROOT", tmp_path)
    commands: list[list[str]] = []

    def run(command: list[str]) -> str:
        if "-o" in command:
            time.sleep(0.01)
            commands.append(command)
            Path(command[command.index("-o") + 1]).touch()
        return ""

    monkeypatch.setattr(cuda_emulation, "_run", run)
    flags = SimpleNamespace(cxx="c++", compile=[], link=[])
    with ThreadPoolExecutor(3) as pool:
        libraries = list(pool.map(lambda _: cuda_emulation._library(flags, []), range(3)))
    assert len(set(libraries)) == 1
    assert libraries[0].is_file()
    assert len(commands) == 2  # the source and the link


def test_missing_compiler_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler was not found" in str(cuda_emulation.load.__wrapped__())
