"""`python -m bench.step` is `python -m bench step`."""

import sys

from bench.commands import main

if __name__ == "__main__":
    sys.argv.insert(1, "step")  # results store the command
    sys.exit(main(sys.argv[1:]))
