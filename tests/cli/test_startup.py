"""Start-up: version, help and completion import none of the large packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prcl_fast import __version__
from prcl_fast.cli.completion import _values
from prcl_fast.cli.data import synth
from prcl_fast.config import SyntheticConfig, dump_config, json_schema, parse_config
from support.tiny import tiny_tree

_LARGE = ("torch", "numpy", "matplotlib", "pydantic", "yaml", "PIL", "rich", "sklearn", "tensorboard")
_PROGRAM = """
import json, sys
from prcl_fast.cli.main import main
sys.argv = ["prcl", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    status = end.code
print(json.dumps([status, sorted(set(%r) & sys.modules.keys())]))
"""
COMMANDS = (
    *("train", "eval", "predict", "sweep", "compare", "figures", "analyse", "demo", "configs", "weights"),
    *("plan", "profile", "doctor", "data", "data check", "data synth", "data split make"),
)


def started(*arguments: str) -> tuple[str, list[str]]:
    """The output of `prcl ARGUMENTS`, which must succeed, and the large packages that it imported."""
    command = [sys.executable, "-c", _PROGRAM % (_LARGE,), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, last = result.stdout.splitlines()
    status, found = json.loads(last)
    assert status == 0, result.stderr
    return "\n".join(lines), found


def test_version_imports_no_large_package() -> None:
    assert started("--version") == (__version__, [])


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_large_package_and_shows_whole_sentences(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text, found = started(*command.split(), "--help")
    assert found == []
    assert max(map(len, text.splitlines())) <= 80
    options = text.partition("\n\n")[2].replace("]...", "]").replace("S...", "S").replace("N...", "N")
    assert "..." not in options  # a description that was cut
    assert "\\" not in text


def completed(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What bash is offered for the last word; no large package is imported."""
    monkeypatch.setenv("COMP_WORDS", "\n".join(("prcl", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setenv("_PRCL_COMPLETE", "complete_bash")
    text, found = started()
    assert found == []
    return [line for line in text.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        (["eval", "run", "--device", "c"], ["cpu", "cuda"]),
        (["predict", "run", "--network", ""], ["teacher", "student"]),
        (["analyse", "run", "--subset", "l"], ["labeled"]),
        (["train", "a.yaml", "optim.p"], ["optim.probability_lr=", "optim.power="]),
        (
            ["train", "a.yaml", "train.am"],
            ["train.amp=", *(f"train.amp={x}" for x in ("off", "bf16", "fp16"))],
        ),
        (["train", "a.yaml", "model.backbone=m"], ["model.backbone=mobilenet_v2"]),
        (["train", "a.yaml", "model.backbone", "=", "m"], ["mobilenet_v2"]),  # the words of bash
        (["train", "a.yaml", "model.stem", "="], ["plain", "deep"]),
        (["train", "a.ya"], []),  # the shell completes files
    ],
    ids=" ".join,
)
def test_commands_choices_keys_and_values_are_completed(
    monkeypatch: pytest.MonkeyPatch, words: list[str], offered: list[str]
) -> None:
    assert completed(monkeypatch, *words) == offered


def test_every_key_of_the_configuration_is_completed() -> None:
    tree = json_schema()["properties"]
    known = _values()
    assert {key.partition(".")[0] for key in known} == tree.keys()
    dumped = dump_config(parse_config(tiny_tree(Path("run")), "tiny"))
    for section in ("data", "model", "method", "optim", "train", "eval"):
        for key, value in dumped[section].items():
            if not isinstance(value, dict):
                assert f"{section}.{key}" in known


def test_the_defaults_of_data_synth_are_those_of_the_configuration() -> None:
    defaults = dict(zip(("labeled", "unlabeled", "val", "size", "seed"), synth.__defaults__, strict=True))
    assert defaults | {"size": list(defaults["size"])} == SyntheticConfig().model_dump()
