"""What the machine reaches at best, measured in the same run: a large GEMM and a large copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import DTYPES
from .registry import Thunk, Work
from .timing import make_timer


@dataclass(frozen=True)
class Ceiling:
    """The measured limits for one dtype."""

    flops_per_s: float
    bytes_per_s: float

    def floor(self, work: Work) -> float:
        """Seconds below which `work` cannot be done: its roofline."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)


@dataclass(frozen=True)
class ProbeSizes:
    """How large the two probes are: side of the square matrices, bytes copied."""

    matrix: int
    copy: int


_GPU, _CPU = ProbeSizes(8192, 2**30), ProbeSizes(2048, 2**28)
TOY = ProbeSizes(64, 2**16)


def measure_ceilings(
    dtypes: tuple[str, ...], device: torch.device, sizes: ProbeSizes | None = None
) -> dict[str, Ceiling]:
    """Measure the ceilings of each dtype: the best of five, since nothing can be faster than the machine."""
    sizes = sizes or (_GPU if device.type == "cuda" else _CPU)
    bytes_per_s = 2 * sizes.copy / _best(_copy_of(sizes.copy, device), device)
    flops = 2 * sizes.matrix**3
    return {
        dtype: Ceiling(flops / _best(_gemm_of(sizes.matrix, DTYPES[dtype], device), device), bytes_per_s)
        for dtype in dtypes
    }


def _copy_of(size: int, device: torch.device) -> Thunk:
    source, target = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    return lambda: {"copy": target.copy_(source)}


def _gemm_of(side: int, dtype: torch.dtype, device: torch.device) -> Thunk:
    # Normal data: a GPU's clock depends on what it multiplies.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: {"product": a @ b.mT}


def _best(thunk: Thunk, device: torch.device) -> float:
    timer = make_timer(device, "eager", [thunk])
    return min(timer() for _ in range(5))
