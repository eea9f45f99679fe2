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

from moebert_kernels.kernels import configs, ffn, norm
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
    "sm_80": Limits(80, 99 * 1024, 164 * 1024, "mma.sync"),  # 99 KiB: 8.6 and 8.9 use this family too
    "sm_90": Limits(90, 227 * 1024, 228 * 1024, "wgmma"),
    "sm_100": Limits(100, 227 * 1024, 228 * 1024, "tcgen05"),
}
_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
# Of one multiprocessor, the same in all three generations; tensor memory is Blackwell's.
_WARPS, _PROGRAMS, _TENSOR_COLUMNS = 64, 32, 512


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
    columns = binary.metadata.tmem_size
    programs = min(
        configs.REGISTERS // (per_thread * 32 * warps),
        limits.shared_per_multiprocessor // (shared + 1024),
        _WARPS // warps,
        _TENSOR_COLUMNS // columns if columns else _PROGRAMS,
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
    """What a training step with gate, biases, norm and dropout launches, and inference on few tokens."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    w1, b1, w2, b2 = meta(E, F, D), meta(E, F), meta(E, D, F), meta(E, D)
    ln = meta(E, D, dtype=torch.float32)
    offsets, seed = meta(E + 1, dtype=torch.int32), meta(1, dtype=torch.int64)

    def call(T: int) -> list[Any]:
        order, gate = meta(T * K, dtype=torch.int32), meta(T, K, dtype=torch.float32)
        return [order, offsets, w1, b1, w2, b2, gate, "gelu", K, False]

    with recorded() as record:
        x, z, ids = meta(T, D), meta(T * K, D), meta(T, K, dtype=torch.int32)
        order, gate = call(T)[0], call(T)[6]
        _, preact = ffn.expert_ffn_forward(x, *[*call(T), True, config])
        ffn.expert_ffn_backward(x, x, preact, *[*call(T), [True] * 6, config])
        norm_call = (ids, order, offsets, ln, ln, gate, seed)
        _, mean, rstd = norm.expert_norm_forward(z, x, *norm_call, 1e-12, 0.1)
        norm.expert_norm_backward(x, z, x, mean, rstd, *norm_call, 0.1, True)
        few = config.dense_slots // K
        if few:
            ffn.expert_ffn_forward(meta(few, D), *[*call(few), False, config])
    return record


ELEMENT = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


def distinct_launches(
    family: str, arithmetics: tuple[str, ...] = configs.ARITHMETICS, **sizes: int
) -> dict[str, list[Launch]]:
    """The launches of every config of a device family, by "arithmetic/size"; each that differs once.

    `sizes` are those of `launches`, BERT-base's by default.
    """
    found: dict[str, list[Launch]] = {}
    seen = set()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        table = configs.TABLE | {(family, "half", "safe"): configs.SAFE}
        for (of_family, arithmetic, size), config in table.items():
            if of_family != family or arithmetic not in arithmetics:
                continue
            torch.backends.cuda.matmul.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"
            fresh = []
            for launch in launches(config, ELEMENT[arithmetic], **sizes):
                key = repr((launch.kernel.__name__, _values(launch.arguments)))
                if key not in seen:
                    seen.add(key)
                    fresh.append(launch)
            found[f"{arithmetic}/{size}"] = fresh
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return found


def _values(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with tensors reduced to what compilation sees of them."""

    def value(v: Any) -> Any:
        if isinstance(v, torch.Tensor):
            return v.dtype
        return (v.base.dtype, v.block_shape) if hasattr(v, "block_shape") else v

    return {name: value(v) for name, v in arguments.items()}


def readings(
    family: str, arithmetics: tuple[str, ...] = configs.ARITHMETICS, **sizes: int
) -> Iterator[tuple[str, Reading]]:
    """Compile and read everything the table can launch on a device family."""
    for name, of_config in distinct_launches(family, arithmetics, **sizes).items():
        for launch in of_config:
            yield name, read(launch, family)


def main(families: list[str]) -> None:
    """Print the table."""
    columns = ("config", "arch", "kernel", "registers", "spilled B", "shared B", "programs", "matrix")
    print("{:13} {:7} {:26} {:>9} {:>9} {:>9} {:>8}  {}".format(*columns))
    for family in families or ARCHITECTURES:
        for name, r in readings(family):
            print(
                f"{name:13} {r.arch:7} {r.kernel:26} {r.registers:9} {r.spilled_bytes:9} "
                f"{r.shared_bytes:9} {r.programs:8}  {', '.join(r.instructions)}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
