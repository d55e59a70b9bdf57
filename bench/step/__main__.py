"""`python -m bench.step` is `python -m bench step`."""

import sys

from bench.commands import main

if __name__ == "__main__":
    sys.exit(main(["step", *sys.argv[1:]]))
