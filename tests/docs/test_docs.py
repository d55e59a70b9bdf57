"""The pages: length, line width, links, cited files and commands, examples that run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.commands import COMMANDS as BENCHMARKS
from prcl_fast.cli.main import app
from prcl_fast.config import DataConfig, load_config
from prcl_fast.sweep.config import read_sweep
from support.paths import CONFIGS, ROOT

WIDTH = 110
STRICT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*STRICT, CONFIGS / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path of this repository. NAME and the like stand for the reader's own.
PATH = re.compile(
    r"(?<![\w/.$-])(?:prcl_fast|tests|bench|csrc|configs|docs|examples)/(?:[\w.-]+/)*[\w.-]*\w(?![\w{*])"
)
PLACEHOLDER = re.compile(r"[A-Z]{3,}")
MODULE = re.compile(r"python -m ((?:prcl_fast|bench)[\w.]*\w)")
COMMAND = re.compile(r"(?:^|`|no-python )prcl ([a-z]+)", re.MULTILINE)
BENCHMARK = re.compile(r"python -m bench ([a-z][\w-]*)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> set[str]:
    shown = {str(command.name) for command in app.registered_commands if not command.hidden}
    return shown | {str(group.name) for group in app.registered_groups}


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_lines_fit_a_terminal(page: Path) -> None:
    def may_be_long(line: str) -> bool:
        # Elsewhere than in the strict pages, a table's row, or what cannot be broken: one link or picture.
        return page not in STRICT and (
            line.startswith("|") or line.startswith("![") or " " not in line.strip()
        )

    lines = enumerate(page.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > WIDTH and not may_be_long(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in heading_anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_cited_files_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    cited = {path for path in PATH.findall(text) if not PLACEHOLDER.search(path)}
    modules = {module.replace(".", "/") for module in MODULE.findall(text)}
    missing = [path for path in sorted(cited) if not (ROOT / path).exists()]
    missing += [
        module
        for module in sorted(modules)
        if not (ROOT / f"{module}.py").is_file() and not (ROOT / module / "__main__.py").is_file()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    assert sorted(set(COMMAND.findall(text)) - commands()) == []
    assert sorted(set(BENCHMARK.findall(text)) - BENCHMARKS.keys()) == []


def test_the_page_of_commands_names_all_of_them() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    assert [name for name in sorted(commands()) if f"`prcl {name}" not in text] == []


def test_the_readmes_configurations_are_read(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    own, voc = code_blocks(ROOT / "README.md", "yaml")
    (tmp_path / "own.yaml").write_text(own)
    (tmp_path / "voc.yaml").write_text(voc)
    config = load_config(tmp_path / "own.yaml")
    assert (config.method.name, config.data.kind) == ("prcl", "folder")
    assert config.model.weights == tmp_path / "resnet50.pth"  # "other paths: to this file"
    config = load_config(tmp_path / "voc.yaml")
    assert (config.method.name, config.data.kind) == ("prcl", "voc")


def test_the_data_sections_of_the_page_are_read() -> None:
    for block in code_blocks(ROOT / "docs" / "data.md", "yaml"):
        DataConfig.model_validate(yaml.safe_load(block)["data"])


def test_the_example_of_a_sweep_is_read(tmp_path: Path) -> None:
    (tmp_path / "camvid").symlink_to(CONFIGS / "camvid")
    (tmp_path / "sweeps").mkdir()
    file = tmp_path / "sweeps" / "example.yaml"
    (block,) = code_blocks(ROOT / "docs" / "sweeps.md", "yaml")
    file.write_text(block)
    sweep = read_sweep(file)
    assert len(sweep.runs) == 18
    run = next(run for run in sweep.runs if run.name == "prcl_mean/12/seed_1")
    assert (run.config.method.name, run.config.seed) == ("prcl", 1)
    assert str(run.config.data.labeled).endswith("splits/12/1/labeled.txt")


def test_the_code_of_the_page_on_own_models_runs() -> None:
    torch.manual_seed(0)
    loop, score = code_blocks(ROOT / "docs" / "own_model.md", "python")
    found: dict[str, Any] = {}
    exec(loop, found)
    assert 0 < float(found["l_c"].detach()) < 2 * float(found["contrast"].diagnostics["chance_level"])
    assert found["mu"].grad_fn is not None
    exec(score, {})
