"""Synchronised batch norm: equal to one batch norm over the images of all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prcl_fast.config import parse_config
from prcl_fast.engine import step
from prcl_fast.engine.trainer import Trainer
from prcl_fast.models import sync_batch_norm
from prcl_fast.models.batch_norm import BatchNorm2d
from prcl_fast.models.deeplab import ImagePooling
from prcl_fast.models.network import SegmentationNetwork
from prcl_fast.models.sync_batch_norm import (
    SyncBatchNorm2d,
    is_synchronized,
    merge_statistics,
    sum_for_backward,
    synchronize_batch_norm,
)
from prcl_fast.ops import arguments
from support.cuda_batch_norm import cuda_batch_norm
from support.processes import Pair, pair
from support.recording import HostReadError, Recording
from support.stub_networks import small_backbones
from support.tiny import tiny_tree

CHANNELS, PASSES = 5, 2
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("three"), 3) as processes:
        yield processes


@dataclass(frozen=True)
class Case:
    """Input of a layer: images of each process, size of the maps, and their construction."""

    images: tuple[int, ...] = (4, 2)
    size: tuple[int, int] = (4, 3)
    dtype: torch.dtype = torch.float32
    affine: bool = True
    tracks: bool = True
    channels_last: bool = True
    ops: str = "cpu"

    def draw(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        shape = (sum(self.images), CHANNELS, *self.size)
        x = torch.randn(shape, generator=draw, dtype=torch.float64).to(self.dtype)
        last = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=last)

    def norm(self, kind: type[nn.BatchNorm2d], dtype: torch.dtype) -> nn.BatchNorm2d:
        torch.manual_seed(0)
        norm = kind(CHANNELS, affine=self.affine, momentum=0.3, track_running_stats=self.tracks)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        return norm.to(dtype)


def run(norm: nn.BatchNorm2d, case: Case, rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two forward passes of a layer over its rows of the batch, and a backward pass of the second."""
    for seed in range(PASSES):
        x = (3 + 2 * case.draw(seed))[rows].to(dtype).requires_grad_()
        y = norm(x)
    grad = case.draw(PASSES)[rows].to(dtype).contiguous()  # in NCHW, whatever x is
    y.backward(grad)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad} | norm.state_dict()
    return found | {f"{name} gradient": p.grad for name, p in norm.named_parameters() if p.grad is not None}


def _on_process(rank: int, case: Case) -> dict[str, Tensor]:
    first = sum(case.images[:rank])
    own = torch.float64 if case.dtype == torch.float64 else torch.float32
    norm = synchronize_batch_norm(case.norm(BatchNorm2d, own))
    assert is_synchronized(norm)
    rows = slice(first, first + case.images[rank])
    with cuda_batch_norm() if case.ops == "cuda" else contextlib.nullcontext():
        return run(norm, case, rows, case.dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(affine=False),
        Case(tracks=False),
        Case(affine=False, tracks=False, dtype=torch.bfloat16),
        Case(channels_last=False),
        Case(dtype=torch.float64),
        Case(dtype=torch.bfloat16),
        Case(dtype=torch.float16),
        Case(images=(1, 1), size=(1, 1)),
        Case(images=(1, 5), size=(1, 1), dtype=torch.float64),
        Case(images=(3, 1, 2)),
        Case(images=(1, 4, 2), dtype=torch.float64, affine=False, channels_last=False),
        Case(images=(1, 1, 1), size=(1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("ops", ["cpu", "cuda"])
def test_processes_normalise_as_one_layer_over_all_images(
    two: Pair, three: Pair, case: Case, ops: str
) -> None:
    case = Case(**vars(case) | {"ops": ops})
    parts = (two if len(case.images) == 2 else three)(_on_process, case)
    whole = run(case.norm(nn.BatchNorm2d, torch.float64), case, slice(None), torch.float64)
    assert parts[0].keys() == whole.keys()
    for name, value in whole.items():
        found = parts[0][name]
        if name in ("y", "x"):
            found = torch.cat([part[name] for part in parts])
            assert found.dtype == case.dtype
        elif name.endswith("gradient"):
            found = sum(part[name] for part in parts)
        else:
            assert all(torch.equal(part[name], found) for part in parts), name
        torch.testing.assert_close(found.double(), value.double(), **_tolerance(name, case), msg=name)


def _tolerance(name: str, case: Case) -> dict[str, float]:
    if case.dtype == torch.float64:
        return {"rtol": 1e-12, "atol": 1e-12}
    if name.startswith("running"):
        return {"rtol": 1e-6, "atol": 1e-6}
    if name in ("y", "x") and case.dtype != torch.float32:
        return {"rtol": torch.finfo(case.dtype).eps, "atol": 2e-5}
    # The difference of two close values matters, and it has few bits.
    return {"rtol": 1e-5, "atol": 1e-4 if case.size == (1, 1) else 5e-6}


def _counted_collectives(
    rank: int, learns: tuple[bool, bool, bool]
) -> tuple[list[tuple[str, int]], list[bool]]:
    norm = synchronize_batch_norm(Case().norm(BatchNorm2d, torch.float32))
    norm.weight.requires_grad_(learns[1])
    norm.bias.requires_grad_(learns[2])
    x = Case().draw(0)[3 * rank : 3 * rank + 3].requires_grad_(learns[0])
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch, cuda_batch_norm():
        for name in ("gathered", "summed"):
            real = getattr(sync_batch_norm, name)
            patch.setattr(
                sync_batch_norm,
                name,
                lambda values, name=name, real=real: (calls.append((name, len(values))), real(values))[1],
            )
        norm(x).square().sum().backward()
    return calls, [tensor.grad is not None for tensor in (x, norm.weight, norm.bias)]


@pytest.mark.parametrize(
    "learns", [(True, True, True), (True, False, False), (True, False, True), (False, True, False)]
)
def test_a_layer_takes_one_gather_and_one_sum_and_gives_the_gradients_asked_for(
    two: Pair, learns: tuple[bool, bool, bool]
) -> None:
    forward, backward = ("gathered", 2 * CHANNELS + 1), ("summed", 2 * CHANNELS)
    for calls, found in two(_counted_collectives, learns):
        assert calls == ([forward, backward] if learns[0] else [forward])
        assert found == list(learns)


def _merged(rank: int) -> list[Tensor]:
    x = Case().draw(0)[:4] if rank == 0 else Case().draw(0)[4:]
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    mean, invstd, counts = merge_statistics(
        mean, (var + 1e-5).rsqrt(), x.numel() // CHANNELS, None, None, 0.1, 1e-5
    )
    dy = x.cos()
    sums = sum_for_backward(dy.sum((0, 2, 3)), (dy * (x - mean.view(-1, 1, 1))).sum((0, 2, 3)))
    return [mean, invstd, counts, *sums]


def test_statistics_and_sums_of_a_layer_of_ones_own(two: Pair) -> None:
    x = Case().draw(0).double()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    products = x.cos() * (x - mean.view(-1, 1, 1))
    expected = [mean, (var + 1e-5).rsqrt(), None, x.cos().sum((0, 2, 3)), products.sum((0, 2, 3))]
    first, second = two(_merged)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert first[2].tolist() == [4 * 12, 2 * 12]
    for found, value in zip(first, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_one_process_and_evaluation_have_the_bits_of_pytorchs_layer(training: bool) -> None:
    case = Case()
    own, theirs = (
        case.norm(kind, torch.float32).train(training) for kind in (SyncBatchNorm2d, nn.BatchNorm2d)
    )
    assert not is_synchronized(own)
    found, expected = (run(norm, case, slice(None), torch.float32) for norm in (own, theirs))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert own.num_batches_tracked == (PASSES if training else 0)


def _evaluated(rank: int) -> tuple[bool, Tensor]:
    norm = synchronize_batch_norm(Case().norm(BatchNorm2d, torch.float32)).eval()
    norm.running_mean += 1
    return is_synchronized(norm), norm(Case().draw(rank)).detach()


def test_evaluation_on_several_processes_is_each_ones_own(two: Pair) -> None:
    norm = Case().norm(nn.BatchNorm2d, torch.float32).eval()
    norm.running_mean += 1
    for rank, (synchronized, y) in enumerate(two(_evaluated)):
        assert not synchronized
        assert torch.equal(y, norm(Case().draw(rank)))


def _pooled(rank: int) -> tuple[Tensor, int]:
    torch.manual_seed(0)
    pooling = synchronize_batch_norm(ImagePooling(CHANNELS, 4))
    y = pooling(Case().draw(0)[rank : rank + 1])
    return y.detach(), int(pooling.bn.num_batches_tracked)


def test_image_pooling_takes_the_statistics_of_one_image_on_each_process(two: Pair) -> None:
    torch.manual_seed(0)
    expected = ImagePooling(CHANNELS, 4)(Case().draw(0)[:2])
    (first, passes), (second, _) = two(_pooled)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-4, atol=1e-4)
    assert passes == 1


def _compiled_network(rank: int) -> tuple[set[int], float]:
    torch.manual_seed(0)
    network = synchronize_batch_norm(SegmentationNetwork("resnet18", base_width=8, num_classes=3, width=16))
    compiled = torch.compile(network, backend="eager")
    images = torch.randn(4, 3, 32, 32)[2 * rank : 2 * rank + 2]
    # One compilation for each of its twenty layers would exceed the limit.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled(images)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(images)
    state = network.state_dict()
    counts = {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    return counts, float(state["backbone.bn1.running_mean"].sum())


def test_a_compiled_network_on_two_processes_is_compiled_once_and_counts_each_pass(two: Pair) -> None:
    first, second = two(_compiled_network)
    assert first == second
    assert first[0] == {2}
    assert first[1] != 0


@contextlib.contextmanager
def alone_in_a_group() -> Iterator[None]:
    """Makes one process take the path of several; it gathers and sums its own values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync_batch_norm, "world_size", lambda: 2)
        patch.setattr(sync_batch_norm, "gathered", lambda values: values[None])
        patch.setattr(sync_batch_norm, "summed", lambda values: values)
        yield


def test_the_way_of_cuda_reads_nothing_on_the_host() -> None:
    norm = Case().norm(SyncBatchNorm2d, torch.float32)
    x, grad = (Case().draw(seed) for seed in range(2))
    x.requires_grad_()
    eager = Case().norm(SyncBatchNorm2d, torch.float32)

    def step(norm: nn.Module) -> tuple[Tensor, ...]:
        y = norm(x)
        return (y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], grad))

    with alone_in_a_group(), cuda_batch_norm():
        recording = Recording(lambda: step(norm))
        step(eager)
        with torch.no_grad():
            x.mul_(-2).add_(1)
        recording.replay()
        expected = step(eager)
    for found, value in zip(recording.outputs, expected, strict=True):
        assert torch.equal(found, value)
    for name, value in eager.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value), name


def test_the_way_of_cuda_copies_nothing_from_or_to_the_host() -> None:
    """A tensor on the meta device has no values: reading one raises, and so does one of another device."""
    with alone_in_a_group(), cuda_batch_norm():
        norm = SyncBatchNorm2d(CHANNELS, device="meta")
        x = torch.empty(2, CHANNELS, 4, 3, device="meta", requires_grad=True)
        norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


class _AsOnCuda(DistributedDataParallel):
    """On a CPU the step has it look for parameters without a gradient, and it reads what it finds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"find_unused_parameters": False})


def _host_read(rank: int, config: dict[str, Any]) -> str | None:
    """Host reads of one step, after two warm-up steps."""
    with pytest.MonkeyPatch.context() as patch, small_backbones(), cuda_batch_norm():
        patch.setattr(step, "DistributedDataParallel", _AsOnCuda)
        trainer = Trainer(parse_config(config, "tiny"), Console(quiet=True))
        with contextlib.closing(trainer.batches()) as batches:
            for _ in range(2):
                trainer.step(batches)
            batch = next(batches)
        patch.setattr(arguments, "_is_readable_on_host", lambda x: False)  # as on a device
        try:
            Recording(lambda: trainer.train_step([batch]))
        except HostReadError as error:
            return str(error)
    return None


@pytest.mark.parametrize(
    ("train", "method"),
    [
        ({}, {}),
        ({"sync_bn": False, "amp": "bf16"}, {"virtual_negatives": 0, "memory_bank": 160}),
        ({}, {"name": "pcr", "delta_u": 0.2, "warmup": 1}),
        ({}, {"name": "pps", "prototypes": 2, "layers": 1, "heads": 2}),
    ],
    ids=["prcl", "memory bank", "pcr", "pps"],
)
def test_the_step_of_two_processes_reads_nothing_on_the_host(
    two: Pair, tmp_path: Path, train: dict[str, Any], method: dict[str, Any]
) -> None:
    config = tiny_tree(tmp_path / "run", **method)
    config["train"] |= {"batch_labeled": 4, "batch_unlabeled": 4} | train
    config["data"]["crop"] = [32, 32]
    assert two(_host_read, config) == [None, None]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_cudas_ops_give_the_numbers_of_pytorchs_layer(
    dtype: torch.dtype, affine: bool, channels_last: bool
) -> None:
    case = Case(dtype=dtype, affine=affine, channels_last=channels_last, images=(16,), size=(17, 9))
    own = torch.float64 if dtype == torch.float64 else torch.float32
    norm = case.norm(SyncBatchNorm2d, own).cuda()
    theirs = case.norm(nn.BatchNorm2d, torch.float64)
    x = (3 + 2 * case.draw(0)).to(dtype)
    grad = case.draw(1)
    device_x, wide_x = x.cuda().requires_grad_(), x.double().requires_grad_()
    norm(device_x.detach())  # libraries wait when they begin
    norm.load_state_dict(theirs.state_dict())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with alone_in_a_group():
            y = norm(device_x)
            y.backward(grad.cuda())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = theirs(wide_x)
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert y.stride() == device_x.stride() == device_x.grad.stride()
    found = {"y": y, "x": device_x.grad} | dict(norm.state_dict())
    found |= {f"{name} gradient": p.grad for name, p in norm.named_parameters()}
    wanted = {"y": expected, "x": wide_x.grad} | dict(theirs.state_dict())
    wanted |= {f"{name} gradient": p.grad for name, p in theirs.named_parameters()}
    for name, value in wanted.items():
        rtol, atol = (1e-10, 1e-10) if dtype == torch.float64 else (1e-5, 1e-4)
        if name in ("y", "x") and own != dtype:
            rtol, atol = torch.finfo(dtype).eps, 1e-4
        if name.startswith("running") and dtype != torch.float64:
            rtol = atol = 1e-6
        torch.testing.assert_close(found[name].cpu().double(), value.double(), rtol=rtol, atol=atol, msg=name)


@needs_gpu
@pytest.mark.gpu
def test_a_cuda_graph_holds_the_layer() -> None:
    case = Case(images=(8,), size=(16, 16))
    eager, captured = (case.norm(SyncBatchNorm2d, torch.float32).cuda() for _ in range(2))
    inputs = [(3 + 2 * case.draw(seed)).cuda() for seed in range(5)]
    own = inputs[0].clone().requires_grad_()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step(norm: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y = norm(x)
        return (y.detach(), *torch.autograd.grad(y.square().mean(), [x, *norm.parameters()]))

    with alone_in_a_group():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(captured, own)
                step(eager, own)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            outputs = step(captured, own)
        for x in inputs[1:]:
            with torch.no_grad():
                own.copy_(x)
            graph.replay()
            expected = step(eager, x.requires_grad_())
            for found, value in zip(outputs, expected, strict=True):
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], value, rtol=1e-6, atol=1e-6)
