"""The user's cache folder, for users with and without a home."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from prcl_fast.config import parse_config
from prcl_fast.data.cache.decoded import open_cache
from prcl_fast.data.sources import build_source
from prcl_fast.errors import InputError
from prcl_fast.files.writing import user_cache
from prcl_fast.runs.folder import label_scan_cache
from support.tiny import tiny_tree


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in the system's list."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_has_no_cache(homeless: None, tmp_path: Path) -> None:
    assert user_cache() is None
    assert label_scan_cache() is None
    tree = tiny_tree(tmp_path / "run")
    tree["data"] |= {"cache": "disk"}
    config = parse_config(tree, "test")
    with pytest.raises(InputError, match=r"data\.cache_dir: needed.*set HOME"):
        open_cache(build_source(config.data), config.data, ("labeled",))


def test_a_relative_cache_home_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert user_cache() == tmp_path / ".cache" / "prcl_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/else")
    assert user_cache() == Path("/else/prcl_fast")


def test_an_unknown_user_has_a_name_for_the_caches_of_compiled_code() -> None:
    script = (
        "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
        "import prcl_fast.cli, getpass\nprint(getpass.getuser())"
    )
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (f"user-{os.getuid()}\n", "")
