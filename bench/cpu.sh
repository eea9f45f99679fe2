#!/usr/bin/env bash
# The CPU figures of bench/results, in eleven to thirteen minutes, on a machine that does nothing else:
#
#   bash bench/cpu.sh [--only PARTS] [--text FILE] [--out DIR] [--busy] [--dry-run]
#
# PARTS, with commas; without --only all, in this order:
#   ffn         the layer with residual and LayerNorm, BERT-base's and MiniLM's sizes, 16 to 16384 tokens, beside the
#               dense FFN and one expert's; then the plain layer beside all peers
#   dispatch    from token ids to every layer's sorted order
#   model       BERT-base and MiniLM, batches 1×32, 8×128, 32×128, and with --text one of real sentences
#   importance  BERT-base and MiniLM, one backward pass per batch beside the published procedure
# --text     sentences, a line each, or a .tsv with a column "sentence", as GLUE's SST-2 has it
# --out      folder for results (default bench/results; with --dry-run a temporary one)
# --busy     measure although other work keeps the machine busy; the results say so
# --dry-run  tiny sizes: does everything run?
#
# PYTHON chooses the interpreter. Threads are as many as there are processors, each on one of its own. A part that
# fails does not stop the next ones; the exit status tells.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
all=ffn,dispatch,model,importance
parts=$all
out=
text=()
busy=
toy=()
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' bench/cpu.sh >&2; echo "$1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --only) parts=${2:-}; shift 2 ;;
    --text) text=(--text "${2:-}"); shift 2 ;;
    --out) out=${2:-}; shift 2 ;;
    --busy) busy=1; shift ;;
    --dry-run) busy=1; toy=(--toy --threads 1); shift ;;
    *) usage "unknown option: $1" ;;
  esac
done
for part in ${parts//,/ }; do
  case ,$all, in *",$part,"*) ;; *) usage "unknown part: $part" ;; esac
done
if [ ${#toy[@]} -gt 0 ]; then
  out=${out:-$(mktemp -d)}
  export OMP_NUM_THREADS=1
else
  out=${out:-bench/results}
  # Read when torch is loaded: they cannot be set from inside.
  OMP_NUM_THREADS=$(nproc)
  export OMP_NUM_THREADS OMP_PROC_BIND=true OMP_PLACES=cores
  # Whether the allocator gives memory back to the system between two layers, which then take a page fault for
  # every 4 KiB anew, is a matter of chance and of some 10 % of an encoder's time: here it keeps it.
  export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
fi

if [ -z "$busy" ]; then
  "$PYTHON" - <<'CHECK'
import sys
from moebert_kernels.environment import BUSY, busy_cpus

found = busy_cpus(3.0)
if found is not None and found > BUSY:
    sys.exit(f"other work keeps {found:.1f} processors busy: wait for it, or measure all the same with --busy")
CHECK
fi

bench() {
  local name=$1
  shift
  "$PYTHON" -m bench "$name" --device cpu --out "$out" "$@" ${toy[@]+"${toy[@]}"}
}

run_ffn() {
  bench ffn --norm --shape bert-base,minilm --skew balanced --passes "forward,forward+backward" \
    --tokens 16,32,64,128,256,512,1024,2048,4096,16384 --seconds 3 --limit 360 \
    --only "moebert_kernels,dense FFN replaced,bound: one expert" ${toy[@]+--tokens 16,24} || return
  bench ffn --skew balanced,zipf,skewed --passes forward,forward+backward,dispatch+forward --seconds 2 --limit 120
}

run_dispatch() { bench dispatch --seconds 3 --limit 30; }

run_model() {
  bench model --shape bert-base,minilm --seconds 5 --limit 300 ${text[@]+"${text[@]}"} \
    --only "moebert_kernels,dense BERT,bound: dense FFN of one expert"
}

run_importance() { bench importance --shape bert-base,minilm --seconds 70 --limit 150; }

failed=0
for part in ${parts//,/ }; do
  begin=$SECONDS
  status=0
  "run_$part" || status=$?
  echo "$part: $([ $status -eq 0 ] && echo done || echo "FAILED ($status)"), $((SECONDS - begin)) s"
  [ $status -eq 0 ] || failed=1
done
exit $failed
