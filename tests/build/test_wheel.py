"""Contents of the wheel and of the source archive; licence, citation and changelog."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml

from prcl_fast import __version__
from support.paths import CONFIGS, ROOT


def setup(folder: Path, *arguments: str) -> None:
    """`setup.py ARGUMENTS` without native libraries, all its files below `folder`."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(folder),
        *arguments,
    ]
    environment = os.environ | {"PRCL_NO_NATIVE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    into = [f"--bdist-dir={folder}/contents", f"--dist-dir={folder}/dist"]
    setup(folder, "build", f"--build-base={folder}/base", "bdist_wheel", *into)
    (path,) = folder.glob(f"dist/prcl_fast-{__version__}-py3-none-*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"prcl_fast-{__version__}.dist-info/METADATA"))


def test_the_wheel_holds_the_configurations(wheel: zipfile.ZipFile) -> None:
    files = [path for path in CONFIGS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml", ".json", ".md", ".sbatch"}
    for path in files:
        assert wheel.read(f"prcl_fast/configs/{path.relative_to(CONFIGS)}") == path.read_bytes()


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"prcl_fast", f"prcl_fast-{__version__}.dist-info"}
    assert "prcl_fast/py.typed" in names
    assert f"prcl_fast-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_metadata_say_licence_python_and_papers(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert len(metadata.get_all("Project-URL", [])) == 3


def test_the_source_archive_holds_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    setup(tmp_path, "sdist", f"--dist-dir={tmp_path}/dist")
    with tarfile.open(tmp_path / "dist" / f"prcl_fast-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [*CONFIGS.rglob("*.*"), *(ROOT / "csrc").rglob("*.*"), *(ROOT / "prcl_fast").rglob("*.py")]
    wanted += [ROOT / name for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "CITATION.cff")]
    assert not {str(path.relative_to(ROOT)) for path in wanted if path.suffix != ".pyc"} - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_citation_and_changelog_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"], citation["license"]) == (
        "1.2.0",
        __version__,
        "Apache-2.0",
    )
    assert sorted(paper["year"] for paper in citation["references"]) == [2022, 2022, 2023, 2024]
    versions = re.findall(
        r"^## \[(\S+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == __version__
