"""`bench gpu-sanitize`: calls of every op, and their failures."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import sanitize
from bench.ops import OPS


def test_the_sanitizer_s_calls_reach_every_op_and_see_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "_DTYPES", (torch.float32,))
    arguments = ("--device", "cpu", "--backend", "torch")
    assert sanitize.main(arguments) == 0
    said = capsys.readouterr().out
    assert all(op in said for op in OPS)
    monkeypatch.setattr(sanitize, "pseudo_label", lambda *_: (torch.tensor([float("nan")]),))
    assert sanitize.main(arguments) == 1
    assert "pseudo_label float32: a result is not finite" in capsys.readouterr().out
