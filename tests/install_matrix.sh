#!/usr/bin/env bash
# Proves that `pip install` works whatever the machine offers, and that one wheel serves every torch.
#
#   tests/install_matrix.sh PYTHON...      each PYTHON an interpreter that has the package's dependencies
#
# Each case builds a copy of the tree under pip's default build isolation, installs into a fresh virtual environment
# of the first PYTHON, and builds plans there (tests/native/check_install.py). The wheel with CUDA objects is then
# imported with every PYTHON. Needs a C++ compiler and nvcc; network or a package index for the build requirements.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,8p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
pythons=("$@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset CXX CUDA_HOME MOEBERT_REQUIRE_NATIVE PYTHONPATH

mkdir "$work/tree"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -c) | tar -x -C "$work/tree"

environment() { # NAME PYTHON: a fresh environment that sees PYTHON's packages behind its own
  "$2" -m venv "$work/$1"
  "$2" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
    >"$("$work/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/zz_dependencies.pth"
}

check() { # NAME EXPECTED
  (cd "$work" && "$work/$1/bin/python" "$root/tests/native/check_install.py" "$2")
}

install() { # NAME EXPECTED WHAT [VARIABLE=VALUE...]
  local name=$1 expected=$2 what=$3 start=$SECONDS
  shift 3
  environment "$name" "${pythons[0]}"
  env "$@" "$work/$name/bin/python" -m pip install -v --no-deps $what >"$work/$name.log" 2>&1 || {
    cat "$work/$name.log" >&2
    exit 1
  }
  echo "== $name: installed in $((SECONDS - start)) s"
  grep -o 'moebert_kernels: .*' "$work/$name.log" | sort -u || true
  check "$name" "$expected"
}

install with_nvcc cuda "$work/tree" MOEBERT_REQUIRE_NATIVE=cuda
install without_nvcc cpu "$work/tree" CUDA_HOME=/nonexistent MOEBERT_REQUIRE_NATIVE=cpu
install without_compiler none "$work/tree" PATH=/nonexistent
grep -q 'py3-none-any.whl' "$work/without_compiler.log" || { echo "not a pure Python wheel" >&2; exit 1; }
install editable cuda "-e $work/tree" MOEBERT_REQUIRE_NATIVE=cuda

# The sdist, and from it the wheel that every torch imports.
"$work/with_nvcc/bin/python" -m pip install --quiet build
"$work/with_nvcc/bin/python" -m build --sdist --outdir "$work/dist" "$work/tree" >"$work/sdist.log" 2>&1
sdist=$(echo "$work"/dist/*.tar.gz)
MOEBERT_REQUIRE_NATIVE=cuda "$work/with_nvcc/bin/python" -m pip wheel --quiet --no-deps -w "$work/dist" "$sdist"
wheel=$(echo "$work"/dist/*.whl)
echo "== $(basename "$sdist") -> $(basename "$wheel")"
for i in "${!pythons[@]}"; do
  environment "torch$i" "${pythons[$i]}"
  "$work/torch$i/bin/python" -m pip install --quiet --no-deps "$wheel"
  check "torch$i" cuda
done
