"""The parts of a session on a GPU that are benchmarks of this package: what they measure, what they print.

python -m bench.gpu_parts ffn --out DIR --seconds 90 [--peer-path DIR] [--toy]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from moebert_kernels.environment import describe_environment

from . import ceilings
from .cases import TOY, Request
from .ffn import BOUND, DENSE, FFN, OURS, TIED
from .gpu import NO_DEVICE
from .registry import Op
from .results import Row, Run, write
from .run import Settings, start
from .tables import duration, half_width
from .targets import target_of

TOKENS = (16384, 65536, 4096, 512, 64)  # those that matter most come first
_PASSES = ("forward", "forward+backward")
_PEERS = ("triton_kernels", "scattermoe")
_SHARE = 0.9  # of a part's time, after which nothing more is begun


def machine(options: argparse.Namespace) -> None:
    """Versions, the card, its ceilings; meanwhile the layer's kernels are unpacked and compiled."""
    device = torch.device("cpu" if options.toy else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; --dry-run needs none")
        sys.exit(NO_DEVICE)
    compiling = {name: _start(command) for name, command in _commands(options).items()}
    environment = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items() if version)
    print(
        f"Python {environment.python}, {versions}, commit {environment.commit}, {environment.cpu_count} CPUs"
    )
    for backend in environment.backends:
        print(f"{backend.name}: {'yes' if backend.usable else 'no'}, {backend.detail}", flush=True)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        print(
            f"{card.name}: {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} processors, "
            f"{card.L2_cache_size / 2**20:.0f} MiB of L2, CUDA {torch.version.cuda}"
        )
        if shutil.which("nvidia-smi"):
            wanted = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
            subprocess.run(["nvidia-smi", f"--query-gpu={wanted}", "--format=csv"], check=False)
    dtype = "float32" if options.toy else "bfloat16"
    found = ceilings.measure_ceilings((dtype,), device, ceilings.TOY if options.toy else None)[dtype]
    print(
        f"ceilings, {dtype}: {found.flops_per_s / 1e12:.4g} TFLOP/s, {found.bytes_per_s / 1e12:.3g} TB/s",
        flush=True,
    )
    failed = [name for name, started in compiling.items() if not _finished(name, *started)]
    if failed:
        sys.exit(f"not compiled: {', '.join(failed)}")


def _commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What is compiled meanwhile: kernels that no file brought, and the native extension that makes plans.

    Where one fails, kernels are compiled when first launched, and PyTorch makes the plans.
    """
    if options.toy:
        return {"kernels": ["-m", "bench.ahead", "--rehearse"]}
    brought = ["--unpack", options.kernels] if options.kernels else []
    return {
        "kernels": ["-m", "bench.ahead", *brought],
        "native extension": ["setup.py", "build_ext", "--inplace"],
    }


def _start(command: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes], float]:
    log = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=environment
    )
    return process, log, time.monotonic()


def _finished(name: str, process: subprocess.Popen[bytes], log: IO[bytes], began: float) -> bool:
    code = process.wait()
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    print(f"{name}: {'ready' if code == 0 else f'failed ({code})'}, {time.monotonic() - began:.0f} s")
    for line in lines[-2:] if code == 0 else lines[-20:]:
        print(f"  {line[:300]}", flush=True)
    return code == 0


def settings_of(options: argparse.Namespace, **chosen) -> Settings:
    """How every part measures; `chosen` goes over it."""
    settings = Settings(
        device="cuda",
        launches=("graph",),
        caches=("cold",),
        rounds=15,
        seconds=1.0,
        peer_path=options.peer_path,
    )
    settings = replace(settings, limit=_SHARE * options.seconds, **chosen)
    if not options.toy:
        return settings
    return replace(
        settings,
        request=TOY,
        device="cpu",
        launches=("eager",),
        caches=("warm",),
        rounds=2,
        probes=ceilings.TOY,
    )


def ffn(options: argparse.Namespace) -> None:
    """The layer in a graph on cold caches, beside what it replaces and the nearest peers."""
    only = (OURS, TIED, DENSE, BOUND, "GEMM per expert", "F.grouped_mm", "transformers grouped_mm")
    measure(
        FFN,
        settings_of(options, request=Request(T=TOKENS), passes=_PASSES, only=only),
        options.out,
        options.commit,
    )


def columns(options: argparse.Namespace) -> None:
    """The layer's other columns: eager calls, warm caches, other routings, the dispatch inside."""
    settings = settings_of(
        options,
        request=Request(T=(4096, 16384, 512, 64), routings=("balanced", "skewed")),
        passes=(*_PASSES, "dispatch+forward"),
        only=(OURS, TIED, DENSE, BOUND),
        launches=("eager", "graph"),
        caches=("warm",),
        seconds=0.3,
    )
    measure(FFN, settings, options.out, options.commit)


def peers(options: argparse.Namespace) -> None:
    """Peers whose sources were brought along, in a folder of their own beside the layer's figures."""
    settings = settings_of(options, request=Request(T=TOKENS), passes=_PASSES, only=(OURS, *_PEERS))
    measure(FFN, settings, Path(options.out) / "peers", options.commit)


def dispatch(options: argparse.Namespace) -> None:
    """From token ids to every layer's sorted order."""
    from .dispatch import DISPATCH

    measure(
        DISPATCH,
        settings_of(options, launches=("eager", "graph"), caches=("warm",)),
        options.out,
        options.commit,
    )


def model(options: argparse.Namespace) -> None:
    """Whole encoders."""
    from .model import MODEL

    modes = {"launches": ("graph", "eager"), "caches": ("warm",)}
    request = Request(T=(4096, 16384, 1024), dtypes=("bfloat16",))
    measure(
        MODEL, settings_of(options, request=request, passes=_PASSES, **modes), options.out, options.commit
    )


def measure(op: Op, settings: Settings, out: str | Path, commit: str | None) -> None:
    """Run a benchmark into its file and print each figure as it comes."""
    run, rows = start(op, settings)

    def told() -> Iterator[Row]:
        for row in rows:
            print(line(run, row), flush=True)
            yield row

    if commit:
        run = replace(run, environment=run.environment | {"commit": commit})
    print(write(out, run, told()))


def line(run: Run, row: Row) -> str:
    """One figure for the log, and for ours how far it is from the aim on this card."""
    sizes = [str(row.case[name]) for name in ("routing", "dtype") if name in row.case]
    mode = " ".join([row.pass_, *sizes, row.launch, row.cache])
    head = f"{run.device}: T={row.case['T']:<6} {mode:45} {row.entry:24}"
    if row.seconds is None:
        return f"{head} did not run: {row.did_not_run}"
    seconds = row.seconds.median
    text = f"{head} {duration(seconds):>8} ±{half_width(row.seconds):<4.0%} floor {duration(row.floor_s)}"
    if row.predicted_us is not None:
        text += f", predicted {duration(row.predicted_us * 1e-6)}"
    target = target_of(row.case["T"], row.pass_)
    aimed_at = row.entry == OURS and (row.launch, row.cache) == ("graph", "cold")
    aim_s = target.aim_s(row.floor_s) if target is not None and aimed_at else None
    return text if aim_s is None else f"{text}, aim {duration(aim_s)}: {seconds / aim_s:.2f} of it"


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    part.__name__: part for part in (machine, ffn, columns, peers, dispatch, model)
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description="One part of a session on a GPU.")
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", required=True, help="folder for result files")
    parser.add_argument("--seconds", type=float, required=True, help="after nine tenths, nothing is begun")
    parser.add_argument("--peer-path", help="folder with the sources of triton_kernels and scattermoe")
    parser.add_argument("--kernels", help="file of kernels compiled before, as bench.ahead packs them")
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument("--toy", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
