#!/usr/bin/env bash
# A quarter of an hour on a machine with a GPU, in two calls; --help lists parts and options.
#
#   bash bench/gpu.sh first --out DIR
#   bash bench/gpu.sh second --out DIR --only PARTS
#   bash bench/gpu.sh first --dry-run        # needs no GPU
#
# Kernels that were compiled before, with no GPU, are unpacked from build/kernels-sm_90.zip if it is there:
#
#   python -m bench.ahead --target sm_90 --pack build/kernels-sm_90.zip
#
# Relative paths are from where it is called.
# PYTHON chooses the interpreter.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$PYTHON" -m bench.gpu --from "$from" "$@"
