"""Which GEMMs the warp-specialised kernels fit, and how they are started."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
from torch import Tensor

from moebert_kernels.kernels.call import Call
from moebert_kernels.kernels.triton import configs
from moebert_kernels.kernels.triton.configs import Tile
from moebert_kernels.kernels.triton.launch import (
    descriptor_fits,
    launch,
    most_row_tiles,
    rows_are_aligned,
)
from moebert_kernels.kernels.triton.rows import Parts

CHECKED = "3.6."  # of Triton; in another version Gluon may have other names, or mean something else by them
IS_THERE = triton.__version__.startswith(CHECKED) and not triton.knobs.runtime.interpret

if IS_THERE:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from moebert_kernels.kernels.triton.hopper import kernels

TILE = Tile(128, 128, 64, warps=4, stages=6)  # warps of each consumer
MOST_EXPERTS = 8  # the search for a tile's expert is unrolled: of 14, gather spills
_REGISTERS = 168  # 65536 of a multiprocessor among 384 threads, in eights


def fits(rows: Tensor, w: Tensor, rows_are_n: bool, *, gathered: bool) -> bool:
    """Whether the kernels can multiply rows [*, K] by w [E, N, K], or [E, K, N], and the rows `gathered`.

    They know neither shared neurons nor a gate for each slot.
    """
    can_load = descriptor_fits(rows)
    if gathered:  # 16 bytes at a time, at offsets of 32 bits
        can_load = rows_are_aligned(rows) and rows.shape[0] * rows.stride(0) < 2**31
    sizes = w.shape if rows_are_n else w.mT.shape
    return takes(*sizes) and can_load and rows.itemsize == 2 and descriptor_fits(w)


def takes(E: int, N: int, K: int) -> bool:
    """Whether there are kernels at all, for so many experts, columns and products of each sum."""
    return IS_THERE and N % TILE.n == 0 and K % TILE.k == 0 and E <= MOST_EXPERTS


def gather(call: Call, a_SF: Tensor) -> None:
    """a = act(x W1^T + b1) in sorted order; rows without an expert are left as they are."""
    launch(
        kernels.gather_pingpong_kernel,
        **_of_rows(call, a_SF),
        x_ptr=call.x_TD,
        x_stride=call.x_TD.stride(0),
        w_desc=_describe_weight(call.w1_EFD, True),
        b_ptr=call.b1_EF,
        a_ptr=a_SF,
        K=call.x_TD.shape[1],
        TOP_K=call.top_k,
        ACTIVATION=call.activation,
    )


def scatter(
    call: Call, a_SK: Tensor, w: Tensor, b_EN: Tensor | None, scale: float, rows_are_n: bool, out_SN: Tensor
) -> None:
    """out[order] = (a W_e + b_e) * scale, and 0 in slots without an expert."""
    launch(
        kernels.scatter_pingpong_kernel,
        **_of_rows(call, out_SN),
        a_desc=_describe(a_SK, TILE.m, TILE.k),
        w_desc=_describe_weight(w, rows_are_n),
        b_ptr=b_EN,
        out_ptr=out_SN,
        num_slots=a_SK.shape[0],
        K=a_SK.shape[1],
        SCALE=scale,
        ROWS_ARE_N=rows_are_n,
    )


def gather_backward(
    call: Call,
    dy: Tensor,
    dy_top_k: int,
    scale: float,
    slope_SF: Tensor,
    dh_SF: Tensor,
    of_b1: Parts | None,
    of_b2: Parts | None,
) -> None:
    """dh = (dy W2) * slope * scale in sorted order, and each row tile's parts of the bias gradients."""
    launch(
        kernels.gather_backward_pingpong_kernel,
        **_of_rows(call, dh_SF),
        dy_ptr=dy,
        dy_stride=dy.stride(0),
        w_desc=_describe_weight(call.w2_EDF, False),
        slope_ptr=slope_SF,
        dh_ptr=dh_SF,
        db1_ptr=of_b1 and of_b1.parts,
        db2_ptr=of_b2 and of_b2.parts,
        K=dy.shape[1],
        DY_TOP_K=dy_top_k,
        SCALE=scale,
    )


def _of_rows(call: Call, out_SN: Tensor) -> dict[str, Any]:
    """The grid, and the arguments that all three have."""
    (S, N), E = out_SN.shape, call.w1_EFD.shape[0]
    tiles = most_row_tiles(S, E, TILE.m) * (N // TILE.n)
    return {
        "grid": (min(configs.multiprocessors(out_SN.device), tiles),),
        "order_ptr": call.order_S,
        "offsets_ptr": call.offsets_E1,
        "E": E,
        "N": N,
        "BLOCK_M": TILE.m,
        "BLOCK_N": TILE.n,
        "BLOCK_K": TILE.k,
        "STAGES": TILE.stages,
        "num_warps": TILE.warps,
        "maxnreg": _REGISTERS,
    }


@cache
def _layout(*block: int) -> Any:
    """In shared memory, of a tile of 16-bit elements."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def _describe(matrix: Tensor, *block: int) -> Any:
    return TensorDescriptor.from_tensor(matrix, list(block), _layout(*block))


def _describe_weight(w: Tensor, rows_are_n: bool) -> Any:
    """All experts' matrices below each other: no tile overhangs one."""
    return _describe(w.flatten(0, 1), *((TILE.n, TILE.k) if rows_are_n else (TILE.k, TILE.n)))
