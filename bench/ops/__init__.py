"""Benchmarks of single ops and of the whole contrast: one file an op.

command.py    `bench ops`                     run.py        all cases of a run, its result
case.py       benchmark declaration           harness.py    times, memory, rows
inputs.py     labels and features             memory.py     memory of one call
baselines.py  the published algorithm         eager.py      plain PyTorch, vectorised
ceilings.py   machine peak rates              compare.py    two results     plot.py   figures
"""

from pathlib import Path

# The benchmark of an op, or of the contrast, is the file here that defines `cases`.
OPS = tuple(sorted(x.stem for x in Path(__file__).parent.glob("*.py") if "\ndef cases(" in x.read_text()))
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
