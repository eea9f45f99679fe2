#!/usr/bin/env bash
# A quarter of an hour on a machine with a GPU, in two calls; --help lists parts and options.
#
#   bash bench/gpu.sh first --out DIR
#   bash bench/gpu.sh second --out DIR --only PARTS
#   bash bench/gpu.sh first --dry-run        # needs no GPU
#
# PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$PYTHON" -m bench.gpu "$@"
