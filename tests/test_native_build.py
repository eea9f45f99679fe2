"""csrc/ itself: its C++ tests, its CUDA code per architecture, and what setup.py does with what it finds."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moebert_kernels import native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"

pytest.importorskip("setuptools")
spec = importlib.util.spec_from_file_location("moebert_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build
spec.loader.exec_module(build)

cxx, cuda = build.find_cxx(), build.find_cuda()
needs_cxx = pytest.mark.skipif(isinstance(cxx, build.Missing), reason=getattr(cxx, "reason", ""))
needs_nvcc = pytest.mark.skipif(isinstance(cuda, build.Missing), reason=getattr(cuda, "reason", ""))


def run(command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_native_tests_are_clean(mode):
    """Host builder and, thread by thread, the CUDA kernels; also under the sanitizers."""
    result = run(["bash", str(ROOT / "tests/native/run.sh"), mode])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", build.SASS_ARCHS)
def test_cuda_code_compiles_without_warnings_or_spills(arch, tmp_path):
    """A block of 1024 threads cannot start with more than 64 registers a thread."""
    result = run(
        [
            cuda.nvcc,
            *build.NVCC_FLAGS,
            "-Xcompiler=-Wall,-Wextra,-Werror",
            "-Xptxas=-v",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            *("-c", str(CSRC / "plan_cuda.cu"), "-o", str(tmp_path / "plan.o")),
        ]
    )
    assert result.returncode == 0, result.stderr
    usage = {}
    for name, body in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling|\Z)", result.stderr, re.S
    ):
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", body)]
        usage[name] = (spills, int(re.search(r"Used (\d+) registers", body)[1]))
    assert len(usage) == 9  # two id widths x two sources x (whole layer, count), and place
    for name, (spills, registers) in usage.items():
        assert spills == [0, 0], name
        assert registers <= 64, name


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_cxx() == build.Missing("no C++ compiler found (looked for no-such-compiler)")


def test_a_missing_nvcc_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_cuda() == build.Missing(f"no nvcc found in CUDA_HOME={tmp_path}")


@pytest.mark.parametrize(
    ("codes", "archs"),
    [
        ("sm_80 sm_90 sm_100 sm_120", ("sm_80", "sm_90a", "sm_100a", "compute_100")),
        ("sm_75 sm_80 sm_90", ("sm_80", "sm_90a", "compute_90")),
        ("sm_75", None),
    ],
)
def test_an_older_nvcc_builds_what_it_knows(monkeypatch, tmp_path, codes, archs):
    """CUDA 12.4 and the like have no sm_100: that is no reason to build nothing."""
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcudart_static.a").touch()
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *dryrun*) echo "#$ TOP={tmp_path}" >&2;; *list-gpu-code*) echo {codes};; '
        '*) echo "Cuda compilation tools, release 12.4, V12.4.1";; esac\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = build.find_cuda()
    if archs is None:
        assert "knows none of sm_80, sm_90a, sm_100a" in found.reason
    else:
        assert (found.version, found.archs) == ("12.4", archs)


@pytest.fixture
def broken_tree(tmp_path):
    """A copy of the build in a folder with a space in its name, whose C++ does not compile."""
    tree = tmp_path / "a tree"
    shutil.copytree(CSRC, tree / "csrc")
    shutil.copy(ROOT / "setup.py", tree)
    (tree / "moebert_kernels").mkdir()
    for source in tree.glob("csrc/*.cpp"):
        source.write_text("#error broken\n")
    return tree


def build_in_place(tree, **variables):
    environment = os.environ | {"CUDA_HOME": str(tree), "MOEBERT_REQUIRE_NATIVE": ""} | variables
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=environment)


@needs_cxx
def test_a_failing_build_is_loud_but_installs(broken_tree):
    result = build_in_place(broken_tree)
    assert result.returncode == 0, result.stderr
    assert "WARNING: the C++ build FAILED" in result.stderr
    assert not list(broken_tree.glob("moebert_kernels/*.so"))
    record = (broken_tree / "moebert_kernels" / native._RECORD).read_text()
    assert re.match(r"its build with \S+ failed; `pip install -v`", record)


def test_a_build_without_a_compiler_records_it(broken_tree):
    environment = os.environ | {"CXX": "no-such-compiler", "MOEBERT_REQUIRE_NATIVE": ""}
    result = run(
        [sys.executable, "setup.py", "build_py", "--build-lib", "lib"], cwd=broken_tree, env=environment
    )
    assert result.returncode == 0, result.stderr
    record = broken_tree / "lib" / "moebert_kernels" / native._RECORD
    assert record.read_text() == "no C++ compiler found (looked for no-such-compiler)\n"


@needs_cxx
def test_the_record_goes_when_a_build_succeeds(broken_tree):
    assert build_in_place(broken_tree).returncode == 0
    for source in broken_tree.glob("csrc/*.cpp"):
        source.write_text("")
    assert build_in_place(broken_tree).returncode == 0
    assert list(broken_tree.glob("moebert_kernels/*.so"))
    assert not (broken_tree / "moebert_kernels" / native._RECORD).exists()


@needs_cxx
def test_a_failing_build_fails_where_the_native_part_is_required(broken_tree):
    result = build_in_place(broken_tree, MOEBERT_REQUIRE_NATIVE="cpu")
    assert result.returncode != 0
    assert "the C++ build failed" in result.stderr


@needs_cxx
def test_required_cuda_without_nvcc_fails(broken_tree):
    result = build_in_place(broken_tree, MOEBERT_REQUIRE_NATIVE="cuda")
    assert result.returncode != 0
    assert "MOEBERT_REQUIRE_NATIVE=cuda, but no nvcc found" in result.stderr


@needs_cxx
def test_an_unknown_requirement_is_refused(broken_tree):
    result = build_in_place(broken_tree, MOEBERT_REQUIRE_NATIVE="yes")
    assert result.returncode != 0
    assert "MOEBERT_REQUIRE_NATIVE is 'yes'" in result.stderr
