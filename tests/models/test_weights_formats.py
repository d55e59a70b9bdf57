"""Files that are taken for weights: each is read, or one line says what it is."""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prcl_fast.errors import InputError
from prcl_fast.models.weights import read_file

STATE = {"weight": torch.arange(4.0)}


def saved(content: object, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("resnet50.pth")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def torchscript() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "web page": (lambda: b"\n<!DOCTYPE html><html>Virus scan warning</html>", "a web page (HTML)"),
    "XML": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    "LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "safetensors": (safetensors, "safetensors.torch.load_file"),
    "TorchScript": (torchscript, "a TorchScript file"),
    "gzip": (lambda: gzip.compress(saved(STATE)), "a gzip file; unpack it first"),
    "bzip2": (lambda: bz2.compress(saved(STATE)), "a bzip2 file; unpack it first"),
    "xz": (lambda: lzma.compress(saved(STATE)), "an xz file; unpack it first"),
    "tar": (lambda: tarred(saved(STATE)), "a tar archive; unpack it first"),
    "zip of a file": (lambda: zipped("resnet50.pth", saved(STATE)), "(it contains 'resnet50.pth')"),
    "empty": (lambda: b"", "it is empty"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_format_is_named(tmp_path: Path, kind: str) -> None:
    make, message = FOREIGN[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(make())
    with pytest.raises(InputError) as caught:
        read_file(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: not a readable weights file: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("zipped", [True, False])
def test_the_class_of_an_object_that_is_not_read_is_named(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(saved({"model": STATE, "args": argparse.Namespace(lr=0.1)}, zipped=zipped))
    with pytest.raises(
        InputError, match=r"weights\.pth: contains an object of argparse\.Namespace, "
    ) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_values_beside_the_tensors_do_not_prevent_reading(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    values = [np.float64(0.5), np.int64(3), np.float32(1), np.bool_(True), np.str_("a"), np.zeros((2, 3))]
    content = saved({"state_dict": STATE, "scores": values}, zipped=zipped)
    path.write_bytes(content)
    assert torch.equal(read_file(path)["state_dict"]["weight"], STATE["weight"])
    if not zipped:  # the module's name in files of NumPy 1
        path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert torch.equal(read_file(path)["state_dict"]["weight"], STATE["weight"])


def test_numpys_own_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(saved({"state_dict": STATE, "score": np.zeros(3)}))
    content = read_file(path)
    assert not isinstance(content["score"], (np.ndarray, np.generic))
