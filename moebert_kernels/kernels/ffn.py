"""The experts' two GEMMs and their backward on CUDA tensors: allocate, choose the config, launch.

Nothing here reads a device value on the host: grids and workspaces follow from shapes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels.kernels import configs
from moebert_kernels.kernels.configs import Config, Tile
from moebert_kernels.kernels.grouped import gather_backward_kernel, gather_kernel, scatter_kernel
from moebert_kernels.kernels.launch import (
    ceil_div,
    describe,
    descriptor_fits,
    groups_of,
    launch,
    on_device_of,
    weight,
)
from moebert_kernels.kernels.launch import rows as with_contiguous_rows
from moebert_kernels.kernels.rows import gate_grad_kernel, over_experts, over_tiles
from moebert_kernels.kernels.wgrad import Factors, weight_grads


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
) -> tuple[Tensor, Tensor]:
    """y_TD, or with `per_slot` each slot's output [S, D]; if `training`, activations and slopes [2 S, F]."""
    S = order_S.shape[0]
    E, F, D = w1_EFD.shape
    config = config or configs.select(x_TD.device, x_TD.dtype, S, E)
    x_TD = with_contiguous_rows(x_TD)
    w1_EFD, w2_EDF = w1_EFD.contiguous(), w2_EDF.contiguous()
    order_S, offsets_E1 = order_S.contiguous(), offsets_E1.contiguous()
    b1_EF, b2_ED = _contiguous(b1_EF), _contiguous(b2_ED)
    gate_S, scale = _gate(gate_TK, top_k, per_slot)
    saved = x_TD.new_empty(2 * S if training else 0, F)
    a_SF = saved[:S] if training else x_TD.new_empty(S, F)
    z_SD = x_TD.new_empty(S, D)
    with on_device_of(x_TD):
        launch(
            gather_kernel,
            _grid(S, E, F, config.up),
            x_ptr=x_TD,
            x_stride=x_TD.stride(0),
            order_ptr=order_S,
            offsets_ptr=offsets_E1,
            w1_ptr=w1_EFD,
            b1_ptr=b1_EF,
            a_ptr=a_SF,
            slope_ptr=saved[S:] if training else None,
            num_slots=S,
            E=E,
            D=D,
            F=F,
            TOP_K=top_k,
            ACTIVATION=activation,
            **_tile(config.up, E, x_TD),
        )
        _scatter(a_SF, order_S, offsets_E1, w2_EDF, b2_ED, gate_S, z_SD, scale, True, config.tma, config.down)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w1, b1, w2, b2 and gate, 0 elements for each that is not needed.

    `plus_TD`, contiguous, is what x gets from elsewhere.
    """
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    S = order_S.shape[0]
    E, F, D = w1_EFD.shape
    config = config or configs.select(x_TD.device, x_TD.dtype, S, E)
    x_TD, dy = with_contiguous_rows(x_TD), with_contiguous_rows(dy)
    w1_EFD, w2_EDF = w1_EFD.contiguous(), w2_EDF.contiguous()
    order_S, offsets_E1 = order_S.contiguous(), offsets_E1.contiguous()
    gate_S, scale = _gate(gate_TK, top_k, per_slot)
    dy_top_k = 1 if per_slot else top_k

    need_dh = need_x or need_w1
    need_ga = need_w2 and gate_S is not None
    a_SF, slope_SF = saved[:S], saved[S : 2 * S]
    dh_SF, ga_SF = (x_TD.new_empty(S if need else 0, F) for need in (need_dh, need_ga))
    (grid,) = _grid(S, E, F, config.down_backward)
    col_tiles = ceil_div(F, config.down_backward.n)

    def parts_of(bias: Tensor | None, need: bool) -> tuple[Tensor, Tensor] | None:
        if bias is None or not need:
            return None
        return x_TD.new_empty(grid // col_tiles, bias.shape[1], dtype=torch.float32), bias

    dgate_parts = x_TD.new_empty(col_tiles, S, dtype=torch.float32) if need_gate else None
    of_b1, of_b2 = parts_of(b1_EF, need_b1), parts_of(b2_ED, need_b2)
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
                gate_ptr=gate_S,
                a_ptr=a_SF,
                slope_ptr=slope_SF,
                dh_ptr=dh_SF if need_dh else None,
                ga_ptr=ga_SF if need_ga else None,
                dgate_ptr=dgate_parts,
                db1_ptr=of_b1 and of_b1[0],
                db2_ptr=of_b2 and of_b2[0],
                num_slots=S,
                E=E,
                D=D,
                F=F,
                DY_TOP_K=dy_top_k,
                SCALE=scale,
                **_tile(config.down_backward, E, x_TD),
            )
        dx_TD = x_TD.new_empty(0, D)
        if need_x:
            dx_SD = x_TD.new_empty(S, D)
            _scatter(
                dh_SF,
                order_S,
                offsets_E1,
                w1_EFD,
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
        db1 = db2 = None
        if of_b1 or of_b2:
            tile_rows = config.down_backward.m
            db1, db2 = over_tiles(of_b1, of_b2, offsets_E1, tile_rows)
        of_w1 = Factors(dh_SF, x_TD, top_k) if need_w1 else None
        of_w2 = Factors(ga_SF if need_ga else a_SF, dy, dy_top_k, scale) if need_w2 else None
        dw1, dw2 = weight_grads(of_w1, of_w2, order_S, offsets_E1, config)
    # Each output its own tensor: an operator's results may not alias.
    results = (dw1, db1, dw2, db2, dgate_TK)
    dw1, db1, dw2, db2, dgate_TK = (x_TD.new_empty(0) if grad is None else grad for grad in results)
    return dx_TD, dw1, db1, dw2, db2, dgate_TK


def _scatter(
    a_SK: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    w: Tensor,
    b_EN: Tensor | None,
    gate_S: Tensor | None,
    out_SN: Tensor,
    scale: float,
    rows_are_n: bool,
    tma: bool,
    tile: Tile,
) -> None:
    """out[order] = (a W_e + b_e) * gate, with w [E, N, K] if `rows_are_n` else [E, K, N]."""
    (S, K), N, E = a_SK.shape, out_SN.shape[1], w.shape[0]
    a_tma = tma and descriptor_fits(a_SK)
    w_argument, w_tma = weight(w, tma, *((tile.n, tile.k) if rows_are_n else (tile.k, tile.n)))
    launch(
        scatter_kernel,
        _grid(S, E, N, tile),
        a=describe(a_SK, tile.m, tile.k) if a_tma else a_SK,
        order_ptr=order_S,
        offsets_ptr=offsets_E1,
        w=w_argument,
        b_ptr=_contiguous(b_EN),
        gate_ptr=gate_S,
        out_ptr=out_SN,
        num_slots=S,
        E=E,
        K=K,
        N=N,
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


def _grid(num_slots: int, num_experts: int, cols: int, tile: Tile) -> tuple[int]:
    """Row tiles, of which every expert and the slots without one may leave one unfilled, times columns."""
    return (min(num_slots, ceil_div(num_slots, tile.m) + num_experts) * ceil_div(cols, tile.n),)


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
