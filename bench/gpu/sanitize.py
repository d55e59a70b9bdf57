"""Calls of every op, forward and backward, on small odd shapes, for a memory checker.

compute-sanitizer --tool memcheck python -m bench gpu-sanitize [--backend native] [--sync-error]

With --sync-error each call is repeated under `torch.cuda.set_sync_debug_mode("error")`: an op that
synchronises host and device fails. Exit status 1: a call failed. Standard output names every call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.arguments import parser
from prcl_fast.errors import InputError
from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.ops import (
    Purpose,
    class_lists,
    mutual_likelihood_score,
    philox_normal,
    probabilistic_info_nce,
    prototype_statistics,
    pseudo_label,
    sample_anchors,
    sample_negatives,
    upsample_bilinear,
    upsample_cross_entropy,
    use_backend,
    variance_head,
)
from prcl_fast.ops.registry import BACKENDS, op_names, unavailable

_CLASSES, _ANCHORS, _NEGATIVES, _VIRTUAL = 5, 6, 9, 3
_BATCH, _HEIGHT, _WIDTH = 2, 7, 5
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of means and variances.
_FEATURES = (*((dtype, dtype) for dtype in _DTYPES), *((dtype, torch.float32) for dtype in _DTYPES[1:]))
_DIMS = (64, 37)  # a multiple of the vector width, and not

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Inputs:
    """Inputs of all calls."""

    label: Tensor
    valid: Tensor
    hard: Tensor
    confidence: Tensor
    probability: Tensor
    target: Tensor
    weight: Tensor
    seed: Tensor


def calls(device: str) -> Iterator[tuple[str, Call]]:
    """Name and call of every op in every dtype; a call returns its tensors, gradients included.

    Inputs are made on the host, so that almost all kernels on the device are the ops'.
    """
    generator = torch.Generator().manual_seed(0)
    x = _inputs(device, generator)
    amounts = _CLASSES, _ANCHORS
    yield "class_lists", functools.partial(_lists, x)
    yield "sample_anchors", lambda: (sample_anchors(x.label, x.valid, x.hard, *amounts, x.seed),)
    yield (
        "sample_negatives",
        lambda: (sample_negatives(x.probability, x.label, x.valid, *amounts, _NEGATIVES, x.seed),),
    )
    yield "philox_normal", lambda: (philox_normal(x.seed, (3, 300), Purpose.VIRTUAL_NEGATIVES),)
    for dim in _DIMS:
        rows = [torch.rand(count, dim, generator=generator).to(device) for count in (33, 33, 17, 17)]
        yield f"mutual_likelihood_score D={dim}", _with_gradients(mutual_likelihood_score, rows)
        for dtypes, layout in itertools.product(_FEATURES, (torch.channels_last, torch.contiguous_format)):
            mu, var = (
                values.to(device, dtype).contiguous(memory_format=layout)
                for values, dtype in zip(
                    (
                        torch.randn(_BATCH, dim, _HEIGHT, _WIDTH, generator=generator),
                        torch.rand(_BATCH, dim, _HEIGHT, _WIDTH, generator=generator) + 0.1,
                    ),
                    dtypes,
                    strict=True,
                )
            )
            head = functools.partial(
                variance_head,
                running_mean=torch.zeros(dim).to(device),
                running_var=torch.ones(dim).to(device),
                training=True,
            )
            scalars = [torch.ones(1).to(device), torch.zeros(1).to(device)]
            of_head = "variance_head", _with_gradients(head, [mu, *scalars])
            for name, call in (*_of_features(x, mu, var), of_head):
                yield f"{name} D={dim} {'/'.join(map(_short, dtypes))} {_short(layout)}", call
            upsampled = functools.partial(upsample_bilinear, size=x.target.shape[1:])
            name = f"upsample_bilinear C={dim} {_short(dtypes[0])} {_short(layout)}"
            yield name, _with_gradients(upsampled, [mu])
    for dtype in _DTYPES:
        logits = torch.randn(_BATCH, _CLASSES, 9, 7, generator=generator).to(device, dtype)
        loss = functools.partial(upsample_cross_entropy, target=x.target, weight=x.weight)
        yield f"pseudo_label {_short(dtype)}", functools.partial(pseudo_label, logits, x.target.shape[1:])
        yield f"upsample_cross_entropy {_short(dtype)}", _with_gradients(loss, [logits])


def main(arguments: Sequence[str]) -> int:
    """`python -m bench gpu-sanitize`."""
    command = parser("gpu-sanitize", __doc__)
    command.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    command.add_argument(
        "--backend", choices=BACKENDS, action="append", help="may be repeated; all by default"
    )
    command.add_argument("--sync-error", action="store_true", help="fail on a host synchronisation")
    options = command.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: PyTorch sees no CUDA device")
    called = failures = 0
    for backend in options.backend or BACKENDS:
        reasons = {unavailable(op, backend, options.device) for op in op_names()} - {None}
        if reasons:
            print(f"{backend}: not called: {'; '.join(sorted(map(str, reasons)))}")
            continue
        for name, call in calls(options.device):
            failure = _failure(backend, call, options.sync_error)
            called += 1
            failures += failure is not None
            print(f"{backend} {name}: {failure or 'ok'}", flush=True)
    print(f"{called} calls, {failures} failed")
    return 1 if failures or not called else 0


def _failure(backend: str, call: Call, sync_error: bool) -> str | None:
    """The reason why the call failed, or None."""
    try:
        with use_backend(backend):
            found = call()
            if sync_error:
                # The second call, because loading a kernel in the first may synchronise.
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    found = call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        finite = all(bool(value.isfinite().all()) for value in found)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if finite else "a result is not finite"


def _inputs(device: str, generator: torch.Generator) -> _Inputs:
    size = (_BATCH, _HEIGHT, _WIDTH)
    label = torch.randint(_CLASSES + 1, size, generator=generator, dtype=torch.uint8)
    label[label == _CLASSES] = 255
    valid = torch.rand(size, generator=generator) < 0.8
    target = torch.randint(_CLASSES, (_BATCH, 27, 19), generator=generator, dtype=torch.uint8)
    target[:, :3] = 255
    return _Inputs(
        label=label.to(device),
        valid=valid.to(device),
        hard=(valid & (torch.rand(size, generator=generator) < 0.7)).to(device),
        confidence=torch.rand(size, generator=generator).to(device),
        probability=torch.rand(_CLASSES, _CLASSES, generator=generator, dtype=torch.float64).to(device),
        target=target.to(device),
        weight=torch.rand(_BATCH, generator=generator).to(device),
        seed=torch.tensor([7, 1]).to(device),
    )


def _of_features(x: _Inputs, mu: Tensor, var: Tensor) -> Iterator[tuple[str, Call]]:
    """The ops that read features, on draws of the reference, and the whole contrast."""
    with use_backend("torch"):
        positive = prototype_statistics(mu, var, x.label, x.valid, _CLASSES)
        anchors = sample_anchors(x.label, x.valid, x.hard, _CLASSES, _ANCHORS, x.seed)
        negatives = sample_negatives(x.probability, x.label, x.valid, _CLASSES, _ANCHORS, _NEGATIVES, x.seed)
    virtual_mu = positive.mean[:, None].repeat(1, _VIRTUAL, 1)
    virtual_var = torch.full_like(virtual_mu, 0.1)
    known = torch.arange(_CLASSES, device=mu.device) != 1

    def statistics() -> tuple[Tensor, ...]:
        found, inverse_norm = prototype_statistics(mu, var, x.label, x.valid, _CLASSES, with_norms=True)
        return found.precision, found.weighted_mean, found.count, inverse_norm

    yield "prototype_statistics", statistics
    for anchors_per_set, virtual, variance, normalize in (
        (1, None, None, False),
        (1, virtual_mu, None, True),
        (3, virtual_mu, virtual_var, True),
    ):
        loss = functools.partial(
            probabilistic_info_nce,
            anchor_index=anchors,
            negative_index=negatives[:, ::anchors_per_set],
            positive=positive,
            virtual_mu=virtual,
            virtual_var=variance,
            virtual_known=known,
            tau=0.1,
            reduction="mean",
            normalize=normalize,
        )
        yield (
            f"probabilistic_info_nce anchors_per_set={anchors_per_set} normalize={normalize}",
            _with_gradients(loss, [mu, var]),
        )
    contrast = ProbabilisticContrast(
        _CLASSES, mu.shape[1], tau=0.1, anchors=_ANCHORS, negatives=_NEGATIVES
    ).to(mu.device)
    loss = functools.partial(contrast, label=x.label, valid=x.valid, confidence=x.confidence, seed=x.seed)
    yield "contrast", _with_gradients(loss, [mu, var])


def _lists(x: _Inputs) -> tuple[Tensor, ...]:
    found = class_lists(x.label, x.valid, x.hard, _CLASSES)
    return found.valid_order, found.valid_start, found.hard_order, found.hard_start


def _with_gradients(function: Callable[..., Tensor], values: Sequence[Tensor]) -> Call:
    """Calls the function with leaves of these values and computes their gradients."""

    def call() -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in values]
        found = function(*leaves)
        return found.detach(), *torch.autograd.grad(found.sum(), leaves)

    return call


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")
