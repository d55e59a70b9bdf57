"""`python -m bench NAME ...`, see commands.py."""

import os
import sys

os.environ["MPLBACKEND"] = "agg"  # as in prcl_fast/cli: a notebook's backend may be missing here

from bench.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
