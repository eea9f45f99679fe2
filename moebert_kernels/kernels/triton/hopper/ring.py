"""What the warp-specialised kernels share: tiles, layouts, and the ring of stages that feeds the products.

A program is three groups of warps: a producer, which loads, and two consumers, which multiply. Program p
takes the tiles p, p + P, p + 2P, ... of P programs, columns fastest, and its consumers take these in turn
("ping-pong"): one's epilogue runs beside the other's products.

A program's K steps are numbered through all its tiles: of its j-th tile they begin at j * STEPS. Step s uses
stage s % STAGES for the (s // STAGES)-th time. The ring is a tuple of what lies in shared memory:

    rows, weights    a stage's tiles: [STAGES, BLOCK_M, BLOCK_K], [STAGES, BLOCK_N, BLOCK_K] or turned round
    full[stage]      a barrier, completed once for each use: the step's tiles have come
    empty[stage]     completed once for each use: its products have read them
    turn[consumer]   completed once for each tile of the other consumer: it has seen its last step's tiles

Without `turn` a consumer could ask for the parity of the round before the one it needs, and be told of that:
`tests/kernels/test_hopper.py` plays the protocol through.
"""

# ruff: noqa: RET505 - branches on constants choose what is compiled at all

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CONSUMERS = gl.constexpr(2)
GATHERING_WARPS = gl.constexpr(4)  # of a producer


@gluon.constexpr_function
def accumulator_layout(block_n):
    """That of a consumer's sums: its four warps take 64 rows and all columns in one instruction."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, block_n, 16])


@gluon.constexpr_function
def row_layout(block_n):
    """That of 128 rows in memory: four lanes have 64 neighbouring bytes of a row of 16-bit elements.

    Every row is in the warp that multiplied it, so that the way there leads through no other.
    """
    columns = [[0, column] for column in (32, 64) if column < block_n]
    of_register = [[0, 1], [0, 2], [0, 4], [8, 0], *columns, [64, 0]]
    of_lane = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    of_warp = [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(of_register, of_lane, of_warp, [], [128, block_n])


@gluon.jit
def count_tiles(offsets_ptr, E: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Tiles of all experts, each of which starts a row tile of its own."""
    tiles = 0
    for e in gl.static_range(E):
        tiles += (gl.load(offsets_ptr + e + 1) - gl.load(offsets_ptr + e) + BLOCK_M - 1) // BLOCK_M
    return tiles * COLUMNS


@gluon.jit
def find_rows(row_tile, offsets_ptr, E: gl.constexpr, BLOCK_M: gl.constexpr):
    """The expert of a row tile, its first row and the end of the expert's."""
    expert = 0
    begin = 0
    end = 0
    first_tile = 0
    for e in gl.static_range(E):
        begin_e = gl.load(offsets_ptr + e)
        end_e = gl.load(offsets_ptr + e + 1)
        is_mine = (row_tile >= first_tile) & (end_e > begin_e)
        expert = gl.where(is_mine, e, expert)
        begin = gl.where(is_mine, begin_e + (row_tile - first_tile) * BLOCK_M, begin)
        end = gl.where(is_mine, end_e, end)
        first_tile += (end_e - begin_e + BLOCK_M - 1) // BLOCK_M
    return expert, begin, end


@gluon.jit
def make_ring(
    w_desc,
    ARRIVALS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The ring of a program; so many arrivals make a stage full."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], w_desc.dtype)
    rows = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], layout)
    weights = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(i), count=1)
    return rows, weights, full, empty, turn


@gluon.jit
def wait_for_stage(step, empty):
    """The producer's stage for a step, once the products that had it have read it."""
    STAGES: gl.constexpr = empty.shape[0]
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    return stage


@gluon.jit
def load_weight(
    w_desc, expert, n, k, ready, buffer, N: gl.constexpr, K: gl.constexpr, ROWS_ARE_N: gl.constexpr
):
    """Begin to load a tile of an expert's matrix: [E * N, K] if ROWS_ARE_N, else [E * K, N]."""
    if ROWS_ARE_N:
        tma.async_copy_global_to_shared(w_desc, [expert * N + n, k], ready, buffer)
    else:
        tma.async_copy_global_to_shared(w_desc, [expert * K + k, n], ready, buffer)


@gluon.jit
def load_sorted(
    a_desc,
    w_desc,
    offsets_ptr,
    ring,
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    ROWS_ARE_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """The producer of one warp: sorted rows come by TMA, which one thread starts."""
    rows, weights, full, empty, _turn = ring
    COLUMNS: gl.constexpr = N // BLOCK_N
    step = 0
    for tile in range(gl.program_id(0), count_tiles(offsets_ptr, E, COLUMNS, BLOCK_M), gl.num_programs(0)):
        expert, begin, _end = find_rows(tile // COLUMNS, offsets_ptr, E, BLOCK_M)
        n = tile % COLUMNS * BLOCK_N
        for k in range(0, K, BLOCK_K):
            stage = wait_for_stage(step, empty)
            ready = full.index(stage)
            mbarrier.expect(ready, a_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [begin, k], ready, rows.index(stage))
            load_weight(w_desc, expert, n, k, ready, weights.index(stage), N, K, ROWS_ARE_N)
            step += 1


@gluon.jit
def load_gathered(
    x_ptr,
    x_stride,
    order_ptr,
    w_desc,
    offsets_ptr,
    ring,
    E: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    TOP_K: gl.constexpr,
    ROWS_ARE_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """The producer of four warps: rows come by cp.async, and each thread tells `full` when its own have come.

    Offsets are of 32 bits: the rows reach over fewer than 2^31 elements (`launches.fits`). No proxy fence
    stands between these copies and the products, nor does one in CUTLASS's loop of this kind, or in what
    Triton makes of `grouped`.
    """
    rows, weights, full, empty, _turn = ring
    COLUMNS: gl.constexpr = N // BLOCK_N
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_K, BLOCK_K // 8], [gl.num_warps(), 1], [1, 0]
    )
    tiles = count_tiles(offsets_ptr, E, COLUMNS, BLOCK_M)
    cols_K = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, begin, end = find_rows(tile // COLUMNS, offsets_ptr, E, BLOCK_M)
        n = tile % COLUMNS * BLOCK_N
        rows_M = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        # Rows past the end repeat the last one.
        token_M = gl.load(order_ptr + gl.minimum(rows_M, end - 1)) // TOP_K
        offset_MK = gl.expand_dims(token_M * x_stride, 1) + gl.expand_dims(cols_K, 0)
        for k in range(0, K, BLOCK_K):
            stage = wait_for_stage(step, empty)
            ready = full.index(stage)
            mbarrier.expect(ready, w_desc.block_type.nbytes)
            load_weight(w_desc, expert, n, k, ready, weights.index(stage), N, K, ROWS_ARE_N)
            async_copy.async_copy_global_to_shared(rows.index(stage), x_ptr + k + offset_MK)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def start_from(
    b_ptr, expert, n, N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr
):
    """[BLOCK_M, BLOCK_N] float32 with the tile's bias in every row, or 0: what products are added to."""
    zero_MN = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    if b_ptr is None:
        return zero_MN
    else:
        cols_N = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        return zero_MN + gl.expand_dims(gl.load(b_ptr + expert * N + cols_N).to(gl.float32), 0)


@gluon.jit
def multiply(acc_MN, first, round, ring, WHICH: gl.constexpr, ROWS_ARE_N: gl.constexpr, STEPS: gl.constexpr):
    """`acc_MN` and the products of a tile's steps, from `first` on; the last are still under way (`finish`).

    They wait for the consumer's turn, release each stage when the next one's are under way, and give the turn
    on.
    """
    rows, weights, full, empty, turn = ring
    STAGES: gl.constexpr = full.shape[0]
    # The other consumer's tile before is of the same round, or of the round before.
    if WHICH == 0:
        mbarrier.wait(turn.index(0), (round & 1) ^ 1)
    else:
        mbarrier.wait(turn.index(1), round & 1)
    for step in range(first, first + STEPS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        weight = weights.index(stage)
        if ROWS_ARE_N:
            weight = weight.permute((1, 0))
        acc_MN = warpgroup_mma(rows.index(stage), weight, acc_MN, is_async=True)
        acc_MN = warpgroup_mma_wait(1, deps=(acc_MN,))
        # Of a tile's first step the one before is another tile's, and released.
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > first)
    mbarrier.arrive(turn.index(1 - WHICH), count=1)
    return acc_MN


@gluon.jit
def finish(acc_MN, first, ring, STEPS: gl.constexpr):
    """Wait for the last products of `multiply` and release their stage."""
    _rows, _weights, _full, empty, _turn = ring
    STAGES: gl.constexpr = empty.shape[0]
    acc_MN = warpgroup_mma_wait(0, deps=(acc_MN,))
    mbarrier.arrive(empty.index((first + STEPS - 1) % STAGES), count=1)
    return acc_MN


@gluon.jit
def load_rows(ptr, row_M, live_M, n, N: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """A tile of the rows [*, N], from column n on; 0 where they are not live."""
    cols_N = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    ptrs = ptr + gl.expand_dims(row_M.to(gl.int64) * N, 1) + gl.expand_dims(cols_N, 0)
    return gl.load(ptrs, mask=gl.expand_dims(live_M, 1), other=0.0)


@gluon.jit
def store_rows(ptr, tile_MN, row_M, live_M, n, N: gl.constexpr, layout: gl.constexpr):
    """Write a tile to live rows of [*, N], from column n on, by a layout."""
    tile_MN = gl.convert_layout(tile_MN.to(ptr.dtype.element_ty), layout)
    cols_N = n + gl.arange(0, tile_MN.shape[1], gl.SliceLayout(0, layout))
    ptrs = ptr + gl.expand_dims(row_M.to(gl.int64) * N, 1) + gl.expand_dims(cols_N, 0)
    gl.store(ptrs, tile_MN, mask=gl.expand_dims(live_M, 1))
