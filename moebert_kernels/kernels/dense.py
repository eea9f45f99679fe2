"""Few tokens, inference: every expert on every token, masked.

    dense_up_kernel     am[t, e, :] = weight[t, e] * act(x_t W1_e^T + b1_e)
    dense_down_kernel   y[t] = sum over e of am[t, e] W2_e^T + weight[t, e] * b2_e

where weight[t, e] is the gate of token t if it uses expert e, else 0. The weights of all experts are read
anyway once each has a token, so with few tokens this reads no more than the grouped kernels do. Rows come in
token order: no program waits for the plan before its first load, and nothing is gathered or scattered.
Invariant: a token's output holds nothing of an expert it does not use, not even that expert's infinities.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels import configs
from moebert_kernels.kernels.blocks import activate, follow, load_weight, multiply, rounds_to_half
from moebert_kernels.kernels.configs import Config
from moebert_kernels.kernels.launch import ceil_div, launch, weight


def dense_forward(
    x_TD: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    gate_S: Tensor | None,
    scale: float,
    activation: str,
    top_k: int,
    config: Config,
) -> Tensor:
    """y [T, D] of contiguous arguments; `gate_S` by slot, or None for `scale`."""
    T = x_TD.shape[0]
    E, F, D = w1_EFD.shape
    tile = config.dense
    am_TEF = x_TD.new_empty(T, E, F)
    weight_ET = x_TD.new_empty(E, T, dtype=torch.float32)
    y_TD = x_TD.new_empty(T, D)
    row_tiles = ceil_div(T, tile.m)
    w1, w1_tma = weight(w1_EFD, config.tma, tile.n, tile.k)
    w2, w2_tma = weight(w2_EDF, config.tma, tile.n, tile.k)
    sizes = {
        "num_tokens": T,
        "E": E,
        "D": D,
        "F": F,
        "PRECISION": configs.precision(x_TD.dtype),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    launch(
        dense_up_kernel,
        (row_tiles * ceil_div(F, tile.n), E),
        x_ptr=x_TD,
        x_stride=x_TD.stride(0),
        order_ptr=order_S,
        offsets_ptr=offsets_E1,
        w1=w1,
        b1_ptr=b1_EF,
        gate_ptr=gate_S,
        am_ptr=am_TEF,
        weight_ptr=weight_ET,
        TOP_K=top_k,
        SCALE=scale,
        ACTIVATION=activation,
        W_TMA=w1_tma,
        **sizes,
    )
    launch(
        dense_down_kernel,
        (row_tiles * ceil_div(D, tile.n),),
        am_ptr=am_TEF,
        weight_ptr=weight_ET,
        w2=w2,
        b2_ptr=b2_ED,
        y_ptr=y_TD,
        W_TMA=w2_tma,
        **sizes,
    )
    return y_TD


@triton.jit(do_not_specialize=["num_tokens"])
def dense_up_kernel(
    x_ptr,  # [T, D], rows x_stride apart
    x_stride,
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    w1,  # [E, F, D], pointer or descriptor
    b1_ptr,  # [E, F] or None
    gate_ptr,  # [S] by slot, or None for SCALE
    am_ptr,  # out: [T, E, F]
    weight_ptr,  # out: [E, T] float32
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    W_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid: (row tiles x column tiles of one expert, E)."""
    follow(DEPENDENT)
    col_tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    n = tl.program_id(0) % col_tiles * BLOCK_N
    expert = tl.program_id(1)
    token_M = tl.program_id(0) // col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live_M = token_M < num_tokens
    cols_N = n + tl.arange(0, BLOCK_N)
    x_offset_M = tl.where(live_M, token_M, 0).to(tl.int64) * x_stride
    h_MN = multiply(
        x_ptr, 0, x_offset_M, w1, expert, n,
        D, F, True, False, W_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if b1_ptr is not None:
        h_MN += tl.load(b1_ptr + expert * F + cols_N, mask=cols_N < F, other=0.0).to(tl.float32)[None, :]

    weight_M = tl.zeros((BLOCK_M,), tl.float32)
    uses_M = tl.zeros((BLOCK_M,), tl.int32)
    last_row = tl.load(offsets_ptr + expert + 1)
    for row in tl.range(tl.load(offsets_ptr + expert), last_row, 32):
        row_R = row + tl.arange(0, 32)
        slot_R = tl.load(order_ptr + row_R, mask=row_R < last_row, other=-1)
        mine_MR = (slot_R // TOP_K)[None, :] == token_M[:, None]
        mine_MR = mine_MR & (row_R < last_row)[None, :]
        if gate_ptr is None:
            gate_R = tl.full((32,), SCALE, tl.float32)
        else:
            gate_R = tl.load(gate_ptr + slot_R, mask=row_R < last_row, other=0.0).to(tl.float32)
        weight_M += tl.sum(tl.where(mine_MR, gate_R[None, :], 0.0), 1)
        uses_M += tl.sum(mine_MR.to(tl.int32), 1)
    if n == 0:
        tl.store(weight_ptr + expert * num_tokens + token_M, weight_M, mask=live_M)

    a_MN = activate(h_MN, ACTIVATION, rounds_to_half(am_ptr))
    am_MN = tl.where((uses_M > 0)[:, None], a_MN * weight_M[:, None], 0.0)
    ptrs = am_ptr + (token_M.to(tl.int64) * E + expert)[:, None] * F + cols_N[None, :]
    tl.store(ptrs, am_MN.to(am_ptr.dtype.element_ty), mask=live_M[:, None] & (cols_N < F)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def dense_down_kernel(
    am_ptr,  # [T, E, F]
    weight_ptr,  # [E, T] float32
    w2,  # [E, D, F], pointer or descriptor
    b2_ptr,  # [E, D] or None
    y_ptr,  # out: [T, D]
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    W_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One loop over the neurons of all experts. Grid: (row tiles x column tiles)."""
    follow(DEPENDENT)
    col_tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    steps: tl.constexpr = (F + BLOCK_K - 1) // BLOCK_K
    n = tl.program_id(0) % col_tiles * BLOCK_N
    token_M = tl.program_id(0) // col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live_M = token_M < num_tokens
    cols_N = n + tl.arange(0, BLOCK_N)
    am_offset_M = tl.where(live_M, token_M, 0).to(tl.int64) * (E * F)
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, E * steps):
        expert = step // steps
        k = step % steps * BLOCK_K
        cols_K = k + tl.arange(0, BLOCK_K)
        ptrs = am_ptr + am_offset_M[:, None] + (expert * F + cols_K)[None, :]
        am_MK = tl.load(ptrs, mask=(cols_K < F)[None, :], other=0.0)
        w_KN = load_weight(w2, expert, k, n, F, D, True, W_TMA, BLOCK_K, BLOCK_N)
        y_MN = tl.dot(am_MK, w_KN, y_MN, input_precision=PRECISION)
    if b2_ptr is not None:
        for e in tl.range(0, E):
            weight_M = tl.load(weight_ptr + e * num_tokens + token_M, mask=live_M, other=0.0)
            b2_N = tl.load(b2_ptr + e * D + cols_N, mask=cols_N < D, other=0.0).to(tl.float32)
            y_MN += tl.where((weight_M != 0)[:, None], weight_M[:, None] * b2_N[None, :], 0.0)
    ptrs = y_ptr + token_M.to(tl.int64)[:, None] * D + cols_N[None, :]
    tl.store(ptrs, y_MN.to(y_ptr.dtype.element_ty), mask=live_M[:, None] & (cols_N < D)[None, :])
