"""The experts' two GEMMs and their backward on CUDA tensors: allocate, choose the config, launch.

Nothing here reads a device value on the host: grids and workspaces follow from shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebert_kernels.kernels.call import Call
from moebert_kernels.kernels.triton import configs, hopper
from moebert_kernels.kernels.triton.configs import Config, Tile
from moebert_kernels.kernels.triton.grouped import gather_backward_kernel, gather_kernel, scatter_kernel
from moebert_kernels.kernels.triton.launch import (
    ceil_div,
    describe,
    descriptor_fits,
    groups_of,
    in_order,
    launch,
    most_row_tiles,
    on_device_of,
    weight,
)
from moebert_kernels.kernels.triton.rows import Parts, gate_grad_kernel, over_experts, over_tiles
from moebert_kernels.kernels.triton.wgrad import Factors, weight_grads


def expert_ffn_forward(call: Call, training: bool, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """y_TD, or with norm each slot's z [S, D]; if `training`, activations and slopes [2 S, C + F]."""
    call = in_order(call)
    x_TD, (E, F, D), S, C = call.x_TD, call.w1_EFD.shape, call.order_S.shape[0], call.num_shared
    config = config or _config(call)
    gate_S, scale, top_k = _gate(call)
    saved = x_TD.new_empty(2 * S if training else 0, C + F)
    a_SN = saved[:S] if training else x_TD.new_empty(S, C + F)
    specialised = "up" in config.specialised and not training and not C
    with on_device_of(x_TD):
        if specialised and hopper.fits(x_TD, call.w1_EFD, True, gathered=True):
            hopper.gather(call, a_SN)
        else:
            launch(
                gather_kernel,
                _grid(S, E, _tiles(C, F, config.up), config.up),
                x_ptr=x_TD,
                x_stride=x_TD.stride(0),
                order_ptr=call.order_S,
                offsets_ptr=call.offsets_E1,
                w1_ptr=call.w1_EFD,
                b1_ptr=call.b1_EF,
                shared_w1_ptr=call.shared_w1_CD,
                shared_b1_ptr=call.shared_b1_C,
                a_ptr=a_SN,
                slope_ptr=saved[S:] if training else None,
                num_slots=S,
                E=E,
                D=D,
                F=F,
                C=C,
                TOP_K=call.top_k,
                ACTIVATION=call.activation,
                **_tile(config.up, E, x_TD),
            )
        weights = call.w2_EDF, call.shared_w2_DC
        z_SD = _scatter(call, a_SN, weights, call.b2_ED, gate_S, scale, True, config, "down")
        return over_experts(z_SD, top_k, x_TD.dtype), saved


def expert_ffn_backward(
    call: Call,
    saved: Tensor,
    dy: Tensor,
    needs: Sequence[bool],
    plus_TD: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of x, w1, b1, w2, b2, gate and the shared three, 0 elements for each that is not needed.

    `dy` is that of what the forward pass returned. `needs` says so of the first six; those of shared neurons
    come with those of the experts' own. `plus_TD`, contiguous, is what x gets from elsewhere.
    """
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    call, dy = in_order(call), dy.contiguous()
    x_TD, (E, F, D), S, C = call.x_TD, call.w1_EFD.shape, call.order_S.shape[0], call.num_shared
    config = config or _config(call)
    gate_S, scale, top_k = _gate(call)

    need_dh = need_x or need_w1
    need_ga = need_w2 and gate_S is not None
    a_SN, slope_SN = saved[:S], saved[S : 2 * S]
    dh_SN, ga_SN = (x_TD.new_empty(S if need else 0, C + F) for need in (need_dh, need_ga))
    specialised = (
        "down_backward" in config.specialised
        and need_dh
        and not (C or need_gate or gate_S is not None)
        and hopper.fits(dy, call.w2_EDF, False, gathered=True)
    )
    tile = hopper.TILE if specialised else config.down_backward
    row_tiles, col_tiles = most_row_tiles(S, E, tile.m), _tiles(C, F, tile)

    def parts_of(bias: Tensor | None, need: bool, shared_b: Tensor | None = None) -> Parts | None:
        if bias is None or not need:
            return None
        columns = bias.shape[1] + (0 if shared_b is None else shared_b.shape[0])
        return Parts(x_TD.new_empty(row_tiles, columns, dtype=torch.float32), bias, shared_b)

    dgate_parts = x_TD.new_empty(col_tiles, S, dtype=torch.float32) if need_gate else None
    of_b1, of_b2 = parts_of(call.b1_EF, need_b1, call.shared_b1_C), parts_of(call.b2_ED, need_b2)
    with on_device_of(x_TD):
        if specialised:
            hopper.gather_backward(call, dy, top_k, scale, slope_SN, dh_SN, of_b1, of_b2)
        elif need_dh or need_ga or need_gate or of_b1 or of_b2:
            launch(
                gather_backward_kernel,
                (row_tiles * col_tiles,),
                dy_ptr=dy,
                dy_stride=dy.stride(0),
                order_ptr=call.order_S,
                offsets_ptr=call.offsets_E1,
                w2_ptr=call.w2_EDF,
                shared_w2_ptr=call.shared_w2_DC,
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
                DY_TOP_K=top_k,
                SCALE=scale,
                **_tile(tile, E, x_TD),
            )
        dx_TD = x_TD.new_empty(0, D)
        if need_x:
            weights = call.w1_EFD, call.shared_w1_CD
            dx_SD = _scatter(call, dh_SN, weights, None, None, 1.0, False, config, "up_backward")
            dx_TD = over_experts(dx_SD, call.top_k, x_TD.dtype, plus_TD)
        dgate_TK = None
        if need_gate:
            dgate_TK = dy.new_empty(call.expert_ids_TK.shape, dtype=torch.float32)
            launch(
                gate_grad_kernel,
                (ceil_div(S, 16) + E if S else 0,),
                parts_ptr=dgate_parts,
                dy_ptr=dy,
                dy_stride=dy.stride(0),
                order_ptr=call.order_S,
                offsets_ptr=call.offsets_E1,
                b2_ptr=call.b2_ED,
                dgate_ptr=dgate_TK,
                num_slots=S,
                E=E,
                D=D,
                DY_TOP_K=top_k,
                COL_TILES=col_tiles,
                BLOCK_M=16,
                BLOCK_D=128,
                GROUPS=groups_of(E),
            )
        db1 = db2 = shared_db1 = None
        if of_b1 or of_b2:
            db1, db2, shared_db1 = over_tiles(of_b1, of_b2, call.offsets_E1, tile.m)
        of_w1 = Factors(dh_SN, x_TD, call.top_k) if need_w1 else None
        of_w2 = Factors(ga_SN if need_ga else a_SN, dy, top_k, scale) if need_w2 else None
        of_plan = call.order_S, call.offsets_E1
        dw1, dw2, shared_dw1, shared_dw2 = weight_grads(of_w1, of_w2, C, *of_plan, config)
    # Each output its own tensor: an operator's results may not alias.
    results = (dw1, db1, dw2, db2, dgate_TK, shared_dw1, shared_db1, shared_dw2)
    return dx_TD, *(x_TD.new_empty(0) if grad is None else grad for grad in results)


def _config(call: Call) -> Config:
    return configs.select(call.x_TD.device, call.x_TD.dtype, call.order_S.shape[0], call.w1_EFD.shape[0])


def _scatter(
    call: Call,
    a_SK: Tensor,
    weights: tuple[Tensor, Tensor | None],
    b_EN: Tensor | None,
    gate_S: Tensor | None,
    scale: float,
    rows_are_n: bool,
    config: Config,
    role: str,
) -> Tensor:
    """out[order] = (a W_e + b_e) * gate, with w [E, N, K] if `rows_are_n` else [E, K, N].

    The second of `weights`, without E, is that of shared neurons, which come first in a. `role` is the GEMM's
    name in the config.
    """
    w, shared_w = weights
    S, E, N, K = a_SK.shape[0], *(w.shape if rows_are_n else w.mT.shape)
    out_SN = a_SK.new_empty(S, N)
    specialised = role in config.specialised and shared_w is None and gate_S is None
    if specialised and hopper.fits(a_SK, w, rows_are_n, gathered=False):
        hopper.scatter(call, a_SK, w, b_EN, scale, rows_are_n, out_SN)
        return out_SN
    tile = getattr(config, role)
    a_tma = config.tma and descriptor_fits(a_SK)
    block = (tile.n, tile.k) if rows_are_n else (tile.k, tile.n)
    w_tma = config.tma and descriptor_fits(w) and (shared_w is None or descriptor_fits(shared_w))
    launch(
        scatter_kernel,
        _grid(S, E, ceil_div(N, tile.n), tile),
        a=describe(a_SK, tile.m, tile.k) if a_tma else a_SK,
        order_ptr=call.order_S,
        offsets_ptr=call.offsets_E1,
        w=weight(w, w_tma, *block),
        shared_w=None if shared_w is None else weight(shared_w.unsqueeze(0), w_tma, *block),
        b_ptr=b_EN,
        gate_ptr=gate_S,
        out_ptr=out_SN,
        num_slots=S,
        E=E,
        K=K,
        N=N,
        C=call.num_shared,
        SCALE=scale,
        ROWS_ARE_N=rows_are_n,
        A_TMA=a_tma,
        W_TMA=w_tma,
        **_tile(tile, E, a_SK),
    )
    return out_SN


def _gate(call: Call) -> tuple[Tensor | None, float, int]:
    """The factor of each slot or the one they share, and how many slots are summed: norm does both later."""
    if call.ln_w_ED is not None:
        return None, 1.0, 1
    if call.gate_TK is None:
        return None, 1.0 / call.top_k, call.top_k
    return call.gate_TK.reshape(-1), 1.0, call.top_k


def _tiles(num_shared: int, num_own: int, tile: Tile) -> int:
    """Column tiles of hidden activations: none has shared and own neurons."""
    return ceil_div(num_shared, tile.n) + ceil_div(num_own, tile.n)


def _grid(num_slots: int, num_experts: int, col_tiles: int, tile: Tile) -> tuple[int]:
    return (most_row_tiles(num_slots, num_experts, tile.m) * col_tiles,)


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
