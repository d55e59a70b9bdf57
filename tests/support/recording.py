"""A CUDA graph on the CPU: records the operations of a function and replays them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}
_INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class HostReadError(AssertionError):
    """An operation whose result the host reads: on a device it would wait, and a graph cannot hold it."""


class Recording:
    """Calls `function` once; `replay` repeats its operations on the same tensors, without its Python code."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        with _Recorder(self._operations):
            self.outputs = function()

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, outputs in self._operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A mask as an index makes a shape of values.
        masked = func.overloadpacket in _INDEXED and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]
        )
        if func in _READS or masked:
            raise HostReadError(str(func))
        outputs = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, outputs))
        return outputs
