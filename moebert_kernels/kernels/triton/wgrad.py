"""The weight gradients of both layers in one launch: sums over each expert's rows.

    dW1 [F, D] = dh^T x             dh in sorted order, x gathered by token
    dW2 [D, F] = ((gate a)^T dz)^T  a in sorted order, dz gathered

Both are left^T right with a sorted left side of N = C + F columns and a gathered right side of D, so that one
loop does for both; dW2 is turned round when it is stored. C neurons that experts share are one more expert,
number E, to which all rows go and whose columns come first.

The work is a list: expert by expert, W1 then W2, tile of dW by tile, one step per BLOCK_K rows. Plain, a
program takes the steps of one tile. Streamed, a fixed number of programs take equal shares of the list,
whatever the routing; a tile cut by a share's boundary goes to `partial` in pieces, which `join_kernel` adds
in the order of the programs: bitwise the same for the same routing. A cut tile's steps are taken in rotated
order, the first row at its first cut, so that programs that run side by side read the same rows at the same
time. An expert without rows has one empty step, which writes its zeros. Invariant: every element of dW1 and
dW2 is written exactly once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels.triton import configs
from moebert_kernels.kernels.triton.blocks import OF_PLAN
from moebert_kernels.kernels.triton.configs import Config
from moebert_kernels.kernels.triton.launch import ceil_div, launch, rows_are_aligned
from moebert_kernels.kernels.triton.steps import (
    count_steps,
    find_step,
    share_begin,
    share_of,
    steps_before_cut,
)


class Factors(NamedTuple):
    """One weight's gradient is `left`^T `right` * `scale`, over each expert's rows.

    Attributes:
        left: [S, N] in sorted order, contiguous.
        right: [S / top_k, D], gathered by order // top_k.
    """

    left: Tensor
    right: Tensor
    top_k: int
    scale: float = 1.0


# From so many steps a tile on, plain programs with tiles of shared neurons, to which all rows go, keep the
# others waiting.
_LONGEST_PLAIN_STEPS = 16


def weight_grads(
    first: Factors | None,
    second: Factors | None,
    num_shared: int,
    order_S: Tensor,
    offsets_E1: Tensor,
    config: Config,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dW1 [E, F, D] and dW2 [E, D, F] from their factors, then the same of shared neurons, [C, D] and [D, C].

    None for those that are not wanted, or not there.
    """
    wanted = [factors for factors in (first, second) if factors is not None]
    if not wanted:
        return None, None, None, None
    E, C, D = offsets_E1.shape[0] - 1, num_shared, wanted[0].right.shape[1]
    S, F = wanted[0].left.shape[0], wanted[0].left.shape[1] - C
    tile = config.weight_grad
    if config.weight_grad_unaligned and not all(rows_are_aligned(t) for f in wanted for t in f[:2]):
        tile = config.weight_grad_unaligned
    dw1 = None if first is None else first.left.new_empty(E, F, D)
    dw2 = None if second is None else second.left.new_empty(E, D, F)
    shared_dw1 = None if first is None or not C else first.left.new_empty(C, D)
    shared_dw2 = None if second is None or not C else second.left.new_empty(D, C)
    grads = dw1, dw2, shared_dw1, shared_dw2
    a, b = first or wanted[0], second or wanted[0]
    tiles, shared_tiles = (len(wanted) * ceil_div(n, tile.m) * ceil_div(D, tile.n) for n in (F, C))
    outputs: dict[str, object] = {
        "offsets_ptr": offsets_E1,
        "dw1_ptr": dw1,
        "dw2_ptr": dw2,
        "shared_dw1_ptr": shared_dw1,
        "shared_dw2_ptr": shared_dw2,
        "E": E,
        "F": F,
        "C": C,
        "D": D,
        "TILES": tiles,
        "SHARED_TILES": shared_tiles,
        "SCALE1": a.scale,
        "SCALE2": b.scale,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
    }
    arguments = outputs | {
        "left1_ptr": a.left,
        "right1_ptr": a.right,
        "right1_stride": a.right.stride(0),
        "left2_ptr": b.left,
        "right2_ptr": b.right,
        "right2_stride": b.right.stride(0),
        "order_ptr": order_S,
        "TOP_K1": a.top_k,
        "TOP_K2": b.top_k,
        "PRECISION": configs.precision(a.left.dtype),
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if not config.stream_k and not (C and _LONGEST_PLAIN_STEPS * tile.k < S):
        launch(weight_grad_kernel, (shared_tiles + E * tiles,), **arguments)
        return grads
    programs = configs.multiprocessors(order_S.device) * tile.per_multiprocessor
    partial = order_S.new_empty(programs, 2, tile.m, tile.n, dtype=torch.float32)
    pieces = {"partial_ptr": partial, "EXPERTS": triton.next_power_of_2(E + min(C, 1))}
    registers = configs.REGISTERS // (32 * tile.warps * tile.per_multiprocessor)
    launch(weight_grad_stream_kernel, (programs,), **arguments, **pieces, maxnreg=min(registers, 255))
    joined = {"BLOCK_K": tile.k, "ROWS": 16, "PROGRAMS": programs}
    launch(join_kernel, (programs, tile.m // 16), **outputs, **pieces, **joined)
    return grads


@triton.jit(do_not_specialize_on_alignment=OF_PLAN)
def weight_grad_kernel(
    left1_ptr,  # [S, N] sorted
    right1_ptr,  # [S / TOP_K1, D], rows right1_stride apart
    right1_stride,
    left2_ptr,  # as the first, for dW2
    right2_ptr,
    right2_stride,
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    dw1_ptr,  # out: [E, F, D], or None
    dw2_ptr,  # out: [E, D, F], or None
    shared_dw1_ptr,  # out: [C, D], or None
    shared_dw2_ptr,  # out: [D, C], or None
    E: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    TOP_K1: tl.constexpr,
    TOP_K2: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One whole tile per program. Grid: (tiles of shared weights, which take longest, + E * an expert's)."""
    expert = (tl.program_id(0) - SHARED_TILES) // TILES
    tile = (tl.program_id(0) - SHARED_TILES) % TILES
    first_of = expert
    last_of = expert + 1
    if C > 0:
        is_shared = tl.program_id(0) < SHARED_TILES
        tile = tl.where(is_shared, tl.program_id(0), tile)
        first_of = tl.where(is_shared, 0, expert)
        last_of = tl.where(is_shared, E, expert + 1)
        expert = tl.where(is_shared, E, expert)
    begin = tl.load(offsets_ptr + first_of)
    end = tl.load(offsets_ptr + last_of)
    dw_MN = _sum_rows(
        left1_ptr, right1_ptr, right1_stride, left2_ptr, right2_ptr, right2_stride, order_ptr, dw1_ptr,
        dw2_ptr, begin, end, end, expert, tile,
        E, F, C, D, TOP_K1, TOP_K2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _store_grad(
        dw_MN, 0, dw1_ptr, dw2_ptr, shared_dw1_ptr, shared_dw2_ptr, expert, tile,
        E, F, C, D, SCALE1, SCALE2, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=OF_PLAN)
def weight_grad_stream_kernel(
    left1_ptr,  # as in weight_grad_kernel, down to dw2_ptr
    right1_ptr,
    right1_stride,
    left2_ptr,
    right2_ptr,
    right2_stride,
    order_ptr,
    offsets_ptr,
    dw1_ptr,
    dw2_ptr,
    shared_dw1_ptr,
    shared_dw2_ptr,
    partial_ptr,  # out: [programs, 2, BLOCK_M, BLOCK_N] float32; 0 ends a tile begun elsewhere, 1 begins one
    E: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    TOP_K1: tl.constexpr,
    TOP_K2: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """An equal share of all steps per program. Grid: (multiprocessors, or a multiple of them)."""
    program = tl.program_id(0)
    total = count_steps(offsets_ptr, E, C, TILES, SHARED_TILES, BLOCK_K, EXPERTS)
    step = share_begin(program, total, tl.num_programs(0))
    last = share_begin(program + 1, total, tl.num_programs(0))
    while step < last:
        expert, tile, at, steps, begin, end = find_step(
            step, offsets_ptr, E, C, TILES, SHARED_TILES, BLOCK_K, EXPERTS
        )
        until = tl.minimum(at + last - step, steps)
        cut = steps_before_cut(step - at, steps, total)
        first_row = begin + tl.where(at < cut, at - cut + steps, at - cut) * BLOCK_K
        last_row = tl.minimum(first_row + (until - at) * BLOCK_K, end)
        dw_MN = _sum_rows(
            left1_ptr, right1_ptr, right1_stride, left2_ptr, right2_ptr, right2_stride, order_ptr, dw1_ptr,
            dw2_ptr, first_row, last_row, end, expert, tile,
            E, F, C, D, TOP_K1, TOP_K2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if until - at == steps:
            _store_grad(
                dw_MN, 0, dw1_ptr, dw2_ptr, shared_dw1_ptr, shared_dw2_ptr, expert, tile,
                E, F, C, D, SCALE1, SCALE2, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            piece = program.to(tl.int64) * 2 + (at == 0)
            m = tl.arange(0, BLOCK_M)
            n = tl.arange(0, BLOCK_N)
            ptrs = partial_ptr + piece * (BLOCK_M * BLOCK_N) + m[:, None] * BLOCK_N + n[None, :]
            tl.store(ptrs, dw_MN)
        step += until - at


@triton.jit(do_not_specialize_on_alignment=OF_PLAN)
def join_kernel(
    partial_ptr,  # [PROGRAMS, 2, BLOCK_M, BLOCK_N] float32
    offsets_ptr,  # [E + 1]
    dw1_ptr,  # out: [E, F, D], or None
    dw2_ptr,  # out: [E, D, F], or None
    shared_dw1_ptr,  # out: [C, D], or None
    shared_dw2_ptr,  # out: [D, C], or None
    E: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Add the pieces of the tile a program began and did not end. Grid: (PROGRAMS, BLOCK_M / ROWS)."""
    program = tl.program_id(0)
    total = count_steps(offsets_ptr, E, C, TILES, SHARED_TILES, BLOCK_K, EXPERTS)
    first = share_begin(program, total, PROGRAMS)
    stop = share_begin(program + 1, total, PROGRAMS)
    if stop == first:
        return
    expert, tile, at, steps, _, _ = find_step(
        stop - 1, offsets_ptr, E, C, TILES, SHARED_TILES, BLOCK_K, EXPERTS
    )
    tile_first = stop - 1 - at
    tile_stop = tile_first + steps
    if tile_first < first or tile_stop <= stop:
        return
    row = tl.program_id(1) * ROWS
    n = tl.arange(0, BLOCK_N)
    offset_RN = (row + tl.arange(0, ROWS))[:, None] * BLOCK_N + n[None, :]
    mine_ptr = partial_ptr + program.to(tl.int64) * (2 * BLOCK_M * BLOCK_N)
    dw_RN = tl.load(mine_ptr + BLOCK_M * BLOCK_N + offset_RN)
    # Shares that follow on one that has steps have steps until the list ends.
    for other in tl.range(1, share_of(tile_stop - 1, total, PROGRAMS) - program + 1):
        dw_RN += tl.load(mine_ptr + tl.cast(other, tl.int64) * (2 * BLOCK_M * BLOCK_N) + offset_RN)
    _store_grad(
        dw_RN, row, dw1_ptr, dw2_ptr, shared_dw1_ptr, shared_dw2_ptr, expert, tile,
        E, F, C, D, SCALE1, SCALE2, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _neurons(
    expert,
    tile,
    E: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    COL_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """How many tiles one of the weights has, neurons, and where these begin among the columns of the left."""
    each = ((F + BLOCK_M - 1) // BLOCK_M) * COL_TILES
    size = F
    first = 0
    if C > 0:
        each = tl.where(expert == E, ((C + BLOCK_M - 1) // BLOCK_M) * COL_TILES, each)
        size = tl.where(expert == E, C, F)
        first = tl.where(expert == E, 0, C)
    return each, size, first


@triton.jit
def _is_second(tile, dw1_ptr, dw2_ptr, EACH):
    """Whether a tile is one of dW2; a weight has EACH tiles."""
    if dw1_ptr is None:
        second = True
    elif dw2_ptr is None:
        second = False
    else:
        second = tile >= EACH
    return second


@triton.jit
def _sum_rows(
    left1_ptr,
    right1_ptr,
    right1_stride,
    left2_ptr,
    right2_ptr,
    right2_stride,
    order_ptr,
    dw1_ptr,
    dw2_ptr,
    begin,
    last,
    end,
    expert,
    tile,
    E: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    TOP_K1: tl.constexpr,
    TOP_K2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left^T right over the rows from `begin` to `last`, for one tile of dW; the expert's rows end at `end`.

    Few instructions a step: what the loop is bound by is not the products but their addresses. Rows past
    the end are 0 on the left side; on the right they repeat the expert's last row, without a mask.
    """
    COL_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    each, size, first = _neurons(expert, tile, E, F, C, COL_TILES, BLOCK_M)
    second = _is_second(tile, dw1_ptr, dw2_ptr, each)
    left_ptr = tl.where(second, left2_ptr, left1_ptr)
    right_ptr = tl.where(second, right2_ptr, right1_ptr)
    stride = tl.where(second, right2_stride, right1_stride)
    cols_M = tile % each // COL_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_N = tile % COL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    step_K = tl.arange(0, BLOCK_K)
    left_offset_KM = step_K[:, None] * (C + F) + (first + cols_M)[None, :]
    dw_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(begin, last, BLOCK_K):
        live_KM = (step_K < last - row)[:, None]
        if F % BLOCK_M != 0 or C % BLOCK_M != 0:
            live_KM = live_KM & (cols_M < size)[None, :]
        left_ptrs = left_ptr + tl.cast(row, tl.int64) * (C + F) + left_offset_KM
        left_KM = tl.load(left_ptrs, mask=live_KM, other=0.0)
        slot_K = tl.load(order_ptr + tl.minimum(row + step_K, end - 1))
        from_K = slot_K // TOP_K1 if TOP_K1 == TOP_K2 else slot_K // tl.where(second, TOP_K2, TOP_K1)
        right_ptrs = right_ptr + from_K.to(tl.int64)[:, None] * stride + cols_N[None, :]
        if D % BLOCK_N == 0:
            right_KN = tl.load(right_ptrs)
        else:
            right_KN = tl.load(right_ptrs, mask=(cols_N < D)[None, :], other=0.0)
        dw_MN = tl.dot(left_KM.T, right_KN, dw_MN, input_precision=PRECISION)
    return dw_MN


@triton.jit
def _store_grad(
    dw_RN,
    row,
    dw1_ptr,
    dw2_ptr,
    shared_dw1_ptr,
    shared_dw2_ptr,
    expert,
    tile,
    E: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the rows of a tile from `row` on into the weight that it belongs to."""
    COL_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    each, size, _ = _neurons(expert, tile, E, F, C, COL_TILES, BLOCK_M)
    f_R = tile % each // COL_TILES * BLOCK_M + row + tl.arange(0, dw_RN.shape[0])
    d_N = tile % COL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    first = expert.to(tl.int64) * (F * D)
    mask_RN = (f_R < size)[:, None] & (d_N < D)[None, :]
    if _is_second(tile, dw1_ptr, dw2_ptr, each):
        if dw2_ptr is not None:
            mine_ptr = dw2_ptr + first
            if C > 0:
                mine_ptr = tl.where(expert == E, shared_dw2_ptr, mine_ptr)
            ptrs_NR = mine_ptr + d_N[:, None] * size + f_R[None, :]
            tl.store(ptrs_NR, (dw_RN * SCALE2).T.to(dw2_ptr.dtype.element_ty), mask=mask_RN.T)
    else:
        if dw1_ptr is not None:
            mine_ptr = dw1_ptr + first
            if C > 0:
                mine_ptr = tl.where(expert == E, shared_dw1_ptr, mine_ptr)
            ptrs_RN = mine_ptr + f_R[:, None] * D + d_N[None, :]
            tl.store(ptrs_RN, (dw_RN * SCALE1).to(dw1_ptr.dtype.element_ty), mask=mask_RN)
