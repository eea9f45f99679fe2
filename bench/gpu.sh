#!/usr/bin/env bash
# Everything that a machine with a GPU is needed for, within nine minutes a call:
#
#   bash bench/gpu.sh [--only PARTS] [--out DIR] [--peer-path DIR] [--limit SECONDS] [--dry-run]
#
# PARTS, with commas; without --only all but the last, in this order:
#   build      the native extension, in place
#   test       pytest -m gpu
#   sanitize   compute-sanitizer's four tools over small cases, tests/sanitize.py
#   bench      ffn, dispatch and model with the peers: result files, plots
#   tune       candidates for the table of tile shapes
#   profile    Nsight Compute over one forward and backward pass
# --out        folder for results and logs (default bench/results; with --dry-run a temporary one)
# --peer-path  folder with the sources of triton_kernels and scattermoe
# --limit      seconds for all parts together (default 530): bench and tune leave off in time and keep what they
#              have, of a part that is cut off its log is left
# --dry-run    needs no GPU: every part runs what it can on the CPU, kernels in Triton's interpreter, tiny sizes
#
# PYTHON chooses the interpreter. A part that fails does not stop the next ones; the exit status tells.
set -euo pipefail
cd "$(dirname "$0")/.."
self=bench/gpu.sh

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
all=build,test,sanitize,bench,tune,profile
parts=${all%,profile}
out=
limit=530
dry=
part=
peers=()
given=()
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' $self >&2; echo "$1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1; given+=(--dry-run); shift; continue ;;
    --only | --out | --peer-path | --limit | --part) [ $# -gt 1 ] || usage "$1 needs a value" ;;
    *) usage "unknown option: $1" ;;
  esac
  case $1 in
    --only) parts=$2 ;;
    --out) out=$2 ;;
    --peer-path) peers=(--peer-path "$2"); given+=(--peer-path "$2") ;;
    --limit) limit=$2 ;;
    --part) part=$2 ;; # one part alone: how the script calls itself, to cut a part off in time
  esac
  shift 2
done
for name in ${parts//,/ }; do
  case ,$all, in *",$name,"*) ;; *) usage "unknown part: $name" ;; esac
done
[[ $limit =~ ^[0-9]+$ ]] || usage "--limit must be whole seconds, got $limit"
if [ -n "$dry" ]; then
  out=${out:-$(mktemp -d)}
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  bench_options=(--device cpu --toy --threads 1)
else
  out=${out:-bench/results}
  bench_options=(--device cuda --seconds 2)
fi
mkdir -p "$out"

left() { echo $((limit - SECONDS)); }

run_build() {
  "$PYTHON" setup.py build_ext --inplace
  "$PYTHON" - "${dry:+cpu}" <<'CHECK'
import sys
from moebert_kernels import native

found = native.status()
print(found)
if not (found.cuda or sys.argv[1]):
    sys.exit("built without CUDA: plans will be made by PyTorch")
CHECK
}

run_pytest() { # pytest's 5 means that it found no test
  local status=0
  "$PYTHON" -m pytest -m gpu "$@" || status=$?
  [ $status -eq 5 ] && echo "there are no tests marked gpu" && status=0
  return $status
}

run_test() {
  if [ -z "$dry" ]; then run_pytest --durations=10; return; fi
  run_pytest --collect-only -q
  "$PYTHON" -m pytest tests/test_kernels_ffn.py -k "interpreter and T7"
}

small_passes() { # ours alone, verified against the reference
  local top_k
  for top_k in 1 2; do
    "$PYTHON" -m bench ffn "${bench_options[@]}" --hidden 64 --expert-size 48 --top-k $top_k --tokens 97 \
      --dtype float32,float16,bfloat16 --skew zipf --passes forward,forward+backward,dispatch+forward --rounds 1 \
      --only moebert_kernels
  done
}

run_sanitize() {
  if [ -n "$dry" ]; then small_passes; else "$PYTHON" tests/sanitize.py; fi
}

run_bench() { # whatever becomes of one, the others run; some time stays for what comes after
  local failed=0 ffn=(--passes forward,forward+backward,dispatch+forward)
  [ -n "$dry" ] || ffn+=(--skew balanced,zipf,skewed)
  measure dispatch $(($(left) / 10)) || failed=1
  measure model $(($(left) / 5)) || failed=1
  measure ffn $(($(left) * 3 / 4)) "${ffn[@]}" || failed=1
  return $failed
}

measure() {
  local name=$1 limit=$2
  shift 2
  "$PYTHON" -m bench "$name" "${bench_options[@]}" ${peers[@]+"${peers[@]}"} --out "$out" --limit "$limit" "$@"
}

run_tune() { # a candidate that was started in time may take a while to compile
  local options=(--device cuda --limit $(($(left) * 3 / 4)))
  [ -z "$dry" ] || options=(--device cpu --toy)
  "$PYTHON" -m bench.tune "${options[@]}" --out "$out/tune.txt"
}

run_profile() {
  local command=("$PYTHON" -m bench ffn "${bench_options[@]}" --passes "forward,forward+backward" --launch eager
    --cache cold --rounds 1 --only moebert_kernels)
  if [ -n "$dry" ]; then "${command[@]}"; return; fi
  ncu --set basic --clock-control none --force-overwrite --export "$out/ffn" "${command[@]}" --tokens 4096,16384 --skew balanced
  ncu --import "$out/ffn.ncu-rep" --csv --page raw >"$out/ffn-profile.csv"
}

if [ -n "$part" ]; then
  "run_$part"
  exit
fi

if [ -z "$dry" ]; then
  "$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch finds no CUDA device; see --dry-run")'
fi
status=0
report=()
for part in ${parts//,/ }; do
  if [ "$(left)" -lt 5 ]; then
    report+=("$part: no time left")
    status=1
    continue
  fi
  echo "=== $part"
  begin=$SECONDS
  code=0
  timeout --kill-after 5 "$(left)" bash $self --part "$part" --out "$out" --limit "$(left)" ${given[@]+"${given[@]}"} 2>&1 |
    tee "$out/gpu-$part.log" || code=$?
  case $code in
    0) report+=("$part: ok, $((SECONDS - begin)) s") ;;
    124 | 137) report+=("$part: CUT OFF after $((SECONDS - begin)) s") ;;
    *) report+=("$part: FAILED ($code) after $((SECONDS - begin)) s") ;;
  esac
  [ $code -eq 0 ] || status=1
done
printf '%s\n' "=== results in $out" "${report[@]}"
exit $status
