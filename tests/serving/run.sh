#!/usr/bin/env bash
# Runs exported folders in the tools that serve encoders, each in an environment of its own without our package.
#
#   tests/serving/run.sh PYTHON [NAME...]      PYTHON has our package with its extras demo, export and test
#
# NAMEs choose among the environments below. They are built under .venv-serving by PYTHON from the pinned versions
# in tests/serving/requirements, some 5 GB with PyTorch for CPUs (more where pip takes its CUDA build), and kept.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/serving
python=$1
shift
all=(onnxruntime-1.22 onnxruntime openvino sentence-transformers-onnx sentence-transformers-openvino)
[ $# -gt 0 ] || set -- "${all[@]}"
folders=$(mktemp -d)
trap 'rm -rf "$folders"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONPATH

environment() { # NAME: built unless it stands there as its requirements are now
  local folder=$root/.venv-serving/$1 wanted=$here/requirements/$1.txt
  cmp --silent "$wanted" "$folder/installed.txt" && return
  rm -rf "$folder"
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --requirement "$wanted"
  # One made for CUDA does not import beside a PyTorch for CPUs, and nothing here needs it.
  "$folder/bin/python" -c 'import torchvision' 2>/dev/null || "$folder/bin/python" -m pip uninstall --quiet --yes torchvision
  cp "$wanted" "$folder/installed.txt"
}

check() { # NAME SCRIPT
  (cd "$folders" && HF_HUB_OFFLINE=1 "$root/.venv-serving/$1/bin/python" "$here/$2" "$folders")
}

for name in "$@"; do
  [ -f "$here/requirements/$name.txt" ] || { echo "there is no environment $name; there are: ${all[*]}" >&2; exit 2; }
  environment "$name"
done
(cd "$root" && PYTHONPATH=$root "$python" "$here/make_folders.py" "$folders")
for name in "$@"; do
  case $name in
    onnxruntime*) check "$name" check_onnxruntime.py ;;
    openvino) check "$name" check_openvino.py ;;
    sentence-transformers-onnx)
      BACKEND=onnx check "$name" check_sentence_transformers.py
      check "$name" check_optimum.py
      ;;
    sentence-transformers-openvino) BACKEND=openvino check "$name" check_sentence_transformers.py ;;
  esac
done
