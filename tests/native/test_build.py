"""csrc/ itself: its C++ tests, its CUDA code per architecture, and what setup.py does with what it finds."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from moebert_kernels import native
from tests import ROOT

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
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_native_tests_are_clean(mode):
    """Host builder and, thread by thread, the CUDA kernels, under the sanitizers.

    As it is built for users the extension is what the Python tests call; `make sanitize` runs all modes.
    """
    result = run(["bash", str(ROOT / "tests/native/run.sh"), mode])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@needs_nvcc
def test_cuda_code_compiles_without_warnings_or_spills(tmp_path):
    """A block of 1024 threads cannot start with more than 64 registers a thread."""
    result = run(
        [
            cuda.nvcc,
            *build.NVCC_FLAGS,
            *build.NVCC_STRICT,
            "-Xcompiler=-Wall,-Wextra",
            "-Xptxas=-v",
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in build.SASS_ARCHS),
            *("-c", str(CSRC / "plan_cuda.cu"), "-o", str(tmp_path / "plan.o")),
        ]
    )
    assert result.returncode == 0, result.stderr
    usage = {}
    for name, body in re.findall(
        r"Compiling entry function ('\w+' for '\w+')(.*?)(?=Compiling|\Z)", result.stderr, re.S
    ):
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", body)]
        usage[name] = (spills, int(re.search(r"Used (\d+) registers", body)[1]))
    kernels = 9  # two id widths x two sources x (whole layer, count), and place
    assert len(usage) == kernels * len(build.SASS_ARCHS)
    for name, (spills, registers) in usage.items():
        assert spills == [0, 0], name
        assert registers <= 64, name


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_cxx() == build.Missing("no C++ compiler found (looked for no-such-compiler)")


def tool(folder, name):
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def own_tools(monkeypatch, tmp_path):
    """PATH leads to these tools alone, and no variable of the user's says anything of them."""
    for name in ("CC", "CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return {name: tool(tmp_path, name) for name in ("c++", "g++-13", "x86-clang++", "ccache", "my compiler")}


@needs_cxx
@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, ["c++"]),
        ({"CXX": "g++-13 -m64"}, ["g++-13", "-m64"]),
        ({"CXX": "ccache g++-13"}, ["ccache", "g++-13"]),
        ({"CXX": "'my compiler' '-DA=b c'"}, ["my compiler", "-DA=b c"]),
        ({"CC": "ccache gcc-13 -m64"}, ["ccache", "g++-13", "-m64"]),
        ({"CC": "x86-clang"}, ["x86-clang++"]),
        ({"CC": "tcc"}, ["c++"]),
        ({"CC": "gcc-12"}, ["c++"]),
    ],
)
def test_a_compiler_is_a_command(own_tools, monkeypatch, variables, wanted):
    """Stops CXX="g++ -m64" or "ccache g++" from making a wheel without the extension."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    first, *rest = wanted
    assert build.find_cxx().command == (own_tools[first], *rest)


@needs_cxx
def test_options_of_the_user_reach_the_tools(own_tools, monkeypatch, tmp_path):
    """Stops CXXFLAGS and the like, which every other build listens to, from being passed over in silence."""
    monkeypatch.setenv("CXX", "ccache g++-13 -m64")
    for name, value in (
        ("CPPFLAGS", "-DA"),
        ("CFLAGS", "-DB"),
        ("CXXFLAGS", "'-DC=d e'"),
        ("LDFLAGS", "-lm"),
    ):
        monkeypatch.setenv(name, value)
    nvcc = build.Cuda("nvcc", "13.0", "lib64", ("-gencode=x",), ("sm_90a",))

    def commands():
        lines = build.ninja_file(build.find_cxx(), nvcc, tmp_path / "m.so").splitlines()
        return [line.strip() for line in lines if line.startswith("  command")]

    of_nvcc, of_cxx, of_linker = commands()
    assert "-DA -DB '-DC=d e' -MMD" in of_cxx
    assert of_linker.endswith(" -lm")
    assert "-Werror" not in of_cxx + of_nvcc
    assert "nvcc -ccbin=g++-13 -Xcompiler=-m64 " in of_nvcc
    monkeypatch.setenv("CUDAHOSTCXX", "/opt/gcc-12")
    assert "nvcc -ccbin=/opt/gcc-12 -std" in commands()[0]
    monkeypatch.setenv("NVCC_CCBIN", "/opt/gcc-11")
    assert "nvcc -std" in commands()[0]
    monkeypatch.setenv("MOEBERT_REQUIRE_NATIVE", "cpu")
    assert "-Werror" in commands()[1]
    monkeypatch.setenv("CXXFLAGS", "'-DC=")
    assert build.find_cxx() == build.Missing("CXXFLAGS='-DC= is no command line: No closing quotation")


@needs_cxx
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_build_with_a_command_and_options(broken_tree):
    for source in broken_tree.glob("csrc/*.cpp"):
        source.write_text("#ifndef GIVEN\n#error not given\n#endif\n")
    result = build_in_place(broken_tree, CXX="g++ -m64", CXXFLAGS="-DGIVEN")
    assert result.returncode == 0, result.stderr
    assert list(broken_tree.glob("moebert_kernels/*.so")), result.stderr


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
