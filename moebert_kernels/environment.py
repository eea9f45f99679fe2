"""What a result was obtained with: versions, devices, and which backends can run here (or why not)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moebert_kernels import native

LEAST_CAPABILITY = (8, 0)  # of the devices that our Triton kernels are made for
BUSY = 0.25  # processors' worth of other work that is told
_PACKAGES = ("moebert-kernels", "torch", "triton", "transformers", "numpy", "datasets", "accelerate")


@dataclass(frozen=True)
class Backend:
    """One way to run the layer or its routing.

    Attributes:
        name: in plain words.
        usable: whether it runs here.
        detail: what it runs on, or what is missing.
    """

    name: str
    usable: bool
    detail: str


@dataclass(frozen=True)
class Environment:
    """Everything about this machine and installation that a measured figure depends on.

    `dataclasses.asdict` of it goes into results.json.

    Attributes:
        python: version of the interpreter.
        platform: operating system and architecture.
        versions: of the packages that matter; None for one that is not installed.
        cpu: the processor's name.
        threads: threads torch computes with on the CPU.
        cpu_count: processors this process may run on.
        devices: accelerators that torch sees, by name.
        commit: the git commit of this package's checkout, with "+changes" if files differ; None when it is
            installed.
        backends: in order of preference.
    """

    python: str
    platform: str
    versions: dict[str, str | None]
    cpu: str
    threads: int
    cpu_count: int
    devices: tuple[str, ...]
    commit: str | None
    backends: tuple[Backend, ...]


def describe_environment() -> Environment:
    """Look around; starts no computation on any device."""
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in _PACKAGES},
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        devices=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        commit=_commit(Path(__file__).resolve().parents[1]),
        backends=(
            _triton_backend(),
            *_native_backends(),
            Backend("PyTorch", True, "any device torch runs on"),
        ),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package == "moebert-kernels":  # run from a source tree that is not installed
        from moebert_kernels import __version__

        return __version__
    return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _triton_backend() -> Backend:
    name = "Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return Backend(name, False, "triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        built_for = (
            "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        )
        return Backend(name, False, built_for)
    problem = why_not_triton()
    if problem is not None:
        return Backend(name, False, problem)
    major, minor = torch.cuda.get_device_capability()
    return Backend(name, True, f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")


def why_not_triton(device: torch.device | None = None) -> str | None:
    """Why our Triton kernels do not run on a CUDA device, by default the current one; None if they do."""
    found = torch.cuda.get_device_capability(device)
    if found >= LEAST_CAPABILITY:
        return None
    least, has = (".".join(map(str, capability)) for capability in (LEAST_CAPABILITY, found))
    return f"needs compute capability {least}, {torch.cuda.get_device_name(device)} has {has}"


def _native_backends() -> tuple[Backend, ...]:
    status = native.status()
    return (
        Backend("Native routing plans, host", status.cpu, status.cpu_detail),
        Backend("Native routing plans, CUDA", status.cuda, status.cuda_detail),
        Backend("Native row kernels, CPU", status.cpu, status.rows_detail),
    )


class OtherWork:
    """Watches, from when it is made, what other processes do on this machine's processors.

    The load average would count what this process did in the last minute.
    """

    def __init__(self) -> None:
        self._ticks, self._own_s, self._start_s = _processor_times(), time.process_time(), time.monotonic()

    def busy_cpus(self) -> float | None:
        """Processors they kept busy since then, by the kernel's counters; None where nothing is counted."""
        ticks, passed_s = _processor_times(), time.monotonic() - self._start_s
        if self._ticks is None or ticks is None or sum(ticks) <= sum(self._ticks):
            return None
        spent = [late - early for early, late in zip(self._ticks, ticks, strict=True)]
        idle = sum(spent[3:5])  # idle, and waiting for a disk
        own = (time.process_time() - self._own_s) / passed_s
        return max(0.0, (os.cpu_count() or 1) * (1 - idle / sum(spent)) - own)


def busy_cpus(seconds: float = 0.2) -> float | None:
    """What `OtherWork` finds over a short sleep of this process."""
    others = OtherWork()
    time.sleep(seconds)
    return others.busy_cpus()


def _processor_times() -> list[int] | None:
    """user, nice, system, idle, iowait, irq, softirq, steal: of all processors, in ticks."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return [int(ticks) for ticks in file.readline().split()[1:9]]
    except OSError:
        return None
