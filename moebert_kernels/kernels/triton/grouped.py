"""The two grouped GEMMs of a pass: gather and multiply, multiply and scatter.

    forward    gather_kernel    a = act(h), slope = act'(h), h = x[token] W1^T + b1    sorted rows out
               scatter_kernel   z[slot] = (a W2^T + b2) * gate                         slot rows out
    backward   gather_backward  dh = (dz[slot] W2) * slope * gate                      sorted rows out
               scatter_kernel   dx[slot] = dh W1                                       slot rows out

For backward the slope is kept in place of h: computed once, where h is at hand in float32, it leaves the
data gradient's epilogue one product.

Where experts share C neurons, hidden rows have N = C + F columns, shared first. A tile of them takes its
weights from the shared block or from the expert's (`blocks.find_columns`); products over them go through the
shared columns, then the expert's. Without any, C is 0, and nothing of this is compiled.

Grid of all three: (row tiles x column tiles), columns fastest so that neighbours share their rows in L2; row
tiles are bounded by shapes alone (`blocks.find_rows`). Invariant: every element of every output is written
exactly once, except sorted rows without an expert in `dh`, `ga` and, in inference, `a`, which nobody reads.
"""

import triton
import triton.language as tl

from moebert_kernels.kernels.triton.blocks import (
    OF_PLAN,
    activate,
    activate_with_slope,
    find_columns,
    find_rows,
    multiply,
    multiply_hidden,
    rounds_to_half,
    split_columns,
)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=OF_PLAN)
def gather_kernel(
    x_ptr,  # [T, D], rows x_stride apart
    x_stride,
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    w1_ptr,  # [E, F, D]
    b1_ptr,  # [E, F] or None
    shared_w1_ptr,  # [C, D] or None
    shared_b1_ptr,  # [C] or None
    a_ptr,  # out: [S, N] sorted
    slope_ptr,  # out: [S, N] sorted, or None
    num_slots,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """a = act(x[order // TOP_K] W1_e^T + b1_e), and act' of the same if there is room for it."""
    col_tiles: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N + (F + BLOCK_N - 1) // BLOCK_N
    is_shared, n = find_columns(tl.program_id(0) % col_tiles, C, F, BLOCK_N)
    group, begin, end = find_rows(tl.program_id(0) // col_tiles, offsets_ptr, num_slots, E, BLOCK_M, GROUPS)
    if group > E:
        return
    if group == E:
        if slope_ptr is not None:
            zero_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            _store_hidden(a_ptr, zero_MN, begin, end, is_shared, n, C, F)
            _store_hidden(slope_ptr, zero_MN, begin, end, is_shared, n, C, F)
        return
    rows_M = begin + tl.arange(0, BLOCK_M)
    token_M = tl.load(order_ptr + tl.minimum(rows_M, end - 1)) // TOP_K
    acc_MN = multiply_hidden(
        x_ptr, token_M.to(tl.int64) * x_stride, is_shared, shared_w1_ptr, w1_ptr, group, n,
        D, C, F, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    h_parts = split_columns(acc_MN, PARTS)
    for i in tl.static_range(PARTS):
        _finish_gather(
            h_parts[i],
            group,
            begin,
            end,
            is_shared,
            n + i * (BLOCK_N // PARTS),
            b1_ptr,
            shared_b1_ptr,
            a_ptr,
            slope_ptr,
            C,
            F,
            ACTIVATION,
        )


@triton.jit
def _finish_gather(
    h_MN,
    expert,
    begin,
    end,
    is_shared,
    n,
    b1_ptr,
    shared_b1_ptr,
    a_ptr,
    slope_ptr,
    C: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    if b1_ptr is not None:
        if C == 0:
            h_MN += _load_bias(b1_ptr, expert, n, F, h_MN.shape[1])[None, :]
        else:
            of_tile_ptr = tl.where(is_shared, shared_b1_ptr, b1_ptr + expert * F)
            cols_N = n + tl.arange(0, h_MN.shape[1])
            live_N = cols_N < tl.where(is_shared, C, F)
            h_MN += tl.load(of_tile_ptr + cols_N, mask=live_N, other=0.0).to(tl.float32)[None, :]
    if slope_ptr is None:
        a_MN = activate(h_MN, ACTIVATION, rounds_to_half(a_ptr))
    else:
        a_MN, slope_MN = activate_with_slope(h_MN, ACTIVATION, rounds_to_half(a_ptr))
        _store_hidden(slope_ptr, slope_MN, begin, end, is_shared, n, C, F)
    _store_hidden(a_ptr, a_MN, begin, end, is_shared, n, C, F)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=OF_PLAN)
def gather_backward_kernel(
    dy_ptr,  # [S / DY_TOP_K, D], rows dy_stride apart
    dy_stride,
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    w2_ptr,  # [E, D, F]
    shared_w2_ptr,  # [D, C] or None
    gate_ptr,  # [S] by slot, or None for SCALE
    a_ptr,  # [S, N] sorted, for ga and dgate
    slope_ptr,  # [S, N] sorted
    dh_ptr,  # out: [S, N] sorted, or None
    ga_ptr,  # out: [S, N] sorted, gate * a, or None
    dgate_ptr,  # out: [column tiles, S] sorted, parts of <W2^T dy, a>, or None
    db1_ptr,  # out: [row tiles, N] float32, the column sums of dh, or None
    db2_ptr,  # out: [row tiles, D] float32, the column sums of gate * dy, or None
    num_slots,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    DY_TOP_K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """dh = (dy[order // DY_TOP_K] W2_e) * slope * gate; what dW2 and the gate's gradient need of a; and the
    row tile's parts of the bias gradients, which `rows.sum_tiles_kernel` adds up."""
    col_tiles: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N + (F + BLOCK_N - 1) // BLOCK_N
    row_tile = tl.program_id(0) // col_tiles
    col_tile = tl.program_id(0) % col_tiles
    is_shared, n = find_columns(col_tile, C, F, BLOCK_N)
    group, begin, end = find_rows(row_tile, offsets_ptr, num_slots, E, BLOCK_M, GROUPS)
    if group >= E:
        return
    rows_M = begin + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one: nothing of another expert's tokens can get into the sums.
    slot_M = tl.load(order_ptr + tl.minimum(rows_M, end - 1))
    dy_offset_M = (slot_M // DY_TOP_K).to(tl.int64) * dy_stride
    acc_MN = multiply_hidden(
        dy_ptr, dy_offset_M, is_shared, shared_w2_ptr, w2_ptr, group, n,
        D, C, F, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    gate_M = _load_gate(gate_ptr, slot_M, SCALE)
    dgate_M = tl.zeros((BLOCK_M,), tl.float32)
    da_parts = split_columns(acc_MN, PARTS)
    for i in tl.static_range(PARTS):
        dgate_M += _finish_gather_backward(
            da_parts[i],
            gate_M,
            begin,
            end,
            is_shared,
            n + i * (BLOCK_N // PARTS),
            a_ptr,
            slope_ptr,
            dh_ptr,
            ga_ptr,
            dgate_ptr,
            None if db1_ptr is None else db1_ptr + row_tile * (C + F),
            C,
            F,
        )
    if dgate_ptr is not None:
        tl.store(dgate_ptr + col_tile.to(tl.int64) * num_slots + rows_M, dgate_M, mask=rows_M < end)
    if db2_ptr is not None:
        # The column tiles share the columns of dy among them.
        BLOCK: tl.constexpr = 64
        for d in tl.range(col_tile * BLOCK, D, col_tiles * BLOCK, num_stages=1):
            cols = d + tl.arange(0, BLOCK)
            mask = (rows_M < end)[:, None] & (cols < D)[None, :]
            dy = tl.load(dy_ptr + dy_offset_M[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(db2_ptr + row_tile * D + cols, tl.sum(dy * gate_M[:, None], 0), mask=cols < D)


@triton.jit
def _finish_gather_backward(
    da_MN,
    gate_M,
    begin,
    end,
    is_shared,
    n,
    a_ptr,
    slope_ptr,
    dh_ptr,
    ga_ptr,
    dgate_ptr,
    db1_ptr,
    C: tl.constexpr,
    F: tl.constexpr,
):
    """Stores dh, gate * a and the column sums of dh; returns the rows' <da, a> if it is asked for."""
    rows_M = begin + tl.arange(0, da_MN.shape[0])
    cols_N, live_N = _hidden_columns(is_shared, n, da_MN.shape[1], C, F)
    offset_MN = rows_M.to(tl.int64)[:, None] * (C + F) + cols_N[None, :]
    live_MN = (rows_M < end)[:, None] & live_N[None, :]
    dgate_M = tl.zeros((da_MN.shape[0],), tl.float32)
    if dgate_ptr is not None or ga_ptr is not None:
        a_MN = tl.load(a_ptr + offset_MN, mask=live_MN, other=0.0).to(tl.float32)
        if dgate_ptr is not None:
            dgate_M += tl.sum(da_MN * a_MN, 1)
        if ga_ptr is not None:
            _store_hidden(ga_ptr, a_MN * gate_M[:, None], begin, end, is_shared, n, C, F)
    if dh_ptr is not None or db1_ptr is not None:
        # 0 in rows past the end, so that they add nothing to the column sums.
        slope_MN = tl.load(slope_ptr + offset_MN, mask=live_MN, other=0.0).to(tl.float32)
        dh_MN = da_MN * slope_MN * gate_M[:, None]
        if dh_ptr is not None:
            _store_hidden(dh_ptr, dh_MN, begin, end, is_shared, n, C, F)
        if db1_ptr is not None:
            tl.store(db1_ptr + cols_N, tl.sum(dh_MN, 0), mask=live_N)
    return dgate_M


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=OF_PLAN)
def scatter_kernel(
    a,  # [S, C + K] sorted, pointer or descriptor
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    w,  # [E, N, K] if ROWS_ARE_N else [E, K, N], pointer or descriptor
    shared_w,  # the same, [1, N, C] or [1, C, N], or None
    b_ptr,  # [E, N] or None
    gate_ptr,  # [S] by slot, or None for SCALE
    out_ptr,  # out: [S, N] by slot
    num_slots,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    PRECISION: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out[order] = (a W_e + b_e) * gate, and 0 in the slots that have no expert."""
    col_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    n = tl.program_id(0) % col_tiles * BLOCK_N
    group, begin, end = find_rows(tl.program_id(0) // col_tiles, offsets_ptr, num_slots, E, BLOCK_M, GROUPS)
    if group > E:
        return
    rows_M = begin + tl.arange(0, BLOCK_M)
    slot_M = tl.load(order_ptr + rows_M, mask=rows_M < end, other=0)
    if group == E:
        zero_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        _store_rows(out_ptr, zero_MN, slot_M, rows_M < end, n, N)
        return
    a_offset_M = tl.where(rows_M < end, rows_M, begin).to(tl.int64) * (C + K)
    acc_MN = None
    if C > 0:
        acc_MN = multiply(
            a, begin, a_offset_M, shared_w, 0, n,
            C, N, ROWS_ARE_N, A_TMA, W_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, N % BLOCK_N == 0,
        )  # fmt: skip
    acc_MN = multiply(
        a, begin, a_offset_M, w, group, n,
        K, N, ROWS_ARE_N, A_TMA, W_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, N % BLOCK_N == 0, C, acc_MN,
    )  # fmt: skip
    gate_M = _load_gate(gate_ptr, slot_M, SCALE)
    z_parts = split_columns(acc_MN, PARTS)
    for i in tl.static_range(PARTS):
        _finish_scatter(
            z_parts[i], group, slot_M, rows_M < end, gate_M, n + i * (BLOCK_N // PARTS), b_ptr, out_ptr, N
        )


@triton.jit
def _finish_scatter(z_MN, expert, slot_M, live_M, gate_M, n, b_ptr, out_ptr, N: tl.constexpr):
    if b_ptr is not None:
        z_MN += _load_bias(b_ptr, expert, n, N, z_MN.shape[1])[None, :]
    _store_rows(out_ptr, z_MN * gate_M[:, None], slot_M, live_M, n, N)


@triton.jit
def _load_gate(gate_ptr, slot_M, SCALE: tl.constexpr):
    if gate_ptr is None:
        gate_M = tl.full(slot_M.shape, SCALE, tl.float32)
    else:
        gate_M = tl.load(gate_ptr + slot_M).to(tl.float32)
    return gate_M


@triton.jit
def _load_bias(b_ptr, expert, n, N: tl.constexpr, BLOCK_N: tl.constexpr):
    cols_N = n + tl.arange(0, BLOCK_N)
    return tl.load(b_ptr + expert * N + cols_N, mask=cols_N < N, other=0.0).to(tl.float32)


@triton.jit
def _hidden_columns(is_shared, n, BLOCK_N: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """Columns among all N of the tile that begins at neuron `n` of its block, and which of them it has."""
    cols_N = n + tl.arange(0, BLOCK_N)
    if C == 0:
        live_N = cols_N < F
    else:
        live_N = cols_N < tl.where(is_shared, C, F)
        cols_N += tl.where(is_shared, 0, C)
    return cols_N, live_N


@triton.jit
def _store_hidden(ptr, tile_MN, begin, end, is_shared, n, C: tl.constexpr, F: tl.constexpr):
    """Write a tile to the sorted rows [*, N] from `begin` on that come before `end`."""
    rows_M = begin + tl.arange(0, tile_MN.shape[0])
    cols_N, live_N = _hidden_columns(is_shared, n, tile_MN.shape[1], C, F)
    ptrs = ptr + rows_M.to(tl.int64)[:, None] * (C + F) + cols_N[None, :]
    tl.store(ptrs, tile_MN.to(ptr.dtype.element_ty), mask=(rows_M < end)[:, None] & live_N[None, :])


@triton.jit
def _store_rows(ptr, tile_MN, row_M, live_M, n, N: tl.constexpr):
    cols_N = n + tl.arange(0, tile_MN.shape[1])
    ptrs = ptr + row_M.to(tl.int64)[:, None] * N + cols_N[None, :]
    tl.store(ptrs, tile_MN.to(ptr.dtype.element_ty), mask=live_M[:, None] & (cols_N < N)[None, :])
