"""What attention over windows of each size costs on this CPU: `python -m bench.windows`, two minutes.

One thread and some 768 rows a call, MiniLM's and BERT-base's heads. A line for each size: microseconds of one
head over one window, with a mask, forward by flash attention, and forward and backward with dropout. Below,
c0 + c2 n^2 that fits the sizes that 16 divides best, and how many times as long the others take, beside what
`moebert_kernels.models.windows` chooses by.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch.nn.functional import scaled_dot_product_attention

from moebert_kernels.models.windows import DROPOUT, FLASH, STEP

from .cases import DTYPES, cpu_dtypes

SIZES = (16, 24, 32, 40, 48, 60, 64, 96, 128, 192, 256)
HEADS, ROWS, HEAD_SIZES = 12, 768, (32, 64)


def block_us(size: int, head_size: int, dtype: torch.dtype, *, trains: bool, seconds: float) -> float:
    """The fastest of the calls that fit into `seconds`, divided by heads and windows."""
    count = max(1, ROWS // size)
    shape = (count, size, HEADS, head_size)
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_(trains) for _ in range(3))
    mask = torch.ones(count, 1, size, size, dtype=torch.bool)

    def call() -> None:
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1 if trains else 0.0)
        if trains:
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    return 1e6 * _fastest(call, seconds) / (count * HEADS)


def _fastest(call: Callable[[], None], seconds: float) -> float:
    call()
    fastest, until = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < until:
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def fit(sizes: Sequence[int], found_us: Sequence[float]) -> tuple[float, float, float]:
    """c0 and c2, not negative and of the least relative error, and by what the other sizes exceed them."""
    n, us = np.array(sizes, dtype=float), np.array(found_us)
    even = n % STEP == 0
    columns = np.stack([np.ones_like(n), n * n], 1)
    c0, c2 = nnls(columns[even] / us[even, None], np.ones(even.sum()))[0]
    ragged = us[~even] / (columns[~even] @ [c0, c2])
    return float(c0), float(c2), float(np.median(ragged)) if len(ragged) else 1.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each figure")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    kinds = [
        (dtype, head_size, trains)
        for trains in (False, True)
        for dtype in cpu_dtypes()
        for head_size in HEAD_SIZES
    ]
    names = [f"{dtype} d={d}{' trained' if trains else ''}" for dtype, d, trains in kinds]
    print(f"{'rows':>5} " + " ".join(f"{name:>22}" for name in names))
    found: list[list[float]] = [[] for _ in kinds]
    for size in SIZES:
        for us, (dtype, d, trains) in zip(found, kinds, strict=True):
            us.append(block_us(size, d, DTYPES[dtype], trains=trains, seconds=seconds))
        print(f"{size:5} " + " ".join(f"{us[-1]:22.2f}" for us in found), flush=True)
    for name, us, (_, _, trains) in zip(names, found, kinds, strict=True):
        costs = DROPOUT if trains else FLASH
        print(f"{name}: {_described(*fit(SIZES, us))}; chosen by {_described(*costs.block, costs.ragged)}")


def _described(c0: float, c2: float, ragged: float) -> str:
    return f"{c0:.2f} + {c2:.5f} n², times {ragged:.2f} where {STEP} does not divide n"


if __name__ == "__main__":
    main()
