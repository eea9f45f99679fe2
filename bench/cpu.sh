#!/usr/bin/env bash
# The CPU figures of bench/results, within twelve minutes, on a machine that does nothing else:
#
#   bash bench/cpu.sh [options of `python -m bench all`]
#
# PYTHON chooses the interpreter. Threads are as many as there are processors, each on one of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
# Read when torch is loaded: they cannot be set from inside.
OMP_NUM_THREADS=$(nproc)
export OMP_NUM_THREADS OMP_PROC_BIND=true OMP_PLACES=cores

exec "$PYTHON" -m bench all --device cpu --out bench/results --limit 660 "$@"
