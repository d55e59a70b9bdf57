"""The strict configuration: inheritance, overrides, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from prcl_fast.config import (
    config_fingerprint,
    dump_config,
    json_schema,
    load_config,
    override_config,
    parse_config,
)
from prcl_fast.config.files import plain_path
from prcl_fast.errors import InputError
from support.paths import CONFIGS
from support.tiny import tiny_tree


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "output: out\ndata: {kind: synthetic, crop: [64, 64]}\n"
        "method: {name: prcl, tau: 5e-1}\noptim: {lr: 1e-2}\n"
    )
    return path


def test_plain_exponents_are_numbers(file: Path) -> None:
    config = load_config(file)
    assert config.optim.lr == 0.01
    assert config.method.tau == 0.5


def test_a_file_inherits_from_its_base_and_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, file: Path
) -> None:
    (tmp_path / "deep").mkdir()
    child = tmp_path / "deep" / "child.yaml"
    child.write_text("base: ../run.yaml\nmodel: {weights: w.pth}\nmethod: {tau: 0.25}\n")
    config = load_config(child)
    assert config.method.tau == 0.25
    assert config.data.crop == [64, 64]
    assert config.model.weights == tmp_path / "deep" / "w.pth"


def test_another_method_starts_anew(tmp_path: Path, file: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\nmethod: {name: mean_teacher}\n")
    assert load_config(child).method.name == "mean_teacher"
    assert load_config(file, ["method.name=supervised"]).method.name == "supervised"


def test_overrides_replace_values(file: Path) -> None:
    config = load_config(file, ["method.tau=2", "data.crop=[32, 48]", "train.amp=bf16"])
    assert (config.method.tau, config.data.crop, config.train.amp) == (2.0, [32, 48], "bf16")


def test_a_bare_off_is_the_word_though_yaml_reads_it_as_false(file: Path) -> None:
    assert load_config(file, ["train.amp=bf16", "train.amp=off"]).train.amp == "off"


def test_a_dumped_configuration_reads_back_equal(file: Path) -> None:
    config = load_config(file, ["data.label_map={7: 0, 8: 255}", "data.palette=[[0, 0, 0], [1, 2, 3]]"])
    tree = yaml.safe_load(yaml.safe_dump(dump_config(config)))
    again = parse_config(tree, "again")
    assert config_fingerprint(again) == config_fingerprint(config)
    assert again.data == config.data


def test_one_place_has_one_spelling_from_wherever_it_is_named(tmp_path: Path, file: Path) -> None:
    """Two files in different folders that describe the same run give the same configuration."""
    (tmp_path / "sweeps").mkdir()
    across = tmp_path / "sweeps" / "run.yaml"
    across.write_text("base: ../run.yaml\ndata: {root: ../images}\n")
    beside = tmp_path / "beside.yaml"
    beside.write_text("base: run.yaml\ndata: {root: images}\n")
    across_config, beside_config = load_config(across), load_config(beside)
    assert dump_config(across_config)["data"]["root"] == str(tmp_path / "images")
    assert config_fingerprint(across_config) == config_fingerprint(beside_config)


def test_a_step_up_from_a_symbolic_link_leads_to_the_parent_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "disk" / "images").mkdir(parents=True)
    (tmp_path / "disk" / "mask.png").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "images").symlink_to(tmp_path / "disk" / "images")
    named = tmp_path / "home" / "images" / ".." / "mask.png"
    assert plain_path(named) == tmp_path / "disk" / "mask.png"
    assert plain_path(named).samefile(named)
    kept = tmp_path / "home" / "images" / "a.png"
    assert plain_path(kept) == kept  # a link may be turned to another disk
    assert plain_path(Path("/../etc")) == Path("/etc")


def test_the_generated_data_set_is_stored_only_where_it_is_used(file: Path) -> None:
    config = load_config(file, ["data.synthetic.labeled=3"])
    assert dump_config(config)["data"]["synthetic"]["labeled"] == 3
    folder = ["data.kind=folder", "data.classes=[a, b]"]
    folder += [f"data.{key}=here" for key in ("root", "labeled", "unlabeled", "val")]
    config = load_config(file, folder)
    assert "synthetic" not in dump_config(config)["data"]
    again = parse_config(dump_config(config), "test")
    assert dump_config(again) == dump_config(config)
    # A run of a former version stored the section.
    former = override_config(config, ["data.synthetic.labeled=3"])
    assert config_fingerprint(former) == config_fingerprint(config)


def test_the_fingerprint_sees_what_shapes_the_result_and_nothing_else(file: Path) -> None:
    config = load_config(file)
    assert config_fingerprint(override_config(config, ["data.workers=7", "train.log_every=3"])) == (
        config_fingerprint(config)
    )
    elsewhere = ["data.cache=disk", "data.cache_dir=here", "train.graph=true", "train.sync_check=true"]
    elsewhere += ["train.on_nonfinite=skip", "train.keep=5", "train.stall_timeout=null"]
    assert config_fingerprint(override_config(config, elsewhere)) == config_fingerprint(config)
    for change in ("seed=1", "method.tau=3.0", "train.iterations=7", "optim.lr=0.5"):
        assert config_fingerprint(override_config(config, [change])) != config_fingerprint(config), change


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.tua=1", "unknown key method.tua; did you mean tau?"),
        ("trian.iterations=1", "unknown key trian; did you mean train?"),
        ("data.synthetic.labelled=3", "unknown key data.synthetic.labelled; did you mean labeled?"),
        ("data.augment.sacle=[1, 1]", "unknown key data.augment.sacle; did you mean scale?"),
        ("method.tau=high", "method.tau: input should be a valid number, got 'high'"),
        ("train.iterations=1.5", "train.iterations: input should be a valid integer, got 1.5"),
        ("train.compile=1", "train.compile: input should be a valid boolean, got 1"),
        ("method.tau=0", "method.tau: input should be greater than 0, got 0"),
        ("method.delta_w=1.5", "method.delta_w: input should be less than or equal to 1, got 1.5"),
        ("optim.lr=.nan", "optim.lr: input should be a finite number, got nan"),
        ("optim.lr=-1", "optim.lr: input should be greater than 0, got -1"),
        ("method.name=prkl", "method.name: unknown method 'prkl'; known: supervised, mean_teacher, prcl"),
        ("data.classes=[one]", "data.classes: at least 2 are needed, got 1"),
        ("data.crop=[8, 64]", "data.crop: [8, 64] is smaller than model.output_stride 16"),
        ("data.crop=64", "data.crop: input should be a valid list, such as [64, 64], got 64"),
        ("eval.window=64", "eval.window: input should be a valid list, such as [64, 64], got 64"),
        ("eval.scales=0.5", "eval.scales: input should be a valid list, such as [0.5], got 0.5"),
        ("data.std=0.5", "data.std: input should be a valid list, such as [0.5, 0.5, 0.5], got 0.5"),
        ("lr=0.1", "unknown key lr; did you mean optim.lr?"),
        ("tau=0.1", "unknown key tau; did you mean method.tau?"),
        ("method.lr=0.1", "unknown key method.lr; did you mean optim.lr?"),
        ("crop=[64, 64]", "unknown key crop; did you mean data.crop or eval.crop?"),
        ("train.epochs=3", "unknown key train.epochs; did you mean train.iterations?"),
        ("learning_rate=0.1", "unknown key learning_rate; did you mean optim.lr?"),
        ("data.kind=voc", "data.root: required for kind voc"),
        ("data.augment.scale=[2, 1]", "data.augment.scale: the lower end 2.0 is above the upper end 1.0"),
        (
            "train.batch_unlabeled=1",
            "train.batch_unlabeled: mix classmix needs at least 2 images in each pass",
        ),
        ("train.accumulate=3", "train.batch_labeled: must be a multiple of train.accumulate 3"),
        ("method.representation=deterministic", "method.virtual_negatives: must be 0"),
        ("train=3", "train: a section of keys is expected, got 3"),
        ("nonsense", "override 'nonsense': expected key.path=value"),
        ("a..b=1", "override 'a..b=1': expected key.path=value"),
        ("seed=[", "override 'seed=[': the value is not valid YAML"),
        ("seed.deep=1", "seed: input should be a valid integer, got {'deep': 1}"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(file: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method={name: pcr, warmup: 50}", "train.iterations=50"],
            "method.warmup: must be below train.iterations 50, got 50",
        ),
        (
            ["method.name=pcr", "method.prototypes=65"],
            "method.prototypes: input should be less than or equal to 64, got 65",
        ),
        (["method={name: pcr, warmup: 0}"], "method.warmup: must be at least 1 without prototypes_from"),
        (["method.name=pps", "model.dim=12"], "method.heads: must divide model.dim 12, got 8"),
        (
            ["method={name: cps, mix: classmix}"],
            "method.mix: input should be 'none' or 'cutmix', got 'classmix'",
        ),
        (["method={name: cps, delta_u: 0.9}"], "unknown key method.delta_u"),
        (
            ["method.name=pps", "train.batch_unlabeled=1"],
            "train.batch_unlabeled: mix cutmix needs at least 2 images in each pass",
        ),
        (
            ["method.memory_bank=64"],
            "method.memory_bank: takes the place of virtual_negatives, which must be 0",
        ),
        (
            ["method={name: prcl, representation: deterministic, virtual_negatives: 0, memory_bank: 64}"],
            "method.memory_bank: takes the place of virtual_negatives, which must be 0, and needs "
            "representation probabilistic",
        ),
        (["method.omega=some"], "method.omega: input should be 'batch', 'image' or 'pixel', got 'some'"),
    ],
)
def test_a_mistake_in_a_methods_settings_is_one_line_that_names_the_key(
    file: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(file, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pcr", "cps", "pps"])
def test_two_network_and_prototype_methods_need_unlabeled_images(file: Path, name: str) -> None:
    real = ["data.kind=voc", "data.root=x", "data.labeled=x", "data.val=x"]
    with pytest.raises(InputError, match=f"data.unlabeled: required for method {name}"):
        load_config(file, [f"method.name={name}", *real])
    assert load_config(file, [f"method.name={name}"]).method.name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected keys and values at the top level"),
        ("seed: 1\nseed: 2", "key 'seed' is duplicated"),
        ("base: nowhere.yaml", "no such configuration file"),
        ("base: bad.yaml", "inherit from each other in a circle"),
        ("base: 3", "base: expected the name of a file"),
        ("output: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("output: x", "data: this key is required"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert ".yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("iterations", "given", "expected"),
    [
        (160000, "null", 5e-5),
        (40000, "null", 5e-5),
        (2000, "null", 1e-3),  # a 20th of the ablations' iterations, 20 times their rate
        (30, "null", 6.4e-3),  # optim.lr at most
        (2000, "5.0e-5", 5e-5),
        (2000, "0", 0.0),
        (2000, "0.5", 0.5),
    ],
)
def test_the_probability_heads_rate_makes_up_for_a_shorter_run(
    file: Path, iterations: int, given: str, expected: float
) -> None:
    overrides = [f"train.iterations={iterations}", f"optim.probability_lr={given}", "optim.lr=6.4e-3"]
    config = load_config(file, overrides)
    assert config.probability_lr == pytest.approx(expected)
    assert parse_config(dump_config(config), "again").probability_lr == config.probability_lr
    assert load_config(file, overrides[::2]).optim.probability_lr is None


def test_the_schema_beside_the_configurations_is_current() -> None:
    stored = json.loads((CONFIGS / "schema.json").read_text())
    assert stored == json_schema(), "run `make schema`"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "base.yaml").write_text("output: ~/out\nmethod: {name: supervised}\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/above.yaml").write_text(f"base: {tmp_path}/base.yaml\n")
    path = tmp_path / "c.yaml"
    data = "data: {kind: folder, root: ~/data, labeled: a, val: ~/v, classes: ~/c}"
    path.write_text(f"base: ~/above.yaml\n{data}\n")
    config = load_config(path, ["model.weights=~/w.pth"])
    home = tmp_path / "home"
    assert (config.output, config.data.root, config.data.val) == (home / "out", home / "data", home / "v")
    assert (config.data.labeled, config.data.classes) == (tmp_path / "a", home / "c")
    assert config.model.weights == home / "w.pth"


@pytest.mark.parametrize("key", ["output", "data.root", "data.classes", "model.weights"])
@pytest.mark.parametrize("name", ["$DATA", "${DATA}"])
def test_a_variable_in_a_path_is_refused_unless_it_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = tiny_tree(tmp_path / "run")
    holder = tree if key == "output" else tree.setdefault(key.split(".")[0], {})
    holder[key.split(".")[-1]] = f"{name}/x"
    message = re.escape(f"{key}: {name} is not replaced")
    with pytest.raises(InputError, match=rf"{message} .*command line"):
        parse_config(tree, "test")
    (tmp_path / name / "x").mkdir(parents=True)
    parse_config(tree, "test")
