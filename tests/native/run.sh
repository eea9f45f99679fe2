#!/usr/bin/env bash
# Builds and runs the C++ tests of csrc/. Arguments: any of plain, asan (address and undefined behaviour), tsan (data
# races of the host builder); all three by default. CXX chooses the compiler.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../csrc
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cxx=${CXX:-c++}
warnings="-std=c++17 -Wall -Wextra -Werror -pthread"

cpu() { # name, flags, arguments of the tests
  $cxx $warnings ${2/-O0/-O1} "$here/test_plan_cpu.cpp" "$csrc"/{parallel,plan_cpu}.cpp -o "$out/$1" -ldl
  "$out/$1" ${3:-}
  $cxx $warnings $2 "$here/test_rows_cpu.cpp" "$csrc"/{parallel.cpp,rows_*.cpp} -o "$out/rows_$1" -ldl
  "$out/rows_$1" ${3:-}
}
kernels() {
  $cxx $warnings -Wno-unknown-pragmas $2 "$here/test_plan_kernels.cpp" -o "$out/$1"
  "$out/$1"
}

for mode in "${@:-plain asan tsan}"; do
  for one in $mode; do
    echo "== $one"
    case $one in
      plain)
        cpu cpu "-O3"
        kernels kernels "-O2"
        ;;
      asan) # compiling rows takes longer than running; what null would be, the address sanitizer sees
        flags="-g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
        flags+=" -fno-sanitize=null,vptr,object-size"
        cpu cpu_asan "-O0 $flags"
        kernels kernels_asan "-O1 $flags"
        ;;
      tsan) cpu cpu_tsan "-O0 -g1 -fsanitize=thread" threaded ;;
      *)
        echo "unknown mode $one" >&2
        exit 2
        ;;
    esac
  done
done
