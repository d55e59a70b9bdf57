"""The check on a machine with a GPU, which may have no network and be available for minutes only.

    command.py    `bench gpu`                  gpu_check.sh  the same from a bundle: bash gpu_check.sh first
    phases.py     the two sets of phases       runner.py     phases with time limits, archived after each
    table.py      the table of a set           facts.py      the machine: GPU, versions, packages, tools
    bundle.py     `bench gpu-bundle`           wheels.py     its wheels of packages that the machine lacks
    sanitize.py   `bench gpu-sanitize`         sass.py       instructions of a kernel's loops

The runner needs neither PyTorch nor pydantic nor pytest: if one is missing, the first phase reports it.
"""
