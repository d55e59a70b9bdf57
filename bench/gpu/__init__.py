"""The check on a machine with a GPU, which may have no network and be lent for minutes only.

    gpu_check.sh  the way in: bash gpu_check.sh first
    runner.py     phases with a time box each, packed anew after each, and the table at their end
    table.py      its lines and numbers        phases.py   the two sets
    bundle.py     one file for such a machine  wheels.py   the packages in it that the machine lacks
    facts.py      what the machine is and has

The runner needs neither PyTorch nor pydantic nor pytest: where one is missing, the first phase says so.
"""
