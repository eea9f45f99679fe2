"""A kernel of which ptxas serialises the products, as once all weight gradients: prints what is read of it.

A branch chooses between two loops that make the same sums, one of which takes column sums besides. Here for
the test of the reader; in a process of its own, since the suite's may tell Triton to interpret.
"""

import torch
import triton
import triton.language as tl

from bench import binaries
from moebert_kernels.kernels.triton.launch import Launch


@triton.jit
def loop(left_ptr, right_ptr, rows, SUM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    sums = tl.zeros((M,), tl.float32)
    for row in tl.range(0, rows, K):
        k = row + tl.arange(0, K)
        left = tl.load(left_ptr + k[:, None] * M + m[None, :], mask=(k < rows)[:, None], other=0.0)
        right = tl.load(right_ptr + k[:, None] * N + n[None, :], mask=(k < rows)[:, None], other=0.0)
        acc = tl.dot(left.T, right, acc)
        if SUM:
            sums += tl.sum(left.to(tl.float32), 0)
    return acc, sums


@triton.jit
def two_loops_kernel(
    left_ptr, right_ptr, out_ptr, sums_ptr, rows, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    if tl.program_id(0) == 0:
        acc, sums = loop(left_ptr, right_ptr, rows, True, M, N, K)
    else:
        acc, sums = loop(left_ptr, right_ptr, rows, False, M, N, K)
    m = tl.arange(0, M)
    tl.store(out_ptr + m[:, None] * N + tl.arange(0, N)[None, :], acc)
    tl.store(sums_ptr + m, sums)


if __name__ == "__main__":
    half, single = (torch.empty(0, dtype=t, device="meta") for t in (torch.bfloat16, torch.float32))
    given = {"left_ptr": half, "right_ptr": half, "out_ptr": single, "sums_ptr": single, "rows": 4096}
    sizes = {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 3}
    print(*binaries.read(Launch(two_loops_kernel, (2,), given | sizes), "sm_90").warnings)
