"""The console: names are shown as they are, one line stays one line, bad arguments are one line."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from prcl_fast.console import counting, print_table, say
from prcl_fast.console.plain import PlainConsole
from prcl_fast.console.text import duration, printable
from prcl_fast.engine.evaluate import Evaluation, format_table
from support.commands import prcl
from support.paths import PACKAGE
from support.tiny import tiny_tree

# Rich would read each of them as something else, or raise MarkupError.
NAMES = ("[red]", "[/road]", "[/]", ":skull:", "a[b]c", "http://x", "\\[x]", "[link=a]")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=60, terminal=True)
    console.print(f"output {name}")
    console.rule(name)
    console.print(format_table({name: Evaluation(np.eye(2, dtype=np.int64))}, [name, "other"]))
    print_table(f"title {name}", [name, "b"], [["a", name]], console=console)
    say(name)
    assert file.getvalue().count(name) == 7
    assert capsys.readouterr().out == f"{name}\n"


def test_a_name_with_control_characters_stays_one_line_and_moves_no_cursor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printable("a\nb\r\t\x1b[31m\u2028\u202e\udcffé日") == r"a\nb\r\t\x1b[31m\u2028\u202e\udcffé日"
    file = io.StringIO()
    PlainConsole(file=file, width=10).print("photo\n\x1b[2J.jpg -> a, long, list, of, names")
    assert file.getvalue() == "photo\\n\\x1b[2J.jpg -> a, long, list, of, names\n"
    say("a\nb")
    assert capsys.readouterr().out == "a\\nb\n"


def test_consoles_lines_and_tables_are_made_in_one_place() -> None:
    """Elsewhere a name could reach the terminal as markup, or with its control characters."""
    forbidden = {"Console", "from_markup", "echo", "print"}
    allowed = {
        "processes/session.py": {"print"},  # a line of JSON
        "processes/watchdog.py": {"print"},  # the last words of a process that ends
        "config/__main__.py": {"print"},
        "cli/main.py": {"echo"},  # the version
        "cli/analyse.py": {"print"},  # lines of JSON
        "cli/sweep.py": {"print"},
    }
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if name.startswith("console/"):
            continue
        calls = {
            node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and not _is_print_of_console(node)
        }
        assert calls & forbidden <= allowed.get(name, set()), name


def _is_print_of_console(call: ast.Call) -> bool:
    """`console.print(...)`, with no argument that turns markup on."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "print"):
        return False
    return not {"markup", "emoji", "highlight"} & {keyword.arg for keyword in call.keywords}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "train: missing argument 'CONFIG'; see prcl train --help"),
        (["train", "c.yaml", "--[/x]"], "train: no such option: --[/x]; see prcl train --help"),
        (["a[red]"], "no such command 'a[red]'; see prcl --help"),
        (
            ["data", "synth", "a", "--val", "[/b]\n"],
            r"data: synth: invalid value for '--val': '[/b]\n' is not a valid integer; see prcl data synth "
            "--help",
        ),
        (["predict", "a", "b"], "predict: missing option '--out'; see prcl predict --help"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prcl(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.replace("\\\\n", "\\n") == f"prcl: {line}\n"


def test_every_command_shows_such_class_and_folder_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert prcl("data", "synth", "data", "--labeled", "2", "--unlabeled", "2", "--val", "2") == 0
    tree = tiny_tree(Path("runs/[/road]:skull:"))
    data = yaml.safe_load((tmp_path / "data/config.yaml").read_text())["data"]
    classes = [f"[/c{index}]" for index in range(len(data["classes"]))]
    tree["data"] |= data | {"root": str(tmp_path / "data"), "classes": classes, "workers": 0}
    for subset in ("labeled", "unlabeled", "val"):
        tree["data"][subset] = str(tmp_path / f"data/splits/{subset}.txt")
    tree["data"] |= {"crop": [32, 32]}
    tree["train"] |= {"iterations": 1, "eval_every": 1}
    (tmp_path / "[c].yaml").write_text(yaml.safe_dump(tree))
    run = str(tree["output"])
    capfd.readouterr()

    assert prcl("train", "[c].yaml") == 0
    assert f"output {run}" in capfd.readouterr().err
    assert prcl("data", "check", "[c].yaml") in (0, 2)
    assert "[/c1]" in capfd.readouterr().out
    assert prcl("eval", run) == 0
    error = capfd.readouterr().err
    assert f"{run}/best.pt" in error
    assert "│ [/c1] " in error
    (tmp_path / "[/p]").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "[/p]" / "a\n[red].png")
    assert prcl("predict", run, "[/p]", "--out", "[/o]") == 0
    assert "[/p]/a\\n[red].png -> a\\n[red].png, " in capfd.readouterr().err
    assert prcl("compare", run) == 0
    assert prcl("figures", run) == 0
    assert f"{run}/figures/curves.png" in capfd.readouterr().out


def test_counting_shows_nothing_where_standard_error_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with counting("[read]") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (2.96, "2.96 s"),
        (90.0, "90 s"),
        (150.0, "2.5 min"),
        (12_000.0, "3 h 20 min"),
        (216_000.0, "2.5 days"),
    ],
)
def test_a_duration_has_a_unit_of_its_size(seconds: float, text: str) -> None:
    assert duration(seconds) == text
