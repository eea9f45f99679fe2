"""The committed tuning table: tile shapes by device family, arithmetic and rows per expert.

Nothing is tuned at run time. `python -m bench.tune` measures the candidates on a GPU and prints this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile and how it is compiled; the epilogue takes its columns in `parts`."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1


@dataclass(frozen=True)
class Config:
    """Everything that is chosen for one call.

    Attributes:
        up, down: the forward GEMMs, with W1 and with W2.
        down_backward, up_backward: the GEMMs of the data gradients, with W2 and with W1.
        weight_grad: the GEMMs of both weight gradients; m and n are sides of dW, k counts tokens.
        stream_k: split the weight gradients' token loops evenly over the multiprocessors.
        tma: load weights, and rows that are sorted already, through TMA descriptors.
        dense_slots: with at most this many slots, inference runs all experts on all tokens and masks.
    """

    up: Tile
    down: Tile
    down_backward: Tile
    up_backward: Tile
    weight_grad: Tile
    stream_k: bool = False
    tma: bool = False
    dense_slots: int = 0


FAMILIES = ("sm_80", "sm_90", "sm_100", "default")
ARITHMETICS = ("half", "tf32", "ieee")
SIZES = {"small": 128, "medium": 2048, "large": None}  # rows per expert, at most


def _same(tile: Tile, weight_grad: Tile, **options) -> Config:
    return Config(tile, tile, tile, tile, weight_grad, **options)


_IEEE = _same(Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3))
_SAFE = _same(Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2))
TABLE: dict[tuple[str, str, str], Config] = {}


def select(device: torch.device, dtype: torch.dtype, num_slots: int, num_experts: int) -> Config:
    """The config of a call, from what is known without asking the device."""
    rows = num_slots / num_experts
    size = next(name for name, most in SIZES.items() if most is None or rows <= most)
    return TABLE.get((family(device), arithmetic(dtype), size), _SAFE)


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
