"""The experts' two GEMMs and their backward on CUDA tensors: allocate, choose the config, launch.

Nothing here reads a device value on the host: grids and workspaces follow from shapes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moebert_kernels.kernels.triton import configs
from moebert_kernels.kernels.triton.configs import Config, Tile
from moebert_kernels.kernels.triton.grouped import gather_backward_kernel, gather_kernel, scatter_kernel
from moebert_kernels.kernels.triton.launch import (
    ceil_div,
    describe,
    descriptor_fits,
    groups_of,
    launch,
    on_device_of,
    weight,
)
from moebert_kernels.kernels.triton.launch import rows as with_contiguous_rows
from moebert_kernels.kernels.triton.rows import Parts, gate_grad_kernel, over_experts, over_tiles
from moebert_kernels.kernels.triton.wgrad import Factors, weight_grads


class Shared(NamedTuple):
    """The neurons that all experts have: w1 [C, D], b1 [C] or None, w2 [D, C]; all None without any."""

    w1_CD: Tensor | None
    b1_C: Tensor | None
    w2_DC: Tensor | None

    @property
    def size(self) -> int:
        """C."""
        return 0 if self.w1_CD is None else self.w1_CD.shape[0]

    def contiguous(self) -> tuple[Tensor | None, ...]:
        """The three, each with its elements in order."""
        return tuple(map(_contiguous, self))


NONE_SHARED = Shared(None, None, None)


def expert_ffn_forward(
    x_TD: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    gate_TK: Tensor | None,
    activation: str,
    top_k: int,
    per_slot: bool,
    training: bool,
    config: Config | None = None,
    shared: Shared = NONE_SHARED,
) -> tuple[Tensor, Tensor]:
    """y_TD, or with `per_slot` each slot's output [S, D]; if `training`, activations and slopes [2 S, N]."""
    S = order_S.shape[0]
    E, F, D = w1_EFD.shape
    C, (shared_w1_CD, shared_b1_C, shared_w2_DC) = shared.size, shared.contiguous()
    config = config or configs.select(x_TD.device, x_TD.dtype, S, E)
    x_TD = with_contiguous_rows(x_TD)
    w1_EFD, w2_EDF = w1_EFD.contiguous(), w2_EDF.contiguous()
    order_S, offsets_E1 = order_S.contiguous(), offsets_E1.contiguous()
    b1_EF, b2_ED = _contiguous(b1_EF), _contiguous(b2_ED)
    gate_S, scale = _gate(gate_TK, top_k, per_slot)
    saved = x_TD.new_empty(2 * S if training else 0, C + F)
    a_SN = saved[:S] if training else x_TD.new_empty(S, C + F)
    z_SD = x_TD.new_empty(S, D)
    with on_device_of(x_TD):
        launch(
            gather_kernel,
            _grid(S, E, _tiles(C, F, config.up), config.up),
            x_ptr=x_TD,
            x_stride=x_TD.stride(0),
            order_ptr=order_S,
            offsets_ptr=offsets_E1,
            w1_ptr=w1_EFD,
            b1_ptr=b1_EF,
            shared_w1_ptr=shared_w1_CD,
            shared_b1_ptr=shared_b1_C,
            a_ptr=a_SN,
            slope_ptr=saved[S:] if training else None,
            num_slots=S,
            E=E,
            D=D,
            F=F,
            C=C,
            TOP_K=top_k,
            ACTIVATION=activation,
            **_tile(config.up, E, x_TD),
        )
        weights = w2_EDF, shared_w2_DC
        _scatter(
            a_SN, order_S, offsets_E1, weights, b2_ED, gate_S, z_SD, scale, True, config.tma, config.down
        )
        return over_experts(z_SD, 1 if per_slot else top_k, x_TD.dtype), saved


def expert_ffn_backward(
    dy: Tensor,
    x_TD: Tensor,
    saved: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    gate_TK: Tensor | None,
    activation: str,
    top_k: int,
    per_slot: bool,
    needs: list[bool],
    config: Config | None = None,
    plus_TD: Tensor | None = None,
    shared: Shared = NONE_SHARED,
) -> tuple[Tensor, ...]:
    """The gradients of x, w1, b1, w2, b2, gate and the shared three, 0 elements for each that is not needed.

    `needs` says so of the first six; those of shared neurons come with those of the experts' own. `plus_TD`,
    contiguous, is what x gets from elsewhere.
    """
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    S = order_S.shape[0]
    E, F, D = w1_EFD.shape
    C, (shared_w1_CD, shared_b1_C, shared_w2_DC) = shared.size, shared.contiguous()
    config = config or configs.select(x_TD.device, x_TD.dtype, S, E)
    x_TD, dy = with_contiguous_rows(x_TD), with_contiguous_rows(dy)
    w1_EFD, w2_EDF = w1_EFD.contiguous(), w2_EDF.contiguous()
    order_S, offsets_E1 = order_S.contiguous(), offsets_E1.contiguous()
    gate_S, scale = _gate(gate_TK, top_k, per_slot)
    dy_top_k = 1 if per_slot else top_k

    need_dh = need_x or need_w1
    need_ga = need_w2 and gate_S is not None
    a_SN, slope_SN = saved[:S], saved[S : 2 * S]
    dh_SN, ga_SN = (x_TD.new_empty(S if need else 0, C + F) for need in (need_dh, need_ga))
    col_tiles = _tiles(C, F, config.down_backward)
    (grid,) = _grid(S, E, col_tiles, config.down_backward)

    def parts_of(bias: Tensor | None, need: bool, shared_b: Tensor | None = None) -> Parts | None:
        if bias is None or not need:
            return None
        columns = bias.shape[1] + (0 if shared_b is None else shared_b.shape[0])
        return Parts(x_TD.new_empty(grid // col_tiles, columns, dtype=torch.float32), bias, shared_b)

    dgate_parts = x_TD.new_empty(col_tiles, S, dtype=torch.float32) if need_gate else None
    of_b1, of_b2 = parts_of(b1_EF, need_b1, shared_b1_C), parts_of(b2_ED, need_b2)
    with on_device_of(x_TD):
        if need_dh or need_ga or need_gate or of_b1 or of_b2:
            launch(
                gather_backward_kernel,
                (grid,),
                dy_ptr=dy,
                dy_stride=dy.stride(0),
                order_ptr=order_S,
                offsets_ptr=offsets_E1,
                w2_ptr=w2_EDF,
                shared_w2_ptr=shared_w2_DC,
                gate_ptr=gate_S,
                a_ptr=a_SN,
                slope_ptr=slope_SN,
                dh_ptr=dh_SN if need_dh else None,
                ga_ptr=ga_SN if need_ga else None,
                dgate_ptr=dgate_parts,
                db1_ptr=of_b1 and of_b1.parts,
                db2_ptr=of_b2 and of_b2.parts,
                num_slots=S,
                E=E,
                D=D,
                F=F,
                C=C,
                DY_TOP_K=dy_top_k,
                SCALE=scale,
                **_tile(config.down_backward, E, x_TD),
            )
        dx_TD = x_TD.new_empty(0, D)
        if need_x:
            dx_SD = x_TD.new_empty(S, D)
            _scatter(
                dh_SN,
                order_S,
                offsets_E1,
                (w1_EFD, shared_w1_CD),
                None,
                None,
                dx_SD,
                1.0,
                False,
                config.tma,
                config.up_backward,
            )
            dx_TD = over_experts(dx_SD, top_k, x_TD.dtype, plus_TD)
        dgate_TK = None
        if need_gate:
            dgate_TK = dy.new_empty(S // top_k, top_k, dtype=torch.float32)
            launch(
                gate_grad_kernel,
                (ceil_div(S, 16) + E if S else 0,),
                parts_ptr=dgate_parts,
                dy_ptr=dy,
                dy_stride=dy.stride(0),
                order_ptr=order_S,
                offsets_ptr=offsets_E1,
                b2_ptr=_contiguous(b2_ED),
                dgate_ptr=dgate_TK,
                num_slots=S,
                E=E,
                D=D,
                DY_TOP_K=dy_top_k,
                COL_TILES=col_tiles,
                BLOCK_M=16,
                BLOCK_D=128,
                GROUPS=groups_of(E),
            )
        db1 = db2 = shared_db1 = None
        if of_b1 or of_b2:
            tile_rows = config.down_backward.m
            db1, db2, shared_db1 = over_tiles(of_b1, of_b2, offsets_E1, tile_rows)
        of_w1 = Factors(dh_SN, x_TD, top_k) if need_w1 else None
        of_w2 = Factors(ga_SN if need_ga else a_SN, dy, dy_top_k, scale) if need_w2 else None
        dw1, dw2, shared_dw1, shared_dw2 = weight_grads(of_w1, of_w2, C, order_S, offsets_E1, config)
    # Each output its own tensor: an operator's results may not alias.
    results = (dw1, db1, dw2, db2, dgate_TK, shared_dw1, shared_db1, shared_dw2)
    return dx_TD, *(x_TD.new_empty(0) if grad is None else grad for grad in results)


def _scatter(
    a_SK: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    weights: tuple[Tensor, Tensor | None],
    b_EN: Tensor | None,
    gate_S: Tensor | None,
    out_SN: Tensor,
    scale: float,
    rows_are_n: bool,
    tma: bool,
    tile: Tile,
) -> None:
    """out[order] = (a W_e + b_e) * gate, with w [E, N, K] if `rows_are_n` else [E, K, N].

    The second of `weights`, without E, is that of shared neurons, which come first in a.
    """
    w, shared_w = weights
    S, N, E, K = a_SK.shape[0], out_SN.shape[1], w.shape[0], w.shape[2 if rows_are_n else 1]
    C = a_SK.shape[1] - K
    a_tma = tma and descriptor_fits(a_SK)
    block = (tile.n, tile.k) if rows_are_n else (tile.k, tile.n)
    w_tma = tma and descriptor_fits(w) and (shared_w is None or descriptor_fits(shared_w))
    launch(
        scatter_kernel,
        _grid(S, E, ceil_div(N, tile.n), tile),
        a=describe(a_SK, tile.m, tile.k) if a_tma else a_SK,
        order_ptr=order_S,
        offsets_ptr=offsets_E1,
        w=weight(w, w_tma, *block),
        shared_w=None if shared_w is None else weight(shared_w.unsqueeze(0), w_tma, *block),
        b_ptr=_contiguous(b_EN),
        gate_ptr=gate_S,
        out_ptr=out_SN,
        num_slots=S,
        E=E,
        K=K,
        N=N,
        C=C,
        SCALE=scale,
        ROWS_ARE_N=rows_are_n,
        A_TMA=a_tma,
        W_TMA=w_tma,
        **_tile(tile, E, a_SK),
    )


def _gate(gate_TK: Tensor | None, top_k: int, per_slot: bool) -> tuple[Tensor | None, float]:
    """The factor of each slot, or the one they share."""
    if gate_TK is not None:
        return gate_TK.reshape(-1), 1.0
    return None, 1.0 if per_slot else 1.0 / top_k


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _tiles(num_shared: int, num_own: int, tile: Tile) -> int:
    """Column tiles of hidden activations: none has shared and own neurons."""
    return ceil_div(num_shared, tile.n) + ceil_div(num_own, tile.n)


def _grid(num_slots: int, num_experts: int, col_tiles: int, tile: Tile) -> tuple[int]:
    """Row tiles, of which every expert and the slots without one may leave one unfilled, times columns."""
    return (min(num_slots, ceil_div(num_slots, tile.m) + num_experts) * col_tiles,)


def _tile(tile: Tile, num_experts: int, like: Tensor) -> dict:
    return {
        "PRECISION": configs.precision(like.dtype),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "PARTS": tile.parts,
        "GROUPS": groups_of(num_experts),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
