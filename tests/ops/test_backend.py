"""The choice of an op's implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import prcl_fast
from prcl_fast.ops import mutual_likelihood_score, native, registry, use_backend
from prcl_fast.ops.registry import BackendUnavailableError
from support import backends

OP = "mutual_likelihood_score"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The op's backends all run the reference and note their names; all can run on the CPU."""
    table = registry._implementations[OP]
    noted: list[str] = []

    def noting(name: str) -> registry.Implementation:
        def function(*arguments: object) -> object:
            noted.append(name)
            return table["torch"].function(*arguments)

        return registry.Implementation(function)

    monkeypatch.setitem(registry._implementations, OP, {name: noting(name) for name in registry.BACKENDS})
    return noted


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package as it is where nothing could be compiled."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    for function in (native.cpu_library_error, native.cuda_library_error):
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in (native.cpu_library_error, native.cuda_library_error):
        function.cache_clear()


def score() -> torch.Tensor:
    ones = torch.ones(2, 3)
    return mutual_likelihood_score(ones, ones, ones, ones)


def test_auto_prefers_native_and_a_choice_is_obeyed(calls: list[str]) -> None:
    score()
    for name in ("torch", "triton", "native"):
        with use_backend(name):
            score()
    assert calls == ["native", "torch", "triton", "native"]


def test_auto_takes_the_next_backend_that_can_run(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = registry._implementations[OP]
    broken = dataclasses.replace(table["native"], unavailable=lambda device_type, dtype: "it is broken")
    monkeypatch.setitem(registry._implementations, OP, table | {"native": broken})
    score()
    assert calls == ["torch"]


def test_leaving_the_context_restores_the_former_choice(calls: list[str]) -> None:
    with use_backend("torch"):
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        score()
    score()
    assert calls == ["torch", "native"]


def test_used_as_a_function_the_choice_stays(calls: list[str]) -> None:
    use_backend("torch")
    score()
    use_backend("auto")
    score()
    assert calls == ["torch", "native"]


def test_the_choice_holds_inside_a_graph_compiled_before_it(calls: list[str]) -> None:
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    compiled()
    with use_backend("torch"):
        compiled()
    assert calls == ["native", "torch"]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, torch, native, triton; got 'cuda'"):
        use_backend("cuda")


def test_a_backend_that_cannot_run_says_why_and_nothing_else_is_run_instead() -> None:
    with use_backend("native"), pytest.raises(BackendUnavailableError, match="no native code for meta"):
        registry.select(OP, "meta")


def test_everything_runs_where_nothing_was_compiled(nothing_built: None) -> None:
    assert score().shape == (2, 2)
    with use_backend("native"), pytest.raises(BackendUnavailableError, match=r"_native\.so was not built"):
        score()


def test_a_library_that_does_not_load_gives_the_loaders_reason(nothing_built: None, tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_bytes(f"not a library, {native.interface_mark()}".encode())
    reason = native.cpu_library_error()
    assert reason is not None
    assert "_native.so did not load" in reason
    assert "invalid ELF header" in reason or "file too short" in reason


def test_a_cuda_library_that_does_not_load_is_told_from_one_that_is_not_there(
    nothing_built: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(native.cuda_library_error()).startswith("_native_cuda.so was not built: ")
    native.cuda_library_error.cache_clear()
    (tmp_path / "_native_cuda.so").write_bytes(f"not a library, {native.interface_mark()}".encode())
    assert str(native.cuda_library_error()).startswith("_native_cuda.so did not load: ")


def test_a_library_built_for_other_signatures_is_not_loaded(nothing_built: None, tmp_path: Path) -> None:
    built = Path(prcl_fast.__file__).parent / "_native.so"
    if not built.is_file():
        pytest.skip("the native library is not built")
    mark = native.interface_mark().encode()
    content = built.read_bytes()
    assert content.count(mark) == 1
    (tmp_path / "_native.so").write_bytes(content.replace(mark, mark[:-4] + b"0000"))
    reason = "_native.so was built from other sources than this package: install prcl_fast again"
    assert native.cpu_library_error() == reason
    with use_backend("native"), pytest.raises(BackendUnavailableError, match=reason):
        score()


def test_an_older_pytorch_is_named(
    nothing_built: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_native.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    assert native.cpu_library_error() == "_native.so needs PyTorch 2.11 or newer; this is 2.10.1"


def test_a_reference_with_default_values_is_refused() -> None:
    def some_op(x: torch.Tensor, count: int = 1) -> torch.Tensor:
        return x * count

    some_op.__annotations__ = {"x": torch.Tensor, "count": int, "return": torch.Tensor}
    with pytest.raises(ValueError, match="some_op must have no default values"):
        registry.define_op(some_op, fake=some_op)
    assert "some_op" not in registry.op_names()


def test_every_op_has_every_backend() -> None:
    """A loss made of several ops must run as a whole on the backend that was chosen."""
    for name in registry.op_names():
        assert tuple(registry._implementations[name]) == registry.BACKENDS


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (("cpu", "torch"), None),
        (("cpu", "native"), None),
        (("cuda", "torch"), None),
        (("cuda", "native"), "there is no native CUDA code for float64"),
        (("cpu", "emulated"), "there is no native CUDA code for float64"),
        (("cuda", "triton"), "there is no Triton kernel for float64"),
    ],
)
def test_tests_in_float64_skip_by_name_at_places_without_it(
    monkeypatch: pytest.MonkeyPatch, place: tuple[str, str], reason: str | None
) -> None:
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)  # there may be no such device
    called = backends._moved(lambda logits: logits, "upsample_cross_entropy", *place)
    assert torch.equal(called(torch.ones(2)), torch.ones(2))
    values = torch.ones(2, dtype=torch.float64)
    if reason is None:
        assert called(values) is values
        return
    with pytest.raises(pytest.skip.Exception, match=reason):
        called(values)
    # The samplers read no floating-point values but probabilities, of any floating dtype.
    assert backends._missing_dtype("sample_negatives", *place, torch.float64) is None
