"""Benchmarks of single ops and of the whole contrast: one file an op.

command.py    `bench ops`                     run.py        all cases of a run, its result
case.py       what a benchmark declares       harness.py    times, memory, rows
inputs.py     labels and features             memory.py     memory of one call
baselines.py  the published algorithm         eager.py      plain PyTorch, vectorised
ceilings.py   what this machine can do        compare.py    two results     plot.py   figures
"""

OPS = (
    "mutual_likelihood_score",
    "prototype_statistics",
    "sample_anchors",
    "sample_negatives",
    "probabilistic_info_nce",
    "pseudo_label",
    "upsample_bilinear",
    "upsample_cross_entropy",
    "variance_head",
    "contrast",
)
SIZES = ("small", "voc", "cityscapes")
CANDIDATES = (
    "loop",
    "eager",
    "compile",
    "torch",
    "native",
    "native-shared16",
    "triton",
    "triton-shared16",
)
DTYPES = ("float32", "bfloat16", "float16")
LABELS = ("coherent", "uniform")
