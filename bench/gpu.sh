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
# --limit      seconds for all parts together (default 530); a part that is cut off keeps what it has
# --dry-run    needs no GPU: every part runs what it can on the CPU, kernels in Triton's interpreter, tiny sizes
#
# PYTHON chooses the interpreter. A part that fails does not stop the next ones; the exit status tells.
set -euo pipefail
cd "$(dirname "$0")/.."
self=bench/gpu.sh

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
parts=build,test,sanitize,bench,tune
out=
limit=530
dry=
part=
peers=()
given=()
while [ $# -gt 0 ]; do
  case $1 in
    --only) parts=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --peer-path) peers=(--peer-path "$2"); given+=(--peer-path "$2"); shift 2 ;;
    --limit) limit=$2; shift 2 ;;
    --dry-run) dry=1; given+=(--dry-run); shift ;;
    --part) part=$2; shift 2 ;; # one part alone: how the script calls itself, to cut a part off in time
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' $self >&2; echo "unknown option: $1" >&2; exit 2 ;;
  esac
done
if [ -n "$dry" ]; then
  out=${out:-$(mktemp -d)}
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  bench_options=(--device cpu --toy --threads 1)
else
  out=${out:-bench/results}
  bench_options=(--device cuda --seconds 3)
fi
mkdir -p "$out"

left() { echo $((limit - SECONDS)); }

run_build() {
  if [ ! -e setup.py ]; then echo "there is nothing to build"; return; fi
  "$PYTHON" setup.py build_ext --inplace
  "$PYTHON" -c 'from moebert_kernels import native; print(native.status())'
}

run_pytest() { # pytest's 5 means that it found no test
  local status=0
  "$PYTHON" -m pytest -m gpu "$@" || status=$?
  [ $status -eq 5 ] && echo "there are no tests marked gpu" && status=0
  return $status
}

run_test() {
  if [ -z "$dry" ]; then run_pytest --durations=10; return; fi
  run_pytest --collect-only
  "$PYTHON" -m pytest tests/test_kernels_ffn.py -k "interpreter and T7"
}

small_passes() { # ours alone, verified against the reference
  local top_k
  for top_k in 1 2; do
    "$PYTHON" -m bench ffn "${bench_options[@]}" --hidden 64 --expert-size 48 --top-k $top_k --tokens 97 \
      --dtype float32,float16,bfloat16 --skew zipf --rounds 1 --only moebert_kernels
  done
}

run_sanitize() {
  if [ -n "$dry" ]; then small_passes; else "$PYTHON" tests/sanitize.py; fi
}

run_bench() {
  local share
  share=$(($(left) / 5))
  "$PYTHON" -m bench dispatch "${bench_options[@]}" "${peers[@]}" --out "$out" --limit $((share / 2))
  "$PYTHON" -m bench model "${bench_options[@]}" "${peers[@]}" --out "$out" --limit "$share"
  "$PYTHON" -m bench ffn "${bench_options[@]}" "${peers[@]}" --out "$out" --limit $((share * 2))
}

run_tune() {
  local options=(--device cuda --limit "$(left)")
  [ -z "$dry" ] || options=(--device cpu --toy)
  "$PYTHON" -m bench.tune "${options[@]}" --out "$out/tune.txt"
}

run_profile() {
  local command=("$PYTHON" -m bench ffn "${bench_options[@]}" --passes "forward,forward+backward" --launch eager
    --cache cold --rounds 1 --only moebert_kernels)
  if [ -n "$dry" ]; then "${command[@]}"; return; fi
  ncu --set basic --force-overwrite --export "$out/ffn" "${command[@]}" --tokens 4096,16384 --skew balanced
  ncu --import "$out/ffn.ncu-rep" --csv --page raw >"$out/ffn-profile.csv"
}

if [ -n "$part" ]; then
  declare -F "run_$part" >/dev/null || { echo "there is no part $part" >&2; exit 2; }
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
  timeout --kill-after 5 "$(left)" bash $self --part "$part" --out "$out" --limit "$(left)" "${given[@]}" 2>&1 |
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
