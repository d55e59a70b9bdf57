"""`python -m bench NAME ...`, see commands.py."""

import sys

from bench.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
