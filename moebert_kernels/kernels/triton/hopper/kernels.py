"""The grouped GEMMs of `grouped`, warp-specialised for Hopper.

    gather_pingpong_kernel             a = act(h), h = x[token] W1^T + b1    sorted rows out
    scatter_pingpong_kernel            z[slot] = a W2^T + b2                 slot rows out; dx[slot] = dh W1
    gather_backward_pingpong_kernel    dh = (dz[slot] W2) * slope            sorted rows out

Each does what the kernel without "pingpong" does, with row tiles cut as there, for the calls that
`launches.fits` lets through: no shared neurons, no gates, whole tiles, no slopes for training.

Grid of all three: as many programs as there are multiprocessors, or tiles if these are fewer. A program is
compiled for the registers that all its threads can have at once (`maxnreg`); then consumers take of the
producer's, as the last argument of `warp_specialize` says.
"""

# ruff: noqa: SIM113 - `enumerate` is not compiled

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moebert_kernels.kernels.triton.blocks import OF_PLAN, activate, split_columns
from moebert_kernels.kernels.triton.hopper.ring import (
    CONSUMERS,
    GATHERING_WARPS,
    accumulator_layout,
    count_tiles,
    find_rows,
    finish,
    load_gathered,
    load_rows,
    load_sorted,
    make_ring,
    multiply,
    row_layout,
    start_from,
    store_rows,
)

_FIRST, _SECOND = gl.constexpr(0), gl.constexpr(1)


@gluon.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=OF_PLAN)
def scatter_pingpong_kernel(
    a_desc,  # [S, K] sorted, tiles [BLOCK_M, BLOCK_K]
    w_desc,  # [E * N, K], tiles [BLOCK_N, BLOCK_K], if ROWS_ARE_N, else [E * K, N], tiles [BLOCK_K, BLOCK_N]
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    b_ptr,  # [E, N] or None
    out_ptr,  # out: [S, N] by slot
    num_slots,
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    SCALE: gl.constexpr,
    ROWS_ARE_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out[order] = (a W_e + b_e) * SCALE, and 0 in the slots that have no expert."""
    ring = make_ring(w_desc, 1, BLOCK_M, BLOCK_K, STAGES)
    gl.warp_specialize(
        [
            (_scatter_consumer, (
                order_ptr, offsets_ptr, b_ptr, out_ptr, num_slots, ring,
                _FIRST, E, N, K, SCALE, ROWS_ARE_N, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
            (_scatter_consumer, (
                order_ptr, offsets_ptr, b_ptr, out_ptr, num_slots, ring,
                _SECOND, E, N, K, SCALE, ROWS_ARE_N, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
            (load_sorted, (
                a_desc, w_desc, offsets_ptr, ring, E, N, K, ROWS_ARE_N, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def _scatter_consumer(
    order_ptr,
    offsets_ptr,
    b_ptr,
    out_ptr,
    num_slots,
    ring,
    WHICH: gl.constexpr,
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    SCALE: gl.constexpr,
    ROWS_ARE_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    COLUMNS: gl.constexpr = N // BLOCK_N
    STEPS: gl.constexpr = K // BLOCK_K
    acc_layout: gl.constexpr = accumulator_layout(BLOCK_N)
    out_layout: gl.constexpr = row_layout(BLOCK_N)
    tiles = count_tiles(offsets_ptr, E, COLUMNS, BLOCK_M)
    programs = gl.num_programs(0)
    round = 0
    for tile in range(gl.program_id(0) + WHICH * programs, tiles, CONSUMERS * programs):
        step = (round * CONSUMERS + WHICH) * STEPS
        expert, begin, end = find_rows(tile // COLUMNS, offsets_ptr, E, BLOCK_M)
        n = tile % COLUMNS * BLOCK_N
        acc_MN = start_from(b_ptr, expert, n, N, BLOCK_M, BLOCK_N, acc_layout)
        acc_MN = multiply(acc_MN, step, round, ring, WHICH, ROWS_ARE_N, STEPS)
        rows_M = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, out_layout))
        slot_M = gl.load(order_ptr + rows_M, mask=rows_M < end, other=0)
        acc_MN = finish(acc_MN, step, ring, STEPS)
        if SCALE != 1.0:
            acc_MN = acc_MN * SCALE
        store_rows(out_ptr, acc_MN, slot_M, rows_M < end, n, N, out_layout)
        round += 1
    # Slots without an expert come last in the sorted order.
    begin = gl.load(offsets_ptr + E)
    zero_tiles = (num_slots - begin + BLOCK_M - 1) // BLOCK_M * COLUMNS
    zero_MN = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, out_layout)
    for tile in range(gl.program_id(0) * CONSUMERS + WHICH, zero_tiles, CONSUMERS * programs):
        rows_M = begin + tile // COLUMNS * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, out_layout))
        slot_M = gl.load(order_ptr + rows_M, mask=rows_M < num_slots, other=0)
        store_rows(out_ptr, zero_MN, slot_M, rows_M < num_slots, tile % COLUMNS * BLOCK_N, N, out_layout)


@gluon.jit(do_not_specialize_on_alignment=OF_PLAN)
def gather_pingpong_kernel(
    x_ptr,  # [T, K], rows x_stride apart
    x_stride,
    w_desc,  # [E * N, K], tiles [BLOCK_N, BLOCK_K]
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    b_ptr,  # [E, N] or None
    a_ptr,  # out: [S, N] sorted
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """a = act(x[order // TOP_K] W1_e^T + b1_e); rows without an expert are not written."""
    ring = make_ring(w_desc, 1 + 32 * GATHERING_WARPS, BLOCK_M, BLOCK_K, STAGES)
    gl.warp_specialize(
        [
            (_gather_consumer, (
                offsets_ptr, b_ptr, a_ptr, ring, _FIRST, E, N, K, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
            (_gather_consumer, (
                offsets_ptr, b_ptr, a_ptr, ring, _SECOND, E, N, K, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
            (load_gathered, (
                x_ptr, x_stride, order_ptr, w_desc, offsets_ptr, ring,
                E, N, K, TOP_K, True, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
        ],
        [4, GATHERING_WARPS],
        [208, 88],
    )  # fmt: skip


@gluon.jit
def _gather_consumer(
    offsets_ptr,
    b_ptr,
    a_ptr,
    ring,
    WHICH: gl.constexpr,
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    COLUMNS: gl.constexpr = N // BLOCK_N
    STEPS: gl.constexpr = K // BLOCK_K
    acc_layout: gl.constexpr = accumulator_layout(BLOCK_N)
    out_layout: gl.constexpr = row_layout(BLOCK_N)
    tiles = count_tiles(offsets_ptr, E, COLUMNS, BLOCK_M)
    programs = gl.num_programs(0)
    round = 0
    for tile in range(gl.program_id(0) + WHICH * programs, tiles, CONSUMERS * programs):
        step = (round * CONSUMERS + WHICH) * STEPS
        expert, begin, end = find_rows(tile // COLUMNS, offsets_ptr, E, BLOCK_M)
        n = tile % COLUMNS * BLOCK_N
        h_MN = start_from(b_ptr, expert, n, N, BLOCK_M, BLOCK_N, acc_layout)
        h_MN = multiply(h_MN, step, round, ring, WHICH, True, STEPS)
        h_MN = finish(h_MN, step, ring, STEPS)
        rows_M = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, out_layout))
        store_rows(a_ptr, activate(h_MN, ACTIVATION, True), rows_M, rows_M < end, n, N, out_layout)
        round += 1


@gluon.jit(do_not_specialize_on_alignment=OF_PLAN)
def gather_backward_pingpong_kernel(
    dy_ptr,  # [S / DY_TOP_K, K], rows dy_stride apart
    dy_stride,
    w_desc,  # [E * K, N], tiles [BLOCK_K, BLOCK_N]
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    slope_ptr,  # [S, N] sorted
    dh_ptr,  # out: [S, N] sorted
    db1_ptr,  # out: [row tiles, N] float32, the column sums of dh, or None
    db2_ptr,  # out: [row tiles, K] float32, the column sums of SCALE * dy, or None
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    DY_TOP_K: gl.constexpr,
    SCALE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dh = (dy[order // DY_TOP_K] W2_e) * slope * SCALE, and the row tile's parts of the bias gradients."""
    ring = make_ring(w_desc, 1 + 32 * GATHERING_WARPS, BLOCK_M, BLOCK_K, STAGES)
    gl.warp_specialize(
        [
            (_gather_backward_consumer, (
                dy_ptr, dy_stride, order_ptr, offsets_ptr, slope_ptr, dh_ptr, db1_ptr, db2_ptr, ring,
                _FIRST, E, N, K, DY_TOP_K, SCALE, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
            (_gather_backward_consumer, (
                dy_ptr, dy_stride, order_ptr, offsets_ptr, slope_ptr, dh_ptr, db1_ptr, db2_ptr, ring,
                _SECOND, E, N, K, DY_TOP_K, SCALE, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
            (load_gathered, (
                dy_ptr, dy_stride, order_ptr, w_desc, offsets_ptr, ring,
                E, N, K, DY_TOP_K, False, BLOCK_M, BLOCK_N, BLOCK_K,
            )),
        ],
        [4, GATHERING_WARPS],
        [208, 88],
    )  # fmt: skip


@gluon.jit
def _gather_backward_consumer(
    dy_ptr,
    dy_stride,
    order_ptr,
    offsets_ptr,
    slope_ptr,
    dh_ptr,
    db1_ptr,
    db2_ptr,
    ring,
    WHICH: gl.constexpr,
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    DY_TOP_K: gl.constexpr,
    SCALE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    PARTS: gl.constexpr = 4  # of the columns: with slopes beside them, more registers than there are else
    COLUMNS: gl.constexpr = N // BLOCK_N
    STEPS: gl.constexpr = K // BLOCK_K
    PART_N: gl.constexpr = BLOCK_N // PARTS
    acc_layout: gl.constexpr = accumulator_layout(BLOCK_N)
    out_layout: gl.constexpr = row_layout(PART_N)
    tiles = count_tiles(offsets_ptr, E, COLUMNS, BLOCK_M)
    programs = gl.num_programs(0)
    round = 0
    for tile in range(gl.program_id(0) + WHICH * programs, tiles, CONSUMERS * programs):
        step = (round * CONSUMERS + WHICH) * STEPS
        row_tile = tile // COLUMNS
        _expert, begin, end = find_rows(row_tile, offsets_ptr, E, BLOCK_M)
        n = tile % COLUMNS * BLOCK_N
        if db2_ptr is not None:
            # Beside the other consumer's products, before this one's take the registers.
            _sum_rows(
                dy_ptr, dy_stride, order_ptr, begin, end, db2_ptr + row_tile * K, tile % COLUMNS,
                K, DY_TOP_K, SCALE, COLUMNS, BLOCK_M,
            )  # fmt: skip
        da_MN = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, acc_layout)
        da_MN = multiply(da_MN, step, round, ring, WHICH, False, STEPS)
        rows_M = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, out_layout))
        live_M = rows_M < end
        # 0 in rows past the end, so that they add nothing to the column sums.
        next_slope = load_rows(slope_ptr, rows_M, live_M, n, N, PART_N, out_layout)
        da_MN = finish(da_MN, step, ring, STEPS)
        da_parts = split_columns(da_MN, PARTS)
        for i in gl.static_range(PARTS):
            n_i = n + i * PART_N
            slope_MN = gl.convert_layout(next_slope, da_parts[i].type.layout)
            if i + 1 < PARTS:
                next_slope = load_rows(slope_ptr, rows_M, live_M, n_i + PART_N, N, PART_N, out_layout)
            dh_MN = da_parts[i] * slope_MN.to(gl.float32)
            if SCALE != 1.0:
                dh_MN = dh_MN * SCALE
            if db1_ptr is not None:
                sum_N = gl.sum(dh_MN, 0)
                cols_N = n_i + gl.arange(0, PART_N, sum_N.type.layout)
                gl.store(db1_ptr + row_tile * N + cols_N, sum_N)
            store_rows(dh_ptr, dh_MN, rows_M, live_M, n_i, N, out_layout)
        round += 1


@gluon.jit
def _sum_rows(
    dy_ptr,
    dy_stride,
    order_ptr,
    begin,
    end,
    db2_ptr,
    column_tile,
    K: gl.constexpr,
    DY_TOP_K: gl.constexpr,
    SCALE: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """The row tile's part of db2; its column tiles share the columns of dy among them."""
    BLOCK: gl.constexpr = 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows_M = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    token_M = gl.load(order_ptr + gl.minimum(rows_M, end - 1)) // DY_TOP_K
    row_ptrs = dy_ptr + gl.expand_dims(token_M * dy_stride, 1)
    live_M1 = gl.expand_dims(rows_M < end, 1)
    for d in range(column_tile * BLOCK, K, COLUMNS * BLOCK):
        cols = d + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        dy = gl.load(row_ptrs + gl.expand_dims(cols, 0), mask=live_M1, other=0.0).to(gl.float32)
        sums = gl.sum(dy, 0)
        gl.store(db2_ptr + cols, sums * SCALE)
