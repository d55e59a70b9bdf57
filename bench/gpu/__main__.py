"""`python -m bench.gpu` is `python -m bench gpu`."""

import sys

from bench.commands import main

if __name__ == "__main__":
    sys.argv.insert(1, "gpu")  # results store the command
    sys.exit(main(sys.argv[1:]))
