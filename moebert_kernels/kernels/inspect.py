"""Compile every committed config for each GPU generation, with no GPU, and read the binaries.

    python -m moebert_kernels.kernels.inspect [sm_80 sm_90 sm_100]

prints, for each kernel, config and architecture: registers, spilled bytes, shared memory, how many programs
fit one multiprocessor, and which matrix instructions came out. What is compiled is what production launches:
the operators run on meta tensors and their launches are recorded and bound by Triton's own specialisation.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from moebert_kernels.kernels import configs, ffn
from moebert_kernels.kernels.configs import Config
from moebert_kernels.kernels.launch import Launch, recorded


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor and one program of it may use."""

    capability: int
    shared_per_program: int
    shared_per_multiprocessor: int
    matrix_instruction: str


ARCHITECTURES = {
    "sm_80": Limits(80, 163 * 1024, 164 * 1024, "mma.sync"),
    "sm_90": Limits(90, 227 * 1024, 228 * 1024, "wgmma"),
    "sm_100": Limits(100, 227 * 1024, 228 * 1024, "tcgen05"),
}
_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32  # of one multiprocessor, all three generations


@dataclass(frozen=True)
class Reading:
    """One kernel's binary for one architecture."""

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs: int
    instructions: tuple[str, ...]


def read(launch: Launch, arch: str) -> Reading:
    """Compile one recorded launch for `arch` and read what came out."""
    limits = ARCHITECTURES[arch]
    target = GPUTarget("cuda", limits.capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    options = {"debug": False, "instrumentation_mode": ""}
    bound, specialization, extra = binder(**launch.arguments, **options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, {**extra, **options}, bound, specialization, extra
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=parsed.__dict__)
    registers, spilled = _resources(binary.asm["cubin"])
    warps = binary.metadata.num_warps
    shared = binary.metadata.shared
    per_thread = -(-registers // 8) * 8
    programs = min(
        _REGISTERS // (per_thread * 32 * warps),
        limits.shared_per_multiprocessor // (shared + 1024),
        _WARPS // warps,
        _PROGRAMS,
    )
    ptx = binary.asm["ptx"]
    instructions = tuple(name for name, mark in _INSTRUCTIONS.items() if mark in ptx)
    return Reading(launch.kernel.__name__, arch, registers, spilled, shared, programs, instructions)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which these kernels only use to spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text}")
    return int(found[1]), int(found[2])


def launches(
    config: Config, dtype: torch.dtype, *, T: int = 4096, D: int = 768, F: int = 768, E: int = 4, K: int = 1
) -> list[Launch]:
    """What a training step with a gate and biases launches, or with `dense_slots` >= T inference."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w1, b1, w2, b2 = meta(T, D), meta(E, F, D), meta(E, F), meta(E, D, F), meta(E, D)
    order, offsets = meta(T * K, dtype=torch.int32), meta(E + 1, dtype=torch.int32)
    gate = meta(T, K, dtype=torch.float32)
    call = (order, offsets, w1, b1, w2, b2, gate, "gelu", K, False)
    with recorded() as record:
        train = config.dense_slots < T * K
        _, preact = ffn.expert_ffn_forward(x, *call, train, config=config)
        if train:
            ffn.expert_ffn_backward(x, x, preact, *call, [True] * 6, config=config)
    return record
