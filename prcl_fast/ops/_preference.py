"""The backends that `auto` prefers for each op and device, and the reasons: the one table of these choices.

A backend that cannot run an op there (not built, not installed, no kernel for the dtype) is passed over;
`torch` always runs. Triton has every op: it is the path of a machine with a GPU and without nvcc.
`prcl doctor` shows what is chosen on a machine, the reason, and why not something else.

A reason begins with "measured", "estimated" or "by design". Estimates compare warp-instructions of the hot
loops in SASS for sm_90, with bfloat16 features, 21 classes and 256 dimensions;
`python tests/ops/test_triton_compile.py --instructions` prints those of Triton. A measurement on a
GPU replaces the estimate, and the order if it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preference:
    """Backends to try, best first, and why in that order."""

    order: tuple[str, ...]
    reason: str


def _measured_on_the_cpu(note: str = "") -> Preference:
    return Preference(("native",), f"measured: bench/results/cpu_voc.json{note}")


def _estimated(native: int, triton: int, unit: str) -> Preference:
    return Preference(
        ("native", "triton"),
        f"estimated from SASS: {native} against {triton} warp-instructions a {unit}",
    )


_BY_DESIGN = "by design: it has its registers, shuffles and shared memory in hand; not measured yet"
_NATIVE_BY_DESIGN = Preference(("native", "triton"), _BY_DESIGN)
_VARIANCE_HEAD_ON_THE_CPU = Preference(("native",), "measured: bench/results/cpu_voc_network.json")
_BILINEAR_ON_THE_CPU = Preference(
    ("native",), "measured: bench/results/cpu_voc_network.json; PyTorch's own operation is level with it"
)

_PREFERENCE: Mapping[str, Mapping[str, Preference]] = {
    "mutual_likelihood_score": {"cpu": _measured_on_the_cpu(), "cuda": _NATIVE_BY_DESIGN},
    "mutual_likelihood_score_backward": {"cpu": _measured_on_the_cpu(), "cuda": _NATIVE_BY_DESIGN},
    "prototype_statistics": {"cpu": _measured_on_the_cpu(), "cuda": _estimated(59, 96, "row")},
    "class_lists": {
        "cpu": Preference(
            ("native",), "by design: a counting sort in two passes; part of sample_anchors' time"
        ),
        "cuda": _NATIVE_BY_DESIGN,
    },
    "sample_anchors": {"cpu": _measured_on_the_cpu(), "cuda": _NATIVE_BY_DESIGN},
    "sample_negatives": {"cpu": _measured_on_the_cpu(), "cuda": _NATIVE_BY_DESIGN},
    "philox_normal": {
        "cpu": Preference(("native",), "by design: the same bits as on CUDA, without temporaries"),
        "cuda": _NATIVE_BY_DESIGN,
    },
    "probabilistic_info_nce": {"cpu": _measured_on_the_cpu(), "cuda": _estimated(119, 164, "candidate row")},
    "probabilistic_info_nce_backward": {
        "cpu": _measured_on_the_cpu("; level with torch, the zeroing of memory bounds both"),
        "cuda": _NATIVE_BY_DESIGN,
    },
    "pseudo_label": {"cpu": _measured_on_the_cpu(), "cuda": _estimated(319, 845, "32 pixels")},
    "upsample_bilinear": {"cpu": _BILINEAR_ON_THE_CPU, "cuda": _NATIVE_BY_DESIGN},
    "upsample_bilinear_backward": {"cpu": _BILINEAR_ON_THE_CPU, "cuda": _NATIVE_BY_DESIGN},
    "upsample_cross_entropy": {
        "cpu": _measured_on_the_cpu(),
        # With the pixels at a tile's edges, which two programs work out: 510 times 1.19 and 517 times 1.33.
        "cuda": _estimated(607, 687, "32 pixels"),
    },
    "variance_head_moments": {"cpu": _VARIANCE_HEAD_ON_THE_CPU, "cuda": _NATIVE_BY_DESIGN},
    "variance_head": {"cpu": _VARIANCE_HEAD_ON_THE_CPU, "cuda": _NATIVE_BY_DESIGN},
    "variance_head_backward_sums": {"cpu": _VARIANCE_HEAD_ON_THE_CPU, "cuda": _NATIVE_BY_DESIGN},
    "variance_head_backward": {"cpu": _VARIANCE_HEAD_ON_THE_CPU, "cuda": _NATIVE_BY_DESIGN},
}


def preference(name: str, device_type: str) -> Preference:
    """What `auto` prefers for op `name` on `device_type`.

    Raises:
        KeyError: the table has no such entry.
    """
    return _PREFERENCE[name][device_type]
