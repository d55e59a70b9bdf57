#!/usr/bin/env bash
# The check on a machine with a GPU: bash gpu_check.sh first [--out DIR]; then second.
# From a checkout, bash bench/gpu/gpu_check.sh is the same. PYTHON names the interpreter, which must have PyTorch.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit
root=$here
[ -d "$root/bench" ] || root=$(dirname "$(dirname "$here")")
# The sources' folder takes the place of the working folder, which may hold a `bench` of its own.
exec "${PYTHON:-python3}" -Bc 'import sys; sys.path[0] = sys.argv.pop(1)
from bench.commands import main
sys.exit(main(["gpu", *sys.argv[1:]]))' "$root" "$@"
