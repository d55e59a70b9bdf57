"""`python -m bench.scaling` is `python -m bench scaling`."""

import sys

from bench.commands import main

if __name__ == "__main__":
    sys.exit(main(["scaling", *sys.argv[1:]]))
