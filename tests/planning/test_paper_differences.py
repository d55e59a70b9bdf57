"""Differences of a configuration from the papers' settings."""

from __future__ import annotations

from typing import Any

import pytest

from prcl_fast.config import load_config, paper
from prcl_fast.config.paper import paper_differences
from prcl_fast.planning import plan
from prcl_fast.sweep.config import read_sweep
from support.paths import CONFIGS


@pytest.mark.parametrize(
    ("file", "paper_"),
    [
        ("voc/base.yaml", "IJCV"),
        ("voc/ablation.yaml", "IJCV"),
        ("cityscapes/base.yaml", "IJCV"),
        ("voc/prcl_aaai.yaml", "AAAI"),
        ("cityscapes/prcl_aaai.yaml", "AAAI"),
    ],
)
def test_the_papers_configurations_differ_in_whose_confidence_picks_anchors_alone(
    file: str, paper_: str
) -> None:
    config = load_config(CONFIGS / file)
    assert plan.num_classes(config.data) == {"voc": 21, "cityscapes": 19}[config.data.kind]
    assert paper.paper_of(config) == paper_
    # The IJCV paper takes the teacher's, the AAAI paper does not say whose.
    assert [d.key for d in paper_differences(config)] == (["method.confidence"] if paper_ == "IJCV" else [])


@pytest.mark.parametrize(("iterations", "here"), [(80000, None), (40000, None), (20000, "0.0001")])
def test_a_null_rate_of_the_probability_head_is_compared_by_what_it_stands_for(
    iterations: int, here: str | None
) -> None:
    changes = ["optim.probability_lr=null", f"train.iterations={iterations}"]
    config = load_config(CONFIGS / "voc" / "base.yaml", changes)
    found = [d.here for d in paper_differences(config) if d.key == "optim.probability_lr"]
    assert found == ([] if here is None else [here])


@pytest.mark.parametrize("sweep", ["aaai_table_1", "aaai_table_2", "aaai_table_4", "aaai_table_6"])
def test_every_row_of_the_aaai_paper_is_compared_with_it(sweep: str) -> None:
    runs = read_sweep(CONFIGS / "sweeps" / f"{sweep}.yaml").runs
    assert {paper.paper_of(run.config) for run in runs} == {"AAAI"}


def test_departures_from_printed_equations_are_listed() -> None:
    changes = ["method.virtual_spread=class", "method.negative_classes=uniform"]
    config = load_config(CONFIGS / "voc" / "prcl.yaml", changes)
    found = {d.key: d.section for d in paper_differences(config)}
    assert found["method.virtual_spread"] == "eq. (10)"
    assert found["method.negative_classes"] == "3.5"


@pytest.mark.parametrize("paper_", ["IJCV", "AAAI"])
def test_every_fact_names_a_key_of_the_configuration_once(paper_: paper.Paper) -> None:
    tree = load_config(CONFIGS / "voc" / "base.yaml").model_dump()
    facts = paper._FACTS[paper_] + paper._PRCL_FACTS[paper_]
    for fact in facts:
        section, key = fact.key.split(".")
        assert key in tree[section], fact.key
    assert len({fact.key for fact in facts}) == len(facts)


def test_what_differs_from_the_paper_is_listed_with_both_values() -> None:
    changes = [
        "data.crop=[321, 321]",
        "train.batch_labeled=4",
        "train.batch_unlabeled=4",
        "train.accumulate=2",
        "train.iterations=20000",
        "model.backbone=resnet50",
        "method.prototype=ema",
    ]
    config = load_config(CONFIGS / "voc" / "prcl.yaml", changes)
    found = {d.key: d for d in paper_differences(config)}
    values = {key: (d.here, d.there) for key, d in found.items()}
    assert (
        values.items()
        >= {
            "data.crop": ("321 x 321", "512 x 512"),
            "train.batch_labeled + unlabeled": ("4 + 4", "8 + 8"),
            "train.accumulate": ("2", "1"),
            "train.iterations": ("20000", "80000"),
            "model.backbone": ("resnet50", "resnet101"),
            "method.prototype": ("ema", "global"),
        }.items()
    )
    assert "16, and not how many of them are labeled" in found["train.batch_labeled + unlabeled"].meaning
    assert "eq. (16)" in found["method.prototype"].meaning
    assert "batch norm sees 2 + 2 images" in found["train.accumulate"].meaning


# A value is attributed to a paper exactly if its text gives it.
@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("voc/prcl.yaml", {"method.delta_s": 0.9}, ("paper", "5.4")),
        ("voc/prcl.yaml", {"method.delta_w": 0.6}, ("paper", "5.4")),
        ("voc/prcl.yaml", {"method.omega": "image"}, ("paper", "eq. (14)")),
        ("voc/prcl.yaml", {"train.iterations": 100}, ("paper", "4.1")),
        ("voc/prcl.yaml", {"method.alpha": -4.0}, ("public code", "")),
        ("voc/prcl.yaml", {"method.lambda_c": 2.0}, ("public code", "")),
        ("voc/prcl.yaml", {"method.tau": 7.0}, ("public code", "")),
        ("voc/prcl.yaml", {"method.delta_u": 0.9}, ("public code", "")),
        ("voc/prcl.yaml", {"optim.momentum": 0.8}, ("public code", "")),
        ("voc/prcl.yaml", {"optim.weight_decay": 1e-4}, ("public code", "")),
        ("voc/prcl.yaml", {"train.batch_labeled": 4, "train.batch_unlabeled": 12}, ("ours", "")),
        ("voc/prcl_aaai.yaml", {"method.omega": "image"}, ("paper", "eq. (11)")),
        ("voc/prcl_aaai.yaml", {"method.negatives": 64}, ("paper", "table 6")),
        ("voc/prcl_aaai.yaml", {"data.crop": [512, 512]}, ("public code", "")),
        ("voc/prcl_aaai.yaml", {"train.iterations": 100}, ("public code", "")),
        ("voc/prcl_aaai.yaml", {"optim.lr": 0.1}, ("public code", "")),
        ("voc/prcl_aaai.yaml", {"train.batch_labeled": 8}, ("public code", "")),
    ],
)
def test_a_value_is_attributed_to_the_text_that_gives_it(
    file: str, changes: dict[str, Any], expected: tuple[str, str]
) -> None:
    config = load_config(CONFIGS / file, [f"{key}={value}" for key, value in changes.items()])
    key = next(iter(changes))
    (found,) = (d for d in paper_differences(config) if d.key.startswith(key))
    assert (found.source, found.section) == expected


def test_the_ablations_are_compared_with_the_papers_ablations() -> None:
    config = load_config(CONFIGS / "voc" / "ablation.yaml", ["method.prototype=local"])
    assert paper.paper_of(config) == "IJCV"
    assert paper.paper_batch(config) == (4, 4)
