"""The check on a machine with a GPU, which may have no network and be lent for minutes only.

    gpu_check.sh  the way in: bash gpu_check.sh first
    runner.py     phases with a time box each, packed anew after each, and the table at their end
    phases.py     the two sets                 facts.py    what the machine is and has
    bundle.py     one file for such a machine  wheels.py   the packages in it that the machine lacks

Only facts.py needs PyTorch, and nothing of this pydantic or pytest: a machine without them gets as far as saying so.
"""
