#!/usr/bin/env bash
# The serving figures of bench/results, MiniLM and BERT-base, in some eleven minutes on an otherwise idle machine:
#
#   bash bench/serve.sh --text FILE [--prepare] [--out DIR] [--graphs DIR] [--busy]
#
# --text     sentences, a line each, or a .tsv with a column "sentence", as GLUE's SST-2 has it
# --prepare  only make models and graphs, some minutes; a busy machine does not matter to that
# --out      folder for results (default bench/results)
# --graphs   folder where models and graphs are kept (default runs/serve; some 5 GB)
# --busy     measure although other work keeps the machine busy; the results say so
#
# PYTHON chooses the interpreter; it has our package with its extras demo and export, and OpenVINO if that is to be timed.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out=bench/results
graphs=runs/serve
text=()
prepare=()
busy=
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' bench/serve.sh >&2; echo "$1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --text) text=(--text "${2:-}"); shift 2 ;;
    --prepare) prepare=(--prepare); shift ;;
    --out) out=${2:-}; shift 2 ;;
    --graphs) graphs=${2:-}; shift 2 ;;
    --busy) busy=1; shift ;;
    *) usage "unknown option: $1" ;;
  esac
done

if [ -z "$busy" ] && [ ${#prepare[@]} -eq 0 ]; then
  "$PYTHON" - <<'CHECK'
import sys
from moebert_kernels.environment import BUSY, busy_cpus

found = busy_cpus(3.0)
if found is not None and found > BUSY:
    sys.exit(f"other work keeps {found:.1f} processors busy: wait for it, or measure all the same with --busy")
CHECK
fi

exec "$PYTHON" -m bench serve --out "$out" --graphs "$graphs" ${text[@]+"${text[@]}"} ${prepare[@]+"${prepare[@]}"}
