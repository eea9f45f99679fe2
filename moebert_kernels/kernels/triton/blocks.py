"""The building blocks every grouped GEMM here is made of: which rows a tile has, the K loop, the activation.

Notation as in `kernels.call`, S slots in sorted order. A tile is BLOCK_M sorted rows of one group by BLOCK_N
columns. Group e < E is expert e's rows; group E is the slots that have no expert, which come last in the
sorted order.
"""

# ruff: noqa: RET505, SIM108 - branches on constants choose what is compiled at all

import triton
import triton.language as tl

# A plan is one layer's part of tables for all of them, and begins anywhere: no kernel counts on more.
OF_PLAN = ["order_ptr", "offsets_ptr", "expert_ids_ptr"]


@triton.jit
def find_rows(tile, offsets_ptr, num_slots, E: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """The group of row tile `tile`, its first row and the end of the group.

    Every group starts a tile of its own, so S slots make at most cdiv(S, BLOCK_M) + E tiles: the grid depends
    on shapes alone, and a tile past the last group gets a group above E. GROUPS is the power of two above E.
    """
    g = tl.arange(0, GROUPS)
    begin_G = tl.load(offsets_ptr + g, mask=g <= E, other=num_slots)
    end_G = tl.load(offsets_ptr + g + 1, mask=g < E, other=num_slots)
    tiles_G = (end_G - begin_G + BLOCK_M - 1) // BLOCK_M
    until_G = tl.cumsum(tiles_G, 0)
    group = tl.sum((until_G <= tile).to(tl.int32), 0)
    mine_G = g == group
    first_tile = tl.sum(tl.where(mine_G, until_G - tiles_G, 0), 0)
    begin = tl.sum(tl.where(mine_G, begin_G, 0), 0) + (tile - first_tile) * BLOCK_M
    end = tl.sum(tl.where(mine_G, end_G, 0), 0)
    return group, begin, end


@triton.jit
def load_weight(
    w,
    expert,
    k,
    n,
    K: tl.constexpr,
    N,
    ROWS_ARE_N: tl.constexpr,
    W_TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N_IS_WHOLE: tl.constexpr,
):
    """A [BLOCK_K, BLOCK_N] tile of one expert's matrix, 0 outside it.

    `w` is stored [E, N, K] if ROWS_ARE_N, else [E, K, N], and is a TMA descriptor of it if W_TMA: one of
    three axes, so that a tile that overhangs reads zeros and never the next expert. N_IS_WHOLE says that N is
    a multiple of BLOCK_N.
    """
    if W_TMA and ROWS_ARE_N:
        w_KN = w.load([expert, n, k]).reshape(BLOCK_N, BLOCK_K).T
    elif W_TMA:
        w_KN = w.load([expert, k, n]).reshape(BLOCK_K, BLOCK_N)
    else:
        rows_K = k + tl.arange(0, BLOCK_K)
        cols_N = n + tl.arange(0, BLOCK_N)
        ptrs = w + tl.cast(expert, tl.int64) * (N * K)
        if ROWS_ARE_N:
            ptrs += cols_N.to(tl.int64)[None, :] * K + rows_K[:, None]
        else:
            ptrs += rows_K.to(tl.int64)[:, None] * N + cols_N[None, :]
        if K % BLOCK_K == 0 and N_IS_WHOLE:
            w_KN = tl.load(ptrs)
        else:
            w_KN = tl.load(ptrs, mask=(rows_K < K)[:, None] & (cols_N < N)[None, :], other=0.0)
    return w_KN


@triton.jit
def multiply(
    a,
    a_begin,
    a_offset_M,
    w,
    expert,
    n,
    K: tl.constexpr,
    N,
    ROWS_ARE_N: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N_IS_WHOLE: tl.constexpr,
    A_COLUMN: tl.constexpr = 0,
    start_MN=None,
):
    """[BLOCK_M, K] rows times one expert's [K, BLOCK_N] columns, accumulated in float32 on `start_MN` or 0.

    The rows are those from `a_begin` on of the descriptor `a` if A_TMA, else those at element offsets
    `a_offset_M` of the pointer `a`; of their columns those from A_COLUMN on. What rows past the end of the
    group hold is the caller's not to store.

    Where float32 is kept, the products of even k and those of odd k are added up apart: half as many
    roundings in a row, as cuBLAS has them. In one row, errors were larger than PyTorch's.
    """
    dtype: tl.constexpr = a.dtype if A_TMA else a.dtype.element_ty
    # `tl.dot` takes 16 products a step at least.
    IN_TWO: tl.constexpr = dtype == tl.float32 and PRECISION == "ieee" and BLOCK_K >= 32
    if start_MN is None:
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        acc_MN = start_MN
    odd_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if A_TMA:
            a_MK = a.load([a_begin, A_COLUMN + k])
        else:
            cols_K = k + tl.arange(0, BLOCK_K)
            ptrs = a + A_COLUMN + a_offset_M[:, None] + cols_K[None, :]
            if K % BLOCK_K == 0:
                a_MK = tl.load(ptrs)
            else:
                a_MK = tl.load(ptrs, mask=(cols_K < K)[None, :], other=0.0)
        w_KN = load_weight(w, expert, k, n, K, N, ROWS_ARE_N, W_TMA, BLOCK_K, BLOCK_N, N_IS_WHOLE)
        if IN_TWO:
            a_even, a_odd = a_MK.reshape(BLOCK_M, BLOCK_K // 2, 2).split()
            w_even, w_odd = w_KN.reshape(BLOCK_K // 2, 2, BLOCK_N).permute(0, 2, 1).split()
            acc_MN = tl.dot(a_even, w_even, acc_MN, input_precision=PRECISION)
            odd_MN = tl.dot(a_odd, w_odd, odd_MN, input_precision=PRECISION)
        else:
            acc_MN = tl.dot(a_MK, w_KN, acc_MN, input_precision=PRECISION)
    if IN_TWO:
        # Not `+`: after a loop of one step the compiler would fold that into one chain of products.
        acc_MN = tl.fma(odd_MN, 1.0, acc_MN)
    return acc_MN


@triton.jit
def find_columns(tile, C: tl.constexpr, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of hidden column tile `tile`: whether its neurons are shared, their number among these or the expert's.

    Hidden activations have C columns of shared neurons, then F of the expert's own; no tile has some of both.
    """
    shared_tiles: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    if C == 0:
        return False, tile * BLOCK_N
    is_shared = tile < shared_tiles
    return is_shared, tl.where(is_shared, tile, tile - shared_tiles) * BLOCK_N


@triton.jit
def multiply_hidden(
    a,
    a_offset_M,
    is_shared,
    shared_w,
    w,
    expert,
    n,
    K: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`multiply` of gathered rows with columns of one layer's neurons, the shared ones' or the expert's."""
    if C == 0:
        acc_MN = multiply(
            a, 0, a_offset_M, w, expert, n,
            K, F, ROWS_ARE_N, False, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, F % BLOCK_N == 0,
        )  # fmt: skip
    else:
        # One loop of products: of two in branches, each would have its own shared memory.
        mine = tl.where(is_shared, shared_w, w + tl.cast(expert, tl.int64) * (F * K))
        acc_MN = multiply(
            a, 0, a_offset_M, mine, 0, n,
            K, tl.where(is_shared, C, F), ROWS_ARE_N, False, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            C % BLOCK_N == 0 and F % BLOCK_N == 0,
        )  # fmt: skip
    return acc_MN


@triton.jit
def split_columns(tile_MN, PARTS: tl.constexpr):
    """The tile in 1, 2 or 4 column blocks from left to right: an epilogue in parts needs fewer registers."""
    if PARTS == 1:
        parts = (tile_MN,)
    else:
        left, right = _halves(tile_MN)
        if PARTS == 2:
            parts = (left, right)  # type: ignore[assignment]
        else:
            tl.static_assert(PARTS == 4)
            left_0, left_1 = _halves(left)
            right_0, right_1 = _halves(right)
            parts = (left_0, left_1, right_0, right_1)  # type: ignore[assignment]
    return parts


@triton.jit
def _halves(tile_MN):
    M: tl.constexpr = tile_MN.shape[0]
    N: tl.constexpr = tile_MN.shape[1]
    return tile_MN.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def rounds_to_half(ptr):
    """Whether what is stored through a pointer keeps 16 bits: for FAST below."""
    return ptr.dtype.element_ty.primitive_bitwidth == 16


@triton.jit
def activate(h, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """act(h) in float32. FAST is for results that are rounded to 16 bits.

    FAST GELU is off by at most 0.3 units of their last place where |act(h)| > 1e-7, else by less than 1e-9.
    """
    if ACTIVATION == "gelu" and not FAST:
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "relu":
        return tl.where(h > 0, h, 0.0)
    else:
        return h * _sigmoid(_logit(h, ACTIVATION), FAST)


@triton.jit
def activate_with_slope(h, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """act(h) and act'(h) in float32; FAST as in `activate`, the slope off by at most 6e-5."""
    if ACTIVATION == "gelu" and not FAST:
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        return h * cdf, cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "relu":
        return tl.where(h > 0, h, 0.0), tl.where(h > 0, 1.0, 0.0)
    else:
        # 1 - sigmoid(v) = sigmoid(-v) without the cancellation, which shows where float32 is kept.
        v = _logit(h, ACTIVATION)
        s = _sigmoid(v, FAST)
        rest = 1.0 - s if FAST else _sigmoid(-v, FAST)
        return h * s, s + h * s * rest * _logit_slope(h, ACTIVATION)


@triton.jit
def _logit(h, ACTIVATION: tl.constexpr):
    """v with act(h) = h * sigmoid(v).

    For GELU log(Phi(h) / Phi(-h)), an odd function: minimax over |h| <= 5.5, in units of the last place that
    the result has in float16 or bfloat16. Beyond, v goes on growing, so that sigmoid(v) goes to 0 and 1.
    """
    if ACTIVATION == "gelu":
        z = h * h
        p = 9.706270232001657e-10 * z - 9.975634185366289e-08
        p = p * z + 3.922547421097988e-06
        p = p * z - 6.458189454860985e-05
        p = p * z - 0.00031979367486201227
        p = p * z + 0.07326633483171463
        return h * (p * z + 1.5953668355941772)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u)
        return 1.5957691216057308 * h * (1.0 + 0.044715 * h * h)
    else:
        tl.static_assert(ACTIVATION == "silu")
        return h


@triton.jit
def _logit_slope(h, ACTIVATION: tl.constexpr):
    """v'(h) of `_logit`."""
    if ACTIVATION == "gelu":
        z = tl.minimum(h * h, 64.0)  # beyond, its factor is 0: it must not be 0 * inf
        p = 1.2618150968535247e-08 * z - 1.0973197959174286e-06
        p = p * z + 3.530292815412395e-05
        p = p * z - 0.00045207326184026897
        p = p * z - 0.0015989684034138918
        p = p * z + 0.2197990119457245
        return p * z + 1.5953668355941772
    elif ACTIVATION == "gelu_tanh":
        return 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    else:
        return 1.0


@triton.jit
def _sigmoid(v, FAST: tl.constexpr):
    if FAST:
        # Two instructions of the special function unit; a division would be eight more of the others.
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * v))
        return root * root
    else:
        return tl.sigmoid(v)
