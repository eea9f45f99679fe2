"""The committed tuning table: tile shapes by device family, arithmetic and rows per expert.

Nothing is tuned at run time. `python -m bench.tune` measures the candidates on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile and how it is compiled.

    The epilogue takes its columns in `parts`; a streamed kernel has so many programs `per_multiprocessor`.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    per_multiprocessor: int = 1


@dataclass(frozen=True)
class Config:
    """Everything that is chosen for one call.

    Attributes:
        up, down: the forward GEMMs, with W1 and with W2.
        down_backward, up_backward: the GEMMs of the data gradients, with W2 and with W1.
        weight_grad: the GEMMs of both weight gradients; m and n are sides of dW, k counts tokens.
        weight_grad_unaligned: the tile in place of `weight_grad` for rows that cannot be loaded 16 bytes at a
            time, which takes more registers and shared memory; None for the same.
        stream_k: split the weight gradients' token loops evenly over the multiprocessors.
        tma: load what is not gathered through TMA descriptors where the rows are sorted already; where they
            are gathered, pointers were as fast or faster.
        specialised: the GEMMs, by their names above, that warp-specialised kernels take where a call fits
            them (`hopper`), with a tile of their own; `up` in inference alone.
    """

    up: Tile
    down: Tile
    down_backward: Tile
    up_backward: Tile
    weight_grad: Tile
    weight_grad_unaligned: Tile | None = None
    stream_k: bool = False
    tma: bool = False
    specialised: tuple[str, ...] = ()


FAMILIES = ("sm_80", "sm_90", "sm_100", "default")
ARITHMETICS = ("half", "tf32", "ieee")
REGISTERS = 65536  # of a multiprocessor, in all three generations
SIZES = {"tiny": 32, "small": 128, "medium": 2048, "large": None}  # rows per expert, at most


def _config(
    gemm: Tile,
    weight_grad: Tile,
    down_backward: Tile | None = None,
    up_backward: Tile | None = None,
    up: Tile | None = None,
    **options,
) -> Config:
    return Config(up or gemm, gemm, down_backward or gemm, up_backward or gemm, weight_grad, **options)


SAFE = _config(
    Tile(64, 64, 32, 4, 2, parts=4), Tile(64, 64, 32, 8, 3), down_backward=Tile(64, 32, 32, 4, 2, parts=2)
)
_IN_HALVES, _IN_QUARTERS = (Tile(64, 64, 32, 4, 3, parts=parts) for parts in (2, 4))
_IEEE = Config(
    up=_IN_HALVES,
    down=_IN_QUARTERS,
    down_backward=_IN_HALVES,
    up_backward=_IN_QUARTERS,
    weight_grad=Tile(64, 64, 32, 8, 5),
)

TABLE: dict[tuple[str, str, str], Config] = {
    # Ampere and Ada. 99 KiB of shared memory is what 8.6 and 8.9 have.
    ("sm_80", "half", "small"): _config(Tile(64, 64, 64, 4, 4, parts=2), Tile(64, 128, 32, 4, 7)),
    ("sm_80", "half", "medium"): _config(
        Tile(64, 128, 64, 4, 4, parts=4),
        Tile(64, 128, 32, 4, 7),
        down_backward=Tile(64, 64, 64, 4, 4, parts=2),
    ),
    ("sm_80", "half", "large"): _config(
        Tile(128, 128, 64, 8, 3, parts=4),
        Tile(128, 128, 32, 8, 7),
        down_backward=Tile(64, 64, 64, 4, 4, parts=2),
        stream_k=True,
    ),
    ("sm_80", "tf32", "small"): _config(
        Tile(64, 64, 32, 4, 4, parts=4),
        Tile(64, 64, 32, 4, 5),
        down_backward=Tile(64, 64, 32, 4, 4, parts=2),
        up=Tile(64, 64, 32, 4, 4, parts=2),
    ),
    ("sm_80", "tf32", "medium"): _config(Tile(64, 128, 32, 4, 4, parts=4), Tile(64, 64, 32, 4, 5)),
    ("sm_80", "tf32", "large"): _config(
        Tile(128, 128, 32, 8, 3, parts=4), Tile(64, 128, 32, 8, 4), stream_k=True
    ),
    # Hopper: half measured on an H200 (tiles.jsonl and specialised.jsonl of bench/results/h200)
    ("sm_90", "half", "tiny"): _config(Tile(32, 32, 64, 4, 6), Tile(128, 128, 64, 8, 5), tma=True),
    ("sm_90", "half", "small"): _config(
        Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 5), up=Tile(64, 32, 64, 4, 4), tma=True
    ),
    ("sm_90", "half", "medium"): _config(
        Tile(128, 64, 64, 4, 3, parts=2),
        Tile(128, 128, 64, 8, 5),
        down_backward=Tile(128, 64, 64, 4, 3),
        up_backward=Tile(64, 128, 64, 4, 3, parts=4),
        tma=True,
    ),
    ("sm_90", "half", "large"): _config(
        Tile(128, 128, 64, 8, 3, parts=2),
        Tile(128, 256, 64, 8, 5),
        weight_grad_unaligned=Tile(128, 128, 64, 8, 5),
        up_backward=Tile(128, 128, 64, 8, 3, parts=4),
        stream_k=True,
        tma=True,
        specialised=("up", "down", "down_backward", "up_backward"),
    ),
    ("sm_90", "tf32", "small"): _config(Tile(64, 64, 32, 4, 4, parts=2), Tile(64, 64, 32, 4, 4)),
    ("sm_90", "tf32", "medium"): _config(Tile(64, 128, 32, 4, 4, parts=4), Tile(64, 128, 32, 4, 4)),
    ("sm_90", "tf32", "large"): _config(
        Tile(128, 128, 32, 8, 4, parts=4), Tile(128, 128, 32, 8, 4), stream_k=True
    ),
    # Blackwell
    ("sm_100", "half", "small"): _config(Tile(64, 64, 64, 4, 5, parts=4), Tile(128, 128, 64, 8, 3), tma=True),
    ("sm_100", "half", "medium"): _config(
        Tile(128, 128, 64, 8, 3, parts=4), Tile(128, 128, 64, 8, 3), tma=True
    ),
    ("sm_100", "half", "large"): _config(
        Tile(128, 256, 64, 8, 4, parts=4),
        Tile(128, 128, 64, 8, 4),
        down_backward=Tile(128, 128, 64, 8, 3, parts=4),
        stream_k=True,
        tma=True,
    ),
    ("sm_100", "tf32", "small"): _config(
        Tile(64, 64, 32, 4, 4, parts=2), Tile(64, 64, 32, 4, 4), up=Tile(64, 64, 32, 4, 4, parts=4)
    ),
    ("sm_100", "tf32", "medium"): _config(Tile(64, 128, 32, 4, 4, parts=4), Tile(64, 128, 32, 4, 4)),
    ("sm_100", "tf32", "large"): _config(
        Tile(128, 128, 32, 8, 4, parts=4), Tile(128, 128, 32, 8, 4), stream_k=True
    ),
    # On the CUDA cores the 64 x 64 tiles of dW are many enough without streaming.
    **{(family, "ieee", size): _IEEE for family in ("sm_80", "sm_90", "sm_100") for size in SIZES},
}


def select(device: torch.device, dtype: torch.dtype, num_slots: int, num_experts: int) -> Config:
    """The config of a call, from what is known without asking the device."""
    rows = num_slots / num_experts
    key = family(device), arithmetic(dtype)
    # Where a size has no entry of its own, the next larger one's serves.
    fitting = (TABLE.get((*key, size)) for size, most in SIZES.items() if most is None or rows <= most)
    return next(filter(None, fitting), SAFE)


def arithmetic(dtype: torch.dtype) -> str:
    """ "half" for 16-bit types; float32 is "tf32" or "ieee" as torch's own matmul would be."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` is to multiply."""
    return "tf32" if arithmetic(dtype) == "tf32" else "ieee"


@cache
def family(device: torch.device) -> str:
    """The row of the table a device belongs to."""
    if device.type != "cuda":
        return "default"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "default")


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs fill the device; a small number where it is only simulated."""
    if device.type != "cuda":
        return 5
    return torch.cuda.get_device_properties(device).multi_processor_count
