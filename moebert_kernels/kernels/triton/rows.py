"""Small kernels beside the GEMMs: sums over a token's experts and an expert's row tiles, gate gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels.triton.blocks import OF_PLAN, find_columns, find_rows
from moebert_kernels.kernels.triton.launch import ceil_div, groups_of, launch


def over_experts(z_SD: Tensor, top_k: int, dtype: torch.dtype, plus_TD: Tensor | None = None) -> Tensor:
    """The sum over each token's slots and `plus_TD`, [T, D]; the slots themselves if nothing is to add."""
    if top_k == 1 and z_SD.dtype == dtype and plus_TD is None:
        return z_SD
    T, D = z_SD.shape[0] // top_k, z_SD.shape[1]
    y_TD = z_SD.new_empty(T, D, dtype=dtype)
    launch(
        sum_slots_kernel,
        (T, ceil_div(D, 1024)),
        z_ptr=z_SD,
        plus_ptr=plus_TD,
        y_ptr=y_TD,
        D=D,
        TOP_K=top_k,
        BLOCK_D=1024,
    )
    return y_TD


class Parts(NamedTuple):
    """What row tiles have added up.

    Attributes:
        parts: [row tiles, N], float32.
        like: [E, N], whose dtype the sums over each expert's tiles get; or [E, N - C].
        shared: [C], whose dtype the sums of the first C columns get, over all tiles; or None.
    """

    parts: Tensor
    like: Tensor
    shared: Tensor | None = None


def over_tiles(
    left: Parts | None, right: Parts | None, offsets_E1: Tensor, tile_rows: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The sums over each expert's row tiles, of two kinds of parts at once; and the left's shared sums."""
    E = offsets_E1.shape[0] - 1
    like = (left and left.like, right and right.like, left and left.shared)
    out = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
    M, N, C = (0 if t is None else t.shape[-1] for t in like)
    launch(
        sum_tiles_kernel,
        (E, max(ceil_div(C, 64) + ceil_div(M, 64), ceil_div(N, 64)), 2),
        left_parts_ptr=left and left.parts,
        right_parts_ptr=right and right.parts,
        offsets_ptr=offsets_E1,
        left_ptr=out[0],
        right_ptr=out[1],
        shared_ptr=out[2],
        E=E,
        M=M,
        N=N,
        C=C,
        TILE_ROWS=tile_rows,
        BLOCK_T=32,
        BLOCK_N=64,
        GROUPS=groups_of(E),
    )
    return out[0], out[1], out[2]


@triton.jit
def sum_slots_kernel(
    z_ptr,  # [T * TOP_K, D] by slot
    plus_ptr,  # [T, D], or None
    y_ptr,  # out: [T, D]
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[t] = sum over k of z[t * TOP_K + k], in the order of k, + plus[t]. Grid: (T, column tiles)."""
    token = tl.program_id(0).to(tl.int64)
    cols_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(TOP_K):
        sum_D += tl.load(z_ptr + (token * TOP_K + k) * D + cols_D, mask=cols_D < D, other=0.0).to(tl.float32)
    if plus_ptr is not None:
        sum_D += tl.load(plus_ptr + token * D + cols_D, mask=cols_D < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * D + cols_D, sum_D.to(y_ptr.dtype.element_ty), mask=cols_D < D)


@triton.jit(do_not_specialize_on_alignment=OF_PLAN)
def sum_tiles_kernel(
    left_parts_ptr,  # [row tiles, C + M] float32, or None
    right_parts_ptr,  # [row tiles, N] float32, or None
    offsets_ptr,  # [E + 1]
    left_ptr,  # out: [E, M]
    right_ptr,  # out: [E, N]
    shared_ptr,  # out: [C], sums over all experts, or None
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Two arrays' sums over each expert's row tiles, in the order of the tiles.

    Grid: (E, the larger number of column tiles, 2).
    """
    expert = tl.program_id(0)
    e = tl.arange(0, GROUPS)
    begin_E = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end_E = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    tiles_E = (end_E - begin_E + TILE_ROWS - 1) // TILE_ROWS
    first = tl.sum(tl.where(e < expert, tiles_E, 0), 0)
    stop = first + tl.sum(tl.where(e == expert, tiles_E, 0), 0)
    n = tl.program_id(1) * BLOCK_N
    if tl.program_id(2) == 0:
        if left_ptr is not None:
            if C == 0:
                _sum_tiles(left_parts_ptr, left_ptr + expert * M, first, stop, n, M, M, BLOCK_T, BLOCK_N)
            else:
                is_shared, n = find_columns(tl.program_id(1), C, M, BLOCK_N)
                if is_shared:
                    if expert == 0:
                        _sum_tiles(
                            left_parts_ptr, shared_ptr, 0, tl.sum(tiles_E, 0), n, C, C + M, BLOCK_T, BLOCK_N
                        )
                else:
                    own_ptr = left_ptr + expert * M
                    _sum_tiles(left_parts_ptr + C, own_ptr, first, stop, n, M, C + M, BLOCK_T, BLOCK_N)
    else:
        if right_ptr is not None:
            _sum_tiles(right_parts_ptr, right_ptr + expert * N, first, stop, n, N, N, BLOCK_T, BLOCK_N)


@triton.jit
def _sum_tiles(
    parts_ptr,
    out_ptr,
    first,
    stop,
    n,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first N columns of `out_ptr`'s, of parts whose rows lie STRIDE apart."""
    cols_N = n + tl.arange(0, BLOCK_N)
    sum_N = tl.zeros((BLOCK_N,), tl.float32)
    for tile in tl.range(first, stop, BLOCK_T):
        tile_T = tile + tl.arange(0, BLOCK_T)
        mask = (tile_T < stop)[:, None] & (cols_N < N)[None, :]
        part_TN = tl.load(
            parts_ptr + tile_T.to(tl.int64)[:, None] * STRIDE + cols_N[None, :], mask=mask, other=0.0
        )
        sum_N += tl.sum(part_TN, 0)
    tl.store(out_ptr + cols_N, sum_N.to(out_ptr.dtype.element_ty), mask=cols_N < N)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=OF_PLAN)
def gate_grad_kernel(
    parts_ptr,  # [COL_TILES, S] sorted, parts of <W2^T dy, a>
    dy_ptr,  # [S / DY_TOP_K, D], rows dy_stride apart
    dy_stride,
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    b2_ptr,  # [E, D] or None
    dgate_ptr,  # out: [S] by slot
    num_slots,
    E: tl.constexpr,
    D: tl.constexpr,
    DY_TOP_K: tl.constexpr,
    COL_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """dgate = <W2^T dy, a> + <dy, b2>, which is <dy, z> without z; 0 without an expert. Grid: (row tiles)."""
    group, begin, end = find_rows(tl.program_id(0), offsets_ptr, num_slots, E, BLOCK_M, GROUPS)
    if group > E:
        return
    rows_M = begin + tl.arange(0, BLOCK_M)
    live_M = rows_M < end
    slot_M = tl.load(order_ptr + rows_M, mask=live_M, other=0)
    dgate_M = tl.zeros((BLOCK_M,), tl.float32)
    if group < E:
        part_ptrs = parts_ptr + rows_M
        for _ in tl.range(0, COL_TILES):
            dgate_M += tl.load(part_ptrs, mask=live_M, other=0.0)
            part_ptrs += num_slots
        if b2_ptr is not None:
            dy_row_M = (slot_M // DY_TOP_K).to(tl.int64) * dy_stride
            for d in tl.range(0, D, BLOCK_D):
                cols_D = d + tl.arange(0, BLOCK_D)
                b2_D = tl.load(b2_ptr + group * D + cols_D, mask=cols_D < D, other=0.0).to(tl.float32)
                mask_MD = live_M[:, None] & (cols_D < D)[None, :]
                dy_MD = tl.load(dy_ptr + dy_row_M[:, None] + cols_D[None, :], mask=mask_MD, other=0.0)
                dgate_M += tl.sum(dy_MD.to(tl.float32) * b2_D[None, :], 1)
    tl.store(dgate_ptr + slot_M, dgate_M.to(dgate_ptr.dtype.element_ty), mask=live_M)
