"""What `auto` prefers for each op and device: the one table of these choices.

A backend that cannot run an op there (not built, not installed, no kernel for the dtype) is passed over;
`torch` always runs. `prcl doctor` shows what is chosen on a machine, and why not something else.
"""

from __future__ import annotations

from collections.abc import Mapping

_NATIVE = ("native",)
_NATIVE_FIRST = ("native", "triton")

# On the CPU native was measured fastest (bench/results), but for the backward op of the contrast, which the
# zeroing of fresh memory bounds and where torch is level with it. On CUDA nothing was measured yet: native
# comes first by design, for its control over registers, shuffles and shared memory.
_PREFERENCE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "mutual_likelihood_score": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "mutual_likelihood_score_backward": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "prototype_statistics": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "class_lists": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "sample_anchors": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "sample_negatives": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "philox_normal": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "probabilistic_info_nce": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "probabilistic_info_nce_backward": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "pseudo_label": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "upsample_bilinear": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "upsample_bilinear_backward": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "upsample_cross_entropy": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "variance_head_moments": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "variance_head": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "variance_head_backward_sums": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
    "variance_head_backward": {"cpu": _NATIVE, "cuda": _NATIVE_FIRST},
}


def preference(name: str, device_type: str) -> tuple[str, ...]:
    """The backends to try for op `name` on `device_type`, best first."""
    return _PREFERENCE[name].get(device_type, ())
