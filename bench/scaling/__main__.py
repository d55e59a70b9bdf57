"""`python -m bench.scaling` is `python -m bench scaling`."""

import sys

from bench.commands import main

if __name__ == "__main__":
    sys.argv.insert(1, "scaling")  # results store the command
    sys.exit(main(sys.argv[1:]))
