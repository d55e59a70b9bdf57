"""The folder of a run: who may write into it, and where things lie."""

from __future__ import annotations

from pathlib import Path

import yaml

from prcl_fast.config import Config, config_fingerprint, dump_config, load_config
from prcl_fast.data.user_cache import user_cache
from prcl_fast.engine.durable import write_whole
from prcl_fast.errors import InputError


def claim_output(config: Config) -> Path:
    """Makes the output folder of a run and writes its config.yaml; a run may take its own folder again.

    Raises:
        InputError: the folder cannot be written, or holds the run of another configuration.
    """
    folder = config.output
    fingerprint = config_fingerprint(config)
    former = folder / "config.yaml"
    try:
        if former.exists() and config_fingerprint(load_config(former)) != fingerprint:
            raise InputError(f"output: {folder} holds another configuration's run (config.yaml differs)")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(former, yaml.safe_dump(dump_config(config), sort_keys=False).encode())
    except OSError as error:
        raise InputError(f"output: {folder} cannot be written: {error.strerror or error}") from None
    return folder


def label_scan_cache() -> Path:
    """The file that remembers which label files were checked, shared by all runs of a user."""
    return user_cache() / "label_scan.json"
