"""The weight gradients: per expert dW_e = left^T right, summed over its rows.

    W1    left = dh (sorted rows)      right = x (gathered by token)
    W2    left = dz (gathered)         right = gate * a (sorted rows)

The work is a list: expert by expert, tile of dW by tile, one step per BLOCK_K rows. Plain, a program takes
the steps of one tile. Streamed, a fixed number of programs take equal shares of the list, whatever the
routing; a tile cut by a share's boundary goes to `partial` in pieces, which `join_kernel` adds in the order
of the programs: bitwise the same for the same routing. A cut tile's steps are taken in rotated order, the
first row at its first cut, so that programs that run side by side read the same rows at the same time. An
expert without rows has one empty step, which writes its zeros. Invariant: every element of dW is written
exactly once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels import configs
from moebert_kernels.kernels.configs import Config
from moebert_kernels.kernels.launch import ceil_div, launch, rows_are_aligned


def weight_grad(
    left: Tensor,
    right: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    gather_left: bool,
    config: Config,
) -> Tensor:
    """dW [E, M, N] = left^T right over each expert's rows.

    Of `left` [*, M] and `right` [*, N] one is in sorted order and the other is gathered by order // top_k.
    """
    E, M, N = offsets_E1.shape[0] - 1, left.shape[1], right.shape[1]
    tile = config.weight_grad
    if config.weight_grad_unaligned and not (rows_are_aligned(left) and rows_are_aligned(right)):
        tile = config.weight_grad_unaligned
    dw_EMN = left.new_empty(E, M, N)
    sizes = {"E": E, "M": M, "N": N, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    arguments = {
        "left_ptr": left,
        "left_stride": left.stride(0),
        "right_ptr": right,
        "right_stride": right.stride(0),
        "order_ptr": order_S,
        "offsets_ptr": offsets_E1,
        "dw_ptr": dw_EMN,
        "TOP_K": top_k,
        "GATHER_LEFT": gather_left,
        "PRECISION": configs.precision(left.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if not config.stream_k:
        tiles = ceil_div(M, tile.m) * ceil_div(N, tile.n)
        launch(weight_grad_kernel, (E * tiles,), **arguments, **sizes)
        return dw_EMN
    programs = configs.multiprocessors(left.device) * tile.per_multiprocessor
    experts = triton.next_power_of_2(E)
    partial = left.new_empty(programs, 2, tile.m, tile.n, dtype=torch.float32)
    pieces = {"partial_ptr": partial, "EXPERTS": experts}
    launch(weight_grad_stream_kernel, (programs,), **arguments, **pieces, **sizes)
    launch(
        join_kernel,
        (programs, tile.m // 16),
        offsets_ptr=offsets_E1,
        dw_ptr=dw_EMN,
        ROWS=16,
        PROGRAMS=programs,
        **pieces,
        **sizes,
    )
    return dw_EMN


@triton.jit
def weight_grad_kernel(
    left_ptr,  # [*, M], rows left_stride apart
    left_stride,
    right_ptr,  # [*, N], rows right_stride apart
    right_stride,
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    dw_ptr,  # out: [E, M, N]
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One whole tile of dW per program. Grid: (E * tiles of dW). Rows are gathered by order // TOP_K."""
    TILES: tl.constexpr = ((M + BLOCK_M - 1) // BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    expert = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    dw_MN = _sum_rows(
        left_ptr, left_stride, right_ptr, right_stride, order_ptr, begin, end, tile,
        M, N, TOP_K, GATHER_LEFT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _store_grad(dw_MN, dw_ptr, expert, tile, M, N)


@triton.jit
def weight_grad_stream_kernel(
    left_ptr,  # as in weight_grad_kernel, down to dw_ptr
    left_stride,
    right_ptr,
    right_stride,
    order_ptr,
    offsets_ptr,
    dw_ptr,
    partial_ptr,  # out: [programs, 2, BLOCK_M, BLOCK_N] float32; 0 ends a tile begun elsewhere, 1 begins one
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """An equal share of all steps per program. Grid: (multiprocessors, or a multiple of them)."""
    TILES: tl.constexpr = ((M + BLOCK_M - 1) // BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    total = _count_steps(offsets_ptr, E, TILES, BLOCK_K, EXPERTS)
    step = program * total // tl.num_programs(0)
    last = (program + 1) * total // tl.num_programs(0)
    while step < last:
        expert, tile, at, steps, begin, end = _find_step(step, offsets_ptr, E, TILES, BLOCK_K, EXPERTS)
        until = tl.minimum(at + last - step, steps)
        cut = _steps_before_cut(step - at, steps, total)
        first_row = begin + (tl.where(at < cut, at - cut + steps, at - cut) * BLOCK_K).to(tl.int32)
        last_row = tl.minimum(first_row + (until - at) * BLOCK_K, end).to(tl.int32)
        dw_MN = _sum_rows(
            left_ptr, left_stride, right_ptr, right_stride, order_ptr, first_row, last_row, tile,
            M, N, TOP_K, GATHER_LEFT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if until - at == steps:
            _store_grad(dw_MN, dw_ptr, expert, tile, M, N)
        else:
            piece = program * 2 + (at == 0).to(tl.int64)
            m = tl.arange(0, BLOCK_M)
            n = tl.arange(0, BLOCK_N)
            ptrs = partial_ptr + piece * (BLOCK_M * BLOCK_N) + m[:, None] * BLOCK_N + n[None, :]
            tl.store(ptrs, dw_MN)
        step += until - at


@triton.jit
def _steps_before_cut(tile_first, steps, total):
    """How many steps of the tile from step `tile_first` on a program takes that began before the tile."""
    programs = tl.num_programs(0)
    program = ((tile_first + 1) * programs - 1) // total
    taken = tl.minimum((program + 1) * total // programs - tile_first, steps)
    return tl.where(program * total // programs < tile_first, taken, 0)


@triton.jit
def join_kernel(
    partial_ptr,  # [PROGRAMS, 2, BLOCK_M, BLOCK_N] float32
    offsets_ptr,  # [E + 1]
    dw_ptr,  # out: [E, M, N]
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Add the pieces of the tile a program began and did not end. Grid: (PROGRAMS, BLOCK_M / ROWS)."""
    TILES: tl.constexpr = ((M + BLOCK_M - 1) // BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    total = _count_steps(offsets_ptr, E, TILES, BLOCK_K, EXPERTS)
    first = program * total // PROGRAMS
    stop = (program + 1) * total // PROGRAMS
    if stop == first:
        return
    expert, tile, at, steps, _, _ = _find_step(stop - 1, offsets_ptr, E, TILES, BLOCK_K, EXPERTS)
    tile_first = stop - 1 - at
    tile_stop = tile_first + steps
    if tile_first < first or tile_stop <= stop:
        return
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    offset_RN = r[:, None] * BLOCK_N + n[None, :]
    dw_RN = tl.load(partial_ptr + (program * 2 + 1) * (BLOCK_M * BLOCK_N) + offset_RN)
    other = program + 1
    while other * total // PROGRAMS < tile_stop:
        # A share may be empty when there are fewer steps than programs.
        if (other + 1) * total // PROGRAMS > other * total // PROGRAMS:
            dw_RN += tl.load(partial_ptr + other * 2 * (BLOCK_M * BLOCK_N) + offset_RN)
        other += 1
    COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows_R = tile // COL_TILES * BLOCK_M + r
    _store_block(dw_RN, dw_ptr, expert, rows_R, tile % COL_TILES, M, N)


@triton.jit
def _count_steps(
    offsets_ptr, E: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, EXPERTS: tl.constexpr
):
    """The length of the list of steps."""
    e = tl.arange(0, EXPERTS)
    count_E = tl.load(offsets_ptr + e + 1, mask=e < E, other=0) - tl.load(
        offsets_ptr + e, mask=e < E, other=0
    )
    steps_E = tl.maximum((count_E + BLOCK_K - 1) // BLOCK_K, 1).to(tl.int64)
    return tl.sum(tl.where(e < E, steps_E, 0), 0) * TILES


@triton.jit
def _find_step(
    step, offsets_ptr, E: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, EXPERTS: tl.constexpr
):
    """Expert and tile of a step, its number in the tile, how many the tile has, the expert's rows."""
    e = tl.arange(0, EXPERTS)
    begin_E = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end_E = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    steps_E = tl.maximum((end_E - begin_E + BLOCK_K - 1) // BLOCK_K, 1).to(tl.int64)
    steps_E = tl.where(e < E, steps_E, 0)
    until_E = tl.cumsum(steps_E, 0) * TILES
    expert = tl.sum(((until_E <= step) & (e < E)).to(tl.int32), 0)
    mine_E = e == expert
    steps = tl.sum(tl.where(mine_E, steps_E, 0), 0)
    within = step - tl.sum(tl.where(mine_E, until_E - steps_E * TILES, 0), 0)
    begin = tl.sum(tl.where(mine_E, begin_E, 0), 0)
    end = tl.sum(tl.where(mine_E, end_E, 0), 0)
    return expert, (within // steps).to(tl.int32), within % steps, steps, begin, end


@triton.jit
def _sum_rows(
    left_ptr,
    left_stride,
    right_ptr,
    right_stride,
    order_ptr,
    begin,
    end,
    tile,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left^T right over the rows from `begin` to `end`, for one tile of dW."""
    COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    cols_M = tile // COL_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_N = tile % COL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    dw_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(begin, end, BLOCK_K):
        row_K = first + tl.arange(0, BLOCK_K)
        live_K = row_K < end
        slot_K = tl.load(order_ptr + row_K, mask=live_K, other=0)
        left_K = slot_K // TOP_K if GATHER_LEFT else row_K
        right_K = row_K if GATHER_LEFT else slot_K // TOP_K
        # Rows past the end must read as 0: here rows are what is summed over.
        left_KM = tl.load(
            left_ptr + left_K.to(tl.int64)[:, None] * left_stride + cols_M[None, :],
            mask=live_K[:, None] & (cols_M < M)[None, :],
            other=0.0,
        )
        right_KN = tl.load(
            right_ptr + right_K.to(tl.int64)[:, None] * right_stride + cols_N[None, :],
            mask=live_K[:, None] & (cols_N < N)[None, :],
            other=0.0,
        )
        dw_MN = tl.dot(left_KM.T, right_KN, dw_MN, input_precision=PRECISION)
    return dw_MN


@triton.jit
def _store_grad(dw_MN, dw_ptr, expert, tile, M: tl.constexpr, N: tl.constexpr):
    """Write a whole tile of dW."""
    BLOCK_M: tl.constexpr = dw_MN.shape[0]
    BLOCK_N: tl.constexpr = dw_MN.shape[1]
    COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows_M = tile // COL_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    _store_block(dw_MN, dw_ptr, expert, rows_M, tile % COL_TILES, M, N)


@triton.jit
def _store_block(dw_RN, dw_ptr, expert, row_R, col_tile, M: tl.constexpr, N: tl.constexpr):
    """Write some rows of a tile of dW."""
    BLOCK_N: tl.constexpr = dw_RN.shape[1]
    cols_N = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs = dw_ptr + expert.to(tl.int64) * (M * N) + row_R.to(tl.int64)[:, None] * N + cols_N[None, :]
    tl.store(ptrs, dw_RN.to(dw_ptr.dtype.element_ty), mask=(row_R < M)[:, None] & (cols_N < N)[None, :])
