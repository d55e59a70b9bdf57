"""Renamed keys: a user's file is refused in one line with the new name, a stored run still loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from prcl_fast.config import (
    config_fingerprint,
    dump_config,
    json_schema,
    load_config,
    load_stored_config,
    override_config,
    parse_config,
)
from prcl_fast.config.renamed import RENAMED
from prcl_fast.errors import InputError
from prcl_fast.losses import ProbabilisticContrast
from prcl_fast.runs.checkpoint import load_checkpoint, load_run, save_checkpoint
from prcl_fast.runs.folder import claim_output, store_config
from support.run_folders import write_run
from support.tiny import tiny_tree


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run")))
    return path


def test_a_file_with_an_old_key_is_refused_with_the_new_one(file: Path) -> None:
    file.write_text(yaml.safe_dump(tiny_tree(file.parent / "run", share=4)))
    with pytest.raises(InputError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: key method.share is now named anchors_per_set"


def test_an_override_with_an_old_key_is_refused_with_the_new_one(file: Path) -> None:
    config = load_config(file)
    for refused in (
        lambda: load_config(file, ["method.share=4"]),
        lambda: override_config(config, ["method.share=4"]),
    ):
        with pytest.raises(InputError, match=r": key method\.share is now named anchors_per_set$"):
            refused()
    with pytest.raises(ValueError, match=r"^key share is now named anchors_per_set$"):
        ProbabilisticContrast(3, 8, share=4)


def test_an_old_key_of_another_section_or_method_is_just_unknown(file: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key method\.share; known here: "):
        load_config(file, ["method={name: cps, share: 4}"])
    with pytest.raises(InputError, match=r"unknown key data\.share"):
        load_config(file, ["data.share=4"])


def test_old_names_are_gone_and_new_names_are_keys_of_the_same_section() -> None:
    keys = {key for definition in json_schema()["$defs"].values() for key in definition.get("properties", {})}
    for old, new in RENAMED.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0]
        assert new.rpartition(".")[2] in keys
        assert old.rpartition(".")[2] not in keys


def _with_old_key(tree: dict) -> dict:
    method = dict(tree["method"])
    method["share"] = method.pop("anchors_per_set")
    return tree | {"method": method}


def test_a_run_folder_of_a_former_version_is_the_same_run(tmp_path: Path) -> None:
    config = parse_config(tiny_tree(tmp_path / "run", anchors_per_set=4), "test")
    claim_output(config)
    stored = store_config(config)
    stored.write_text(yaml.safe_dump(_with_old_key(dump_config(config))))
    assert config_fingerprint(load_stored_config(stored)) == config_fingerprint(config)
    claim_output(config)  # else refused as the run of another configuration
    other = parse_config(tiny_tree(tmp_path / "run", anchors_per_set=8), "test")
    stored.write_text(yaml.safe_dump(_with_old_key(dump_config(config))))
    with pytest.raises(InputError, match="another configuration's run"):
        claim_output(other)


def test_a_checkpoint_of_a_former_version_loads(tmp_path: Path) -> None:
    write_run(tmp_path, tiny_tree(tmp_path, anchors_per_set=4))
    state = load_checkpoint(tmp_path / "best.pt")
    save_checkpoint(tmp_path / "best.pt", state | {"config": _with_old_key(state["config"])})
    assert load_run(tmp_path, torch.device("cpu")).config.method.anchors_per_set == 4
