"""Builds moebert_kernels._native from csrc/ with ninja; everything else is in pyproject.toml.

What the machine offers decides what is built: C++ and CUDA, C++ alone, or nothing. A missing tool never fails
an install, and neither does an error of a tool that is there, unless MOEBERT_REQUIRE_NATIVE is set: "cpu"
demands the C++ part, "cuda" both; warnings are errors then.

CXX, a command with its options, or else the C++ compiler beside CC, and CUDA_HOME choose the tools; CPPFLAGS,
CFLAGS, CXXFLAGS and LDFLAGS are added to their options, NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS by nvcc
itself, whose host compiler CUDAHOSTCXX or NVCC_CCBIN may choose. MAX_JOBS bounds parallel compilations.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xptxas=-warn-spills"]
CXX_STRICT, NVCC_STRICT = ["-Werror"], ["--Werror", "all-warnings", "-Xcompiler=-Werror"]
PLUS_PLUS = {"cc": "c++", "gcc": "g++", "clang": "clang++"}
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # before a compiler in CXX
SASS_ARCHS = ("80", "90a", "100a")
RECORD = (
    "_native_missing.txt"  # beside moebert_kernels._native, in its place; moebert_kernels.native reads it
)
PTX_ARCH = "100"  # for what is newer than the last of SASS_ARCHS


@dataclass(frozen=True)
class Missing:
    """A part that cannot be built, and the reason as a clause."""

    reason: str


@dataclass(frozen=True)
class Cxx:
    """A C++ compiler's command, the user's options for it, ninja, and the headers they need."""

    command: tuple[str, ...]
    options: tuple[str, ...]
    link_options: tuple[str, ...]
    ninja: str
    includes: tuple[str, ...]


@dataclass(frozen=True)
class Cuda:
    """An nvcc and what it can target."""

    nvcc: str
    version: str
    libraries: str
    gencode: tuple[str, ...]
    archs: tuple[str, ...]


def words(variable: str) -> list[str]:
    """The words of a command, or of its options, that an environment variable holds; none if it is not set.

    Raises:
        ValueError: a quotation mark is not closed.
    """
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise ValueError(f"{variable}={os.environ[variable]} is no command line: {error}") from None


def beside_cc() -> list[list[str]]:
    """The C++ compiler that belongs to CC, such as clang++-18 to clang-18, with CC's options."""
    if not words("CC"):
        return []
    launcher, (compiler, *options) = split_launcher(words("CC"))
    folder, name = os.path.split(compiler)
    sibling = re.sub(r"(?:(?<=-)|^)(gcc|clang|cc)(?=-|$)", lambda match: PLUS_PLUS[match[1]], name)
    return [] if sibling == name else [[*launcher, os.path.join(folder, sibling), *options]]


def split_launcher(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the compiler in a command, such as ccache, and the rest."""
    begin = 1 if len(command) > 1 and Path(command[0]).name in LAUNCHERS else 0
    return list(command[:begin]), list(command[begin:])


def find_cxx() -> Cxx | Missing:
    """What the C++ part needs, or the first thing that is missing."""
    try:
        candidates = [words("CXX")] if words("CXX") else [*beside_cc(), ["c++"], ["g++"], ["clang++"]]
        options = [*words("CPPFLAGS"), *words("CFLAGS"), *words("CXXFLAGS")]
        link_options = words("LDFLAGS")
    except ValueError as error:
        return Missing(str(error))
    command = next(((path, *rest) for name, *rest in candidates if (path := shutil.which(name))), None)
    if command is None:
        return Missing(f"no C++ compiler found (looked for {', '.join(name for name, *_ in candidates)})")
    python_include = sysconfig.get_paths()["include"]
    if not Path(python_include, "Python.h").exists():
        return Missing(f"Python.h is not in {python_include} (install Python's development headers)")
    try:
        import ninja
        import pybind11
    except ImportError as error:
        return Missing(f"the build requirement {error.name} is not installed")
    includes = (python_include, pybind11.get_include())
    return Cxx(command, tuple(options), tuple(link_options), str(Path(ninja.BIN_DIR, "ninja")), includes)


def find_cuda() -> Cuda | Missing:
    """The nvcc of CUDA_HOME, of PATH, or of /usr/local/cuda, in this order."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=str(Path(home, "bin")))
        where = f"CUDA_HOME={home}"
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        where = "PATH or /usr/local/cuda"
    if nvcc is None:
        return Missing(f"no nvcc found in {where}")
    try:
        # nvcc itself knows where its toolkit is, also when what PATH holds is a script that calls it.
        dryrun = subprocess.run(
            [nvcc, "-v", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
        codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return Missing(f"{nvcc} does not run ({error})")
    match_top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
    match_version = re.search(r"release ([\d.]+)", version)
    if match_top is None or match_version is None:
        return Missing(f"{nvcc} does not say where its toolkit is")
    top = Path(match_top[1].strip())
    candidates = [top / "lib64", top / "lib", *sorted(top.glob("targets/*/lib"))]
    libraries = next((path for path in candidates if (path / "libcudart_static.a").exists()), None)
    if libraries is None:
        return Missing(f"libcudart_static.a is not below {top}")
    known = codes.split()
    sass = [arch for arch in SASS_ARCHS if f"sm_{arch.rstrip('a')}" in known]
    ptx = PTX_ARCH if f"sm_{PTX_ARCH}" in known else max(sass, default="").rstrip("a")
    if not sass:
        return Missing(f"{nvcc} ({match_version[1]}) knows none of sm_{', sm_'.join(SASS_ARCHS)}")
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sass]
    gencode.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    archs = [f"sm_{arch}" for arch in sass] + [f"compute_{ptx}"]
    return Cuda(nvcc, match_version[1], str(libraries), tuple(gencode), tuple(archs))


def ninja_escape(path: str | Path) -> str:
    """A path as a ninja file's build line takes it."""
    return re.sub(r"([ :$])", r"$\1", str(path))


def ninja_command(*words: str) -> str:
    """A command line as a ninja file's rule takes it; $in, $out and $flags stay variables."""
    return " ".join(w if w in ("$in", "$out", "$out.d") else shlex.quote(w).replace("$", "$$") for w in words)


def host_compiler(cxx: Cxx) -> list[str]:
    """The options by which nvcc knows its host compiler: CUDAHOSTCXX, or the C++ compiler."""
    if os.environ.get("NVCC_CCBIN"):  # nvcc reads it itself
        return []
    if chosen := os.environ.get("CUDAHOSTCXX"):
        return [f"-ccbin={chosen}"]
    _, (compiler, *options) = split_launcher(cxx.command)
    return [f"-ccbin={compiler}", *(f"-Xcompiler={option}" for option in options)]


def ninja_file(cxx: Cxx, cuda: Cuda | Missing, target: Path) -> str:
    """The build of `target`, objects beside the file itself."""
    info = {"MOEBERT_CUDA_VERSION": "", "MOEBERT_CUDA_ARCHS": "", "MOEBERT_NO_CUDA_REASON": ""}
    strict = bool(required_parts())  # elsewhere a compiler newer than this file may warn of what it likes
    defines = []
    sources = ["bindings.cpp", "parallel.cpp", "plan_cpu.cpp", "rows_cpu.cpp"]
    sources += ["rows_baseline.cpp", "rows_avx2.cpp", "rows_avx512.cpp"]
    link = ["-shared", "-Wl,--strip-all", "-Wl,--exclude-libs,ALL", "-pthread", "-ldl"]
    rules = []
    if isinstance(cuda, Cuda):
        info |= {"MOEBERT_CUDA_VERSION": cuda.version, "MOEBERT_CUDA_ARCHS": " ".join(cuda.archs)}
        defines = ["-DMOEBERT_WITH_CUDA"]
        sources.append("plan_cuda.cu")
        # The static runtime opens the driver when first used: importing needs neither driver nor toolkit.
        link += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt"]
        host_flags = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
        nvcc = ninja_command(
            cuda.nvcc,
            *host_compiler(cxx),
            *NVCC_FLAGS,
            *(NVCC_STRICT if strict else ()),
            host_flags,
            *cuda.gencode,
            "-MMD",
            "-MF",
            "$out.d",
        )
        rules += ["rule nvcc", f"  command = {nvcc} -c $in -o $out", "  depfile = $out.d", ""]
    else:
        info["MOEBERT_NO_CUDA_REASON"] = f"built without CUDA: {cuda.reason}"
    defines += [f'-D{name}="{value}"' for name, value in info.items()]
    includes = [word for path in cxx.includes for word in ("-isystem", path)]
    flags = [*CXX_FLAGS, *(CXX_STRICT if strict else ()), *defines, *includes, *cxx.options]
    compile_cxx = ninja_command(*cxx.command, *flags, "-MMD", "-MF", "$out.d")
    rules += ["rule cxx", f"  command = {compile_cxx} -c $in -o $out", "  depfile = $out.d", ""]
    rules += [
        "rule link",
        f"  command = {ninja_command(*cxx.command)} $in -o $out {ninja_command(*link, *cxx.link_options)}",
        "",
    ]
    objects = [source.replace(".", "_") + ".o" for source in sources]
    for source, obj in zip(sources, objects, strict=True):
        rules.append(
            f"build {obj}: {'nvcc' if source.endswith('.cu') else 'cxx'} {ninja_escape(CSRC / source)}"
        )
    rules += [f"build {ninja_escape(target)}: link {' '.join(objects)}", ""]
    return "\n".join(rules)


def say(message: str) -> None:
    """One line of the build's log; pip shows it with -v, and all of it where a build fails."""
    print(f"moebert_kernels: {message}", file=sys.stderr, flush=True)


def required_parts() -> set[str]:
    """The parts that MOEBERT_REQUIRE_NATIVE demands."""
    value = os.environ.get("MOEBERT_REQUIRE_NATIVE", "")
    if value not in ("", "cpu", "cuda"):
        raise SystemExit(f'MOEBERT_REQUIRE_NATIVE is {value!r}, expected "cpu", "cuda" or nothing')
    return {"": set(), "cpu": {"cpu"}, "cuda": {"cpu", "cuda"}}[value]


def record_missing(root: Path, reason: str | None) -> None:
    """Leave in the package below `root` why it has no native module, for `moebert env`; None if it has."""
    package = root / "moebert_kernels"
    if reason is None:
        (package / RECORD).unlink(missing_ok=True)
    else:
        package.mkdir(parents=True, exist_ok=True)
        (package / RECORD).write_text(f"{reason}\n", encoding="utf-8")


class BuildNative(build_ext):
    """Tries C++ and CUDA, then C++ alone, then goes on without."""

    def run(self) -> None:
        """Build, and leave the module or the record of why there is none."""
        cxx = find_cxx()
        self.missing = cxx.reason if isinstance(cxx, Missing) else None
        in_source = self.inplace or self.editable_mode  # setuptools clears it while it builds
        super().run()
        record_missing(ROOT if in_source else Path(self.build_lib), self.missing)

    def build_extension(self, ext: Extension) -> None:
        """Leave the module where setuptools expects it, or nothing."""
        cxx, cuda = find_cxx(), find_cuda()
        assert isinstance(cxx, Cxx)  # otherwise there is no extension to build
        if isinstance(cuda, Missing) and "cuda" in required_parts():
            raise SystemExit(f"moebert_kernels: MOEBERT_REQUIRE_NATIVE=cuda, but {cuda.reason}")
        if isinstance(cuda, Cuda):
            say(f"building C++ ({shlex.join(cxx.command)}) and CUDA {cuda.version} ({' '.join(cuda.archs)})")
            if self.run_ninja(ext, cxx, cuda):
                return
            if "cuda" in required_parts():
                raise SystemExit("moebert_kernels: the CUDA build failed; its output is above")
            say("WARNING: the CUDA build FAILED (its output is above); going on with C++ alone")
            cuda = Missing("its build failed")
        say(f"building C++ alone ({shlex.join(cxx.command)}); {cuda.reason}")
        if self.run_ninja(ext, cxx, cuda):
            return
        if "cpu" in required_parts():
            raise SystemExit("moebert_kernels: the C++ build failed; its output is above")
        say(
            "WARNING: the C++ build FAILED (its output is above); installing pure Python: correct, but slower"
        )
        self.missing = f"its build with {shlex.join(cxx.command)} failed; `pip install -v` shows the errors"

    def run_ninja(self, ext: Extension, cxx: Cxx, cuda: Cuda | Missing) -> bool:
        """Build the module with these parts; its output goes to the log."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        directory = Path(self.build_temp).resolve() / ("cuda" if isinstance(cuda, Cuda) else "cpu")
        directory.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        (directory / "build.ninja").write_text(ninja_file(cxx, cuda, target))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        return subprocess.run([cxx.ninja, "-C", str(directory), *jobs], stdout=sys.stderr).returncode == 0


class BuildPython(build_py):
    """Says why, where nothing native will be built."""

    def run(self) -> None:
        """Copy the Python files, after the one line about what is missing."""
        cxx = find_cxx()
        if isinstance(cxx, Missing):
            if required_parts():
                raise SystemExit(f"moebert_kernels: MOEBERT_REQUIRE_NATIVE is set, but {cxx.reason}")
            say(f"installing pure Python (correct, but slower): {cxx.reason}")
        super().run()
        if isinstance(cxx, Missing):
            record_missing(ROOT if self.editable_mode else Path(self.build_lib), cxx.reason)


if __name__ == "__main__":
    extension = Extension("moebert_kernels._native", ["csrc/bindings.cpp"], optional=True)
    setup(
        ext_modules=[] if isinstance(find_cxx(), Missing) else [extension],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    )
