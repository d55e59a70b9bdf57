"""Benchmarks: one file an op, and the whole contrast. They come with the source tree and are not installed.

`prcl bench` runs, compares and draws them; `python -m bench` is the same command for a Python that has only
what the ops need; `python -m bench.gpu` checks everything on a machine with a GPU.
`python -m bench.step` times the whole training step (its files are named in step/__main__.py),
`python -m bench.step.profile` times the package's own and lists its kernels, and
`python -m bench.step.same_losses` holds that the ways of running it faster leave its losses alone;
`python -m bench.scaling` counts and times what several processes send each other, and
`python -m bench.scaling.same_processes` holds that they train as one.

    case.py       what a benchmark declares        harness.py   times, memory, rows
    inputs.py     labels and features              machine.py   what a number depends on
    baselines.py  published and plain PyTorch      ceilings.py  what this machine can do at best
    run.py        all cases of a run, its result   compare.py   two results     plot.py   figures
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
