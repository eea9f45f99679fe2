"""Compile every committed config for each GPU generation, with no GPU, and read the binaries.

    python -m bench.binaries [sm_80 sm_90 sm_100]

prints, for each kernel, config and architecture: registers, spilled bytes, shared memory, how many programs
fit one multiprocessor, which matrix instructions came out, whether the assembler had to serialise them, how
often they are waited for, and how many instructions an element costs after the last of them; it exits with 1
if anything spills or does not fit. What is compiled is what production launches, in every variant: the
operators run on meta tensors and their launches are recorded and bound by Triton's own specialisation.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from moebert_kernels.kernels.call import Call
from moebert_kernels.kernels.triton import configs, ffn, norm
from moebert_kernels.kernels.triton.configs import Config
from moebert_kernels.kernels.triton.launch import Launch, recorded

from .machine_code import Instructions


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
    """One kernel's binary for one architecture.

    Attributes:
        kernel, arch: which.
        registers: of a thread.
        spilled_bytes: that a thread stores for want of registers.
        shared_bytes: of a program.
        programs: resident on a multiprocessor at once.
        instructions: kinds of matrix instructions.
        warnings: of the assembler by number; C75xx say that asynchronous products were serialised.
        waits: for asynchronous products: one in the loop, one after it; of warp-specialised kernels, those of
            both consumers.
        epilogue: instructions for each element of the tile after the last product; None without a product, of
            warp-specialised kernels, or where the machine code was not read.
        around: the products, a thread's instructions; None there too.
    """

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs: int
    instructions: tuple[str, ...]
    warnings: tuple[str, ...]
    waits: int
    epilogue: float | None
    around: Instructions | None


def _request(launch: Launch, arch: str) -> tuple[Any, GPUTarget, dict[str, Any]]:
    """What Triton compiles for a recorded launch: source, target and options."""
    target = GPUTarget("cuda", ARCHITECTURES[arch].capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    options = {"debug": False, "instrumentation_mode": ""}
    bound, specialization, extra = binder(**launch.arguments, **options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, {**extra, **options}, bound, specialization, extra
    )
    kind = ASTSource
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    return kind(launch.kernel, signature, constants, attributes), target, parsed.__dict__


def compiled(launch: Launch, arch: str) -> Any:
    """One recorded launch, compiled for `arch` by Triton."""
    source, target, options = _request(launch, arch)
    return triton.compile(source, target=target, options=options)


def key_of(launch: Launch, arch: str) -> str:
    """A key of that reading, made of Triton's own of the binary but for how Triton itself was built.

    Another one if anything differs that it depends on: the source of the kernel and of all that it calls, and
    the line where it stands; what is known of its arguments; options; the versions of Triton and ptxas; and
    what a multiprocessor has.
    """
    source, target, options = _request(launch, arch)
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    has = (ARCHITECTURES[arch], configs.REGISTERS, _WARPS, _PROGRAMS, _TENSOR_COLUMNS)
    parts = triton.__version__, source.hash(), backend.hash(), parsed.hash(), str(has)
    return sha256("-".join(parts).encode()).hexdigest()


def read(launch: Launch, arch: str, *, code: bool = True) -> Reading:
    """Compile one recorded launch for `arch` and read what came out, with `code` the machine code too."""
    limits = ARCHITECTURES[arch]
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # what is in the cache, no assembler speaks of
        binary = compiled(launch, arch)
    ptx, messages = binary.asm["ptx"], said.getvalue()
    registers, spilled = (
        _number(rf, messages) for rf in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
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
    # Of groups of warps, each has code of its own, one after the other's.
    lines = _disassemble(binary.asm["cubin"]) if code and not launch.kernel.is_gluon() else []
    products = [i for i, line in enumerate(lines) if line.is_product]
    after = len(lines) - 1 - products[-1] if products else None
    depth = launch.arguments.get("K", launch.arguments.get("D", 0))
    step = launch.arguments.get("BLOCK_K")
    tile = launch.arguments.get("BLOCK_M", 1) * launch.arguments.get("BLOCK_N", 1)
    return Reading(
        launch.kernel.__name__,
        arch,
        registers,
        spilled,
        shared,
        programs,
        instructions=tuple(name for name, mark in _INSTRUCTIONS.items() if mark in ptx),
        warnings=tuple(sorted(set(re.findall(r"\bC\d{4}\b", messages)))),
        waits=ptx.count("wgmma.wait_group"),
        epilogue=None if after is None else after * 32 * warps / tile,
        around=_around(lines, products, depth // step) if products and step else None,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas printed no resource usage: {text}")
    return int(found[1])


@dataclass(frozen=True)
class _Line:
    """One instruction, and the number of the one that it jumps to."""

    name: str
    target: int | None

    @property
    def is_product(self) -> bool:
        return self.name.endswith("MMA") and self.name != "FFMA"

    @property
    def is_memory(self) -> bool:
        return self.name.startswith(("LD", "ST", "SHFL", "ATOM", "RED")) and self.name != "LDGDEPBAR"


def _disassemble(cubin: bytes) -> list[_Line]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: list[tuple[str, re.Match[str] | None]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif one := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)(.*)", line):
            found.append((one[1], re.search(r"\.L_x_\d+", one[2]) if one[1] == "BRA" else None))
    return [_Line(name, None if label is None else labels.get(label[0])) for name, label in found]


def _around(code: list[_Line], products: list[int], steps: int) -> Instructions:
    """Of a loop that is unrolled whole, `steps` times, each step but the first is counted."""
    loops = [(line.target, i) for i, line in enumerate(code) if line.target is not None and line.target < i]
    ours = [(begin, end) for begin, end in loops if any(begin <= i <= end for i in products)]
    if ours:
        first, last = min(ours, key=lambda loop: loop[1] - loop[0])
        step = float(last - first + 1)
    else:
        first, last = products[0], products[-1]
        step = (last - first) / max(1, steps - 1)
    after = code[last + 1 :]
    again = [code[begin : end + 1] for begin, end in loops if begin > last]
    repeated = max(again, key=len, default=[])
    return Instructions(
        first,
        round(step, 1),
        len(after),
        sum(line.is_memory for line in after),
        len(repeated),
        sum(line.is_memory for line in repeated),
    )


@dataclass(frozen=True)
class Variant:
    """A way in which the layer is called, which decides on what is compiled.

    Where tensors begin does not: see `replay.repeated` and `blocks.OF_PLAN`.
    """

    training: bool = True
    gate: bool = True
    bias: bool = True


FULL = Variant()
VARIANTS = tuple(Variant(*choice) for choice in product((True, False), repeat=3))


def launches(
    config: Config,
    dtype: torch.dtype,
    variant: Variant = FULL,
    *,
    T: int = 4096,
    D: int = 768,
    F: int = 768,
    E: int = 4,
    K: int = 1,
    C: int = 0,
) -> list[Launch]:
    """What a training step with norm and dropout launches, or inference; of F neurons C are shared."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    plan = (meta(*shape, dtype=torch.int32) for shape in ((T, K), (T * K,), (T * K,), (E + 1,)))
    ids, order, inverse, offsets = plan
    b1, b2 = (meta(E, F - C), meta(E, D)) if variant.bias else (None, None)
    gate = meta(T, K, dtype=torch.float32) if variant.gate else None
    plain = Call(meta(T, D), ids, order, inverse, offsets, meta(E, F - C, D), b1, meta(E, D, F - C), b2, gate)
    if C:
        shared_b1 = meta(C) if variant.bias else None
        plain = plain._replace(shared_w1_CD=meta(C, D), shared_b1_C=shared_b1, shared_w2_DC=meta(D, C))
    ln = meta(E, D, dtype=torch.float32)
    normed = plain._replace(ln_w_ED=ln, ln_b_ED=ln)
    if variant.training:
        normed = normed._replace(seed=meta(1, dtype=torch.int64), dropout_p=0.1)
    dy, z = meta(T, D), meta(T * K, D)
    with recorded() as record:
        _, hidden = ffn.expert_ffn_forward(plain, variant.training, config)
        _, stats = norm.expert_norm_forward(normed, z)
        if variant.training:
            needs = [True, True, variant.bias, True, variant.bias, variant.gate]
            ffn.expert_ffn_backward(plain, hidden, dy, needs, config=config)
            norm.expert_norm_backward(normed, z, stats, dy, variant.gate)
    return record


ELEMENT = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


def distinct_launches(
    family: str,
    arithmetics: tuple[str, ...] = configs.ARITHMETICS,
    variants: Iterable[Variant] = (FULL,),
    **sizes: int,
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
            for variant in variants:
                for launch in launches(config, ELEMENT[arithmetic], variant, **sizes):
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
            return v.dtype, v.data_ptr() % 16 == 0
        return (v.base.dtype, v.block_shape) if hasattr(v, "block_shape") else v

    return {name: value(v) for name, v in arguments.items()}


def readings(
    family: str,
    arithmetics: tuple[str, ...] = configs.ARITHMETICS,
    variants: Iterable[Variant] = (FULL,),
    *,
    code: bool = True,
    **sizes: int,
) -> Iterator[tuple[str, Reading]]:
    """Compile and read everything the table can launch on a device family."""
    for name, of_config in distinct_launches(family, arithmetics, variants, **sizes).items():
        for launch in of_config:
            yield name, read(launch, family, code=code)


def main(families: list[str]) -> int:
    """Print the table; return how many kernels spill or do not fit."""
    faults = 0
    line = "{:13} {:7} {:26} {:>9} {:>9} {:>8} {:>8} {:>5} {:>9}  {}"
    columns = (
        "config",
        "arch",
        "kernel",
        "registers",
        "spilled B",
        "shared B",
        "programs",
        "waits",
        "epilogue",
    )
    print(line.format(*columns, "epilogue", "matrix"))
    for family in families or ARCHITECTURES:
        for name, r in readings(family, variants=VARIANTS):
            epilogue = "-" if r.epilogue is None else f"{r.epilogue:.1f}"
            sizes = (r.registers, r.spilled_bytes, r.shared_bytes, r.programs, r.waits, epilogue)
            matrix = ", ".join((*r.instructions, *(f"ptxas warns {number}" for number in r.warnings)))
            print(line.format(name, r.arch, r.kernel, *sizes, matrix), flush=True)
            faults += r.spilled_bytes > 0 or r.programs < 1
    return faults


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
