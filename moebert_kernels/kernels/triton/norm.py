"""`expert_norm` and its backward on CUDA tensors: the residual sum and each expert's LayerNorm, row by row.

    u = dropout(z) + residual    xhat = (u - mean) * rstd    y = sum over k of gate * (xhat * ln_w_e + ln_b_e)

Dropout's mask is drawn from the seed, the slot and the column alone, and so is drawn again in backward.
Backward walks tiles of sorted rows, so that a program meets one expert only and adds up its share of dln_w
and dln_b in registers; the shares are added in the order of the tiles by a second kernel.
"""

# ruff: noqa: SIM108 - branches on constants choose what is compiled at all

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebert_kernels.kernels.call import Call
from moebert_kernels.kernels.triton import configs
from moebert_kernels.kernels.triton.blocks import OF_PLAN, find_rows
from moebert_kernels.kernels.triton.launch import ceil_div, groups_of, in_order, launch, on_device_of
from moebert_kernels.kernels.triton.rows import Parts, over_experts, over_tiles


def expert_norm_forward(call: Call, z_SD: Tensor) -> tuple[Tensor, Tensor]:
    """y_TD, and mean and 1/std of each slot as [2, S]."""
    call, (S, D), (T, K) = in_order(call), z_SD.shape, call.expert_ids_TK.shape
    y_TD = call.residual.new_empty(T, D)
    stats_2S = z_SD.new_empty(2, S, dtype=torch.float32)
    with on_device_of(z_SD):
        launch(
            norm_kernel,
            (T,),
            z_ptr=z_SD.contiguous(),
            residual_ptr=call.residual,
            residual_stride=call.residual.stride(0),
            expert_ids_ptr=call.expert_ids_TK,
            ln_w_ptr=call.ln_w_ED,
            ln_b_ptr=call.ln_b_ED,
            gate_ptr=call.gate_TK,
            seed_ptr=call.seed,
            y_ptr=y_TD,
            stats_ptr=stats_2S,
            eps=call.norm_eps,
            dropout_p=call.dropout_p,
            D=D,
            TOP_K=K,
            **_row(D),
        )
    return y_TD, stats_2S


def expert_norm_backward(
    call: Call, z_SD: Tensor, stats_2S: Tensor, dy_TD: Tensor, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of z by slot, of residual, ln_w and ln_b, and of the gate (0 elements if not needed)."""
    call, (S, D), (T, K), E = in_order(call), z_SD.shape, call.expert_ids_TK.shape, call.w1_EFD.shape[0]
    dy_TD = dy_TD.contiguous()
    block = _rows_per_program(S, configs.multiprocessors(z_SD.device))
    tiles = min(S, ceil_div(S, block) + E)
    dz_SD = torch.empty_like(z_SD, memory_format=torch.contiguous_format)
    # Rounded once: after the sum over a token's experts.
    du_SD = z_SD.new_empty(S, D, dtype=call.residual.dtype if K == 1 else torch.float32)
    dgate_TK = stats_2S.new_empty((T, K) if need_gate else 0)
    shares = stats_2S.new_empty(2, tiles, D)
    with on_device_of(z_SD):
        launch(
            norm_backward_kernel,
            (tiles,),
            dy_ptr=dy_TD,
            dy_stride=dy_TD.stride(0),
            z_ptr=z_SD.contiguous(),
            residual_ptr=call.residual,
            residual_stride=call.residual.stride(0),
            stats_ptr=stats_2S,
            expert_ids_ptr=call.expert_ids_TK,
            order_ptr=call.order_S,
            ln_w_ptr=call.ln_w_ED,
            ln_b_ptr=call.ln_b_ED,
            gate_ptr=call.gate_TK,
            seed_ptr=call.seed,
            dz_ptr=dz_SD,
            du_ptr=du_SD,
            shares_ptr=shares,
            dgate_ptr=dgate_TK if need_gate else None,
            dropout_p=call.dropout_p,
            TOP_K=K,
            BLOCK_M=block,
            GROUPS=groups_of(E),
            offsets_ptr=call.offsets_E1,
            num_slots=S,
            E=E,
            D=D,
            **_row(D),
        )
        assert call.ln_w_ED is not None
        assert call.ln_b_ED is not None
        parts = Parts(shares[0], call.ln_w_ED), Parts(shares[1], call.ln_b_ED)
        dln_w_ED, dln_b_ED, _ = over_tiles(*parts, call.offsets_E1, block)
        assert dln_w_ED is not None
        assert dln_b_ED is not None
        return dz_SD, over_experts(du_SD, K, call.residual.dtype), dln_w_ED, dln_b_ED, dgate_TK


def _row(num_cols: int) -> dict[str, int]:
    """A whole row per program, some 8 elements per thread."""
    block = max(triton.next_power_of_2(num_cols), 16)
    return {"BLOCK_D": block, "num_warps": min(max(block // 256, 1), 16)}


def _rows_per_program(num_slots: int, programs: int) -> int:
    """So many rows that the programs fill the device a few times over, between 4 and 128."""
    return min(max(triton.next_power_of_2(ceil_div(num_slots, 8 * programs)), 4), 128)


@triton.jit(do_not_specialize_on_alignment=OF_PLAN)
def norm_kernel(
    z_ptr,  # [S, D] by slot
    residual_ptr,  # [T, D], rows residual_stride apart
    residual_stride,
    expert_ids_ptr,  # [T, TOP_K]
    ln_w_ptr,  # [E, D]
    ln_b_ptr,  # [E, D]
    gate_ptr,  # [T, TOP_K], or None for 1 / TOP_K
    seed_ptr,  # [1] int64, or None without dropout
    y_ptr,  # out: [T, D]
    stats_ptr,  # out: [2, S], mean and 1 / std
    eps,
    dropout_p,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token per program. A token without any expert keeps its residual; such slots have statistics 0."""
    token = tl.program_id(0).to(tl.int64)
    cols_D = tl.arange(0, BLOCK_D)
    live_D = cols_D < D
    rstd_ptr = stats_ptr + tl.num_programs(0).to(tl.int64) * TOP_K
    residual_D = tl.load(residual_ptr + token * residual_stride + cols_D, mask=live_D, other=0.0)
    y_D = tl.zeros((BLOCK_D,), tl.float32)
    routed = 0
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        expert = tl.load(expert_ids_ptr + slot)
        mean = 0.0
        rstd = 0.0
        if expert >= 0:
            routed = 1
            u_D, _ = _residual_sum(z_ptr, residual_D, seed_ptr, dropout_p, slot, cols_D, live_D, D, BLOCK_D)
            mean = tl.sum(u_D, 0) / D
            centred_D = tl.where(live_D, u_D - mean, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred_D * centred_D, 0) / D + eps)
            ln_w_D = tl.load(ln_w_ptr + expert * D + cols_D, mask=live_D, other=0.0).to(tl.float32)
            ln_b_D = tl.load(ln_b_ptr + expert * D + cols_D, mask=live_D, other=0.0).to(tl.float32)
            y_D += _gate(gate_ptr, slot, TOP_K) * (centred_D * rstd * ln_w_D + ln_b_D)
        tl.store(stats_ptr + slot, mean)
        tl.store(rstd_ptr + slot, rstd)
    y_D = tl.where(routed == 1, y_D, residual_D.to(tl.float32))
    tl.store(y_ptr + token * D + cols_D, y_D.to(y_ptr.dtype.element_ty), mask=live_D)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=OF_PLAN)
def norm_backward_kernel(
    dy_ptr,  # [T, D], rows dy_stride apart
    dy_stride,
    z_ptr,  # [S, D] by slot
    residual_ptr,  # [T, D], rows residual_stride apart
    residual_stride,
    stats_ptr,  # [2, S], mean and 1 / std
    expert_ids_ptr,  # [T, TOP_K]
    order_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    ln_w_ptr,  # [E, D]
    ln_b_ptr,  # [E, D]
    gate_ptr,  # [T, TOP_K], or None for 1 / TOP_K
    seed_ptr,  # [1] int64, or None without dropout
    dz_ptr,  # out: [S, D] by slot
    du_ptr,  # out: [S, D] by slot: the residual's gradient is its sum over k
    shares_ptr,  # out: [2, row tiles, D] float32, of dln_w and dln_b
    dgate_ptr,  # out: [T, TOP_K], or None
    dropout_p,
    num_slots,
    E: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """du = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * gate * ln_w. Grid: (row tiles)."""
    group, begin, end = find_rows(tl.program_id(0), offsets_ptr, num_slots, E, BLOCK_M, GROUPS)
    if group > E:
        return
    cols_D = tl.arange(0, BLOCK_D)
    live_D = cols_D < D
    end = tl.minimum(begin + BLOCK_M, end)
    if group == E:
        for row in tl.range(begin, end):
            slot = tl.load(order_ptr + row).to(tl.int64)
            token = slot // TOP_K
            # The output of a token without any expert is its residual: the first slot passes dy on.
            passes = slot % TOP_K == 0
            for k in tl.static_range(TOP_K):
                passes = passes & (tl.load(expert_ids_ptr + token * TOP_K + k) < 0)
            dy_D = tl.load(dy_ptr + token * dy_stride + cols_D, mask=live_D & passes, other=0.0)
            tl.store(du_ptr + slot * D + cols_D, dy_D.to(du_ptr.dtype.element_ty), mask=live_D)
            zero_D = tl.zeros((BLOCK_D,), dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + slot * D + cols_D, zero_D, mask=live_D)
            if dgate_ptr is not None:
                tl.store(dgate_ptr + slot, 0.0)
        return
    ln_w_D = tl.load(ln_w_ptr + group * D + cols_D, mask=live_D, other=0.0).to(tl.float32)
    ln_b_D = tl.load(ln_b_ptr + group * D + cols_D, mask=live_D, other=0.0).to(tl.float32)
    dln_w_D = tl.zeros((BLOCK_D,), tl.float32)
    dln_b_D = tl.zeros((BLOCK_D,), tl.float32)
    for row in tl.range(begin, end):
        slot = tl.load(order_ptr + row).to(tl.int64)
        token = slot // TOP_K
        residual_D = tl.load(residual_ptr + token * residual_stride + cols_D, mask=live_D, other=0.0)
        u_D, keep_D = _residual_sum(z_ptr, residual_D, seed_ptr, dropout_p, slot, cols_D, live_D, D, BLOCK_D)
        rstd = tl.load(stats_ptr + num_slots + slot)
        xhat_D = tl.where(live_D, (u_D - tl.load(stats_ptr + slot)) * rstd, 0.0)
        dy_D = tl.load(dy_ptr + token * dy_stride + cols_D, mask=live_D, other=0.0).to(tl.float32)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + slot, tl.sum((xhat_D * ln_w_D + ln_b_D) * dy_D, 0))
        do_D = dy_D * _gate(gate_ptr, slot, TOP_K)
        dln_w_D += do_D * xhat_D
        dln_b_D += do_D
        dxhat_D = do_D * ln_w_D
        mean = tl.sum(dxhat_D, 0) / D
        slope = tl.sum(dxhat_D * xhat_D, 0) / D
        du_D = rstd * (dxhat_D - mean - xhat_D * slope)
        tl.store(du_ptr + slot * D + cols_D, du_D.to(du_ptr.dtype.element_ty), mask=live_D)
        tl.store(dz_ptr + slot * D + cols_D, (du_D * keep_D).to(dz_ptr.dtype.element_ty), mask=live_D)
    share_ptrs = shares_ptr + tl.program_id(0).to(tl.int64) * D + cols_D
    tl.store(share_ptrs, dln_w_D, mask=live_D)
    tl.store(share_ptrs + tl.num_programs(0).to(tl.int64) * D, dln_b_D, mask=live_D)


@triton.jit
def _residual_sum(
    z_ptr, residual_D, seed_ptr, dropout_p, slot, cols_D, live_D, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """u = dropout(z) + residual, and dropout's factors (1 without it)."""
    u_D = tl.load(z_ptr + slot * D + cols_D, mask=live_D, other=0.0).to(tl.float32)
    keep_D = tl.full((BLOCK_D,), 1.0, tl.float32)
    if seed_ptr is not None:
        keep_D = _dropout_factors(tl.load(seed_ptr), dropout_p, slot, BLOCK_D)
    return u_D * keep_D + residual_D.to(tl.float32), keep_D


@triton.jit
def _dropout_factors(seed, dropout_p, slot, BLOCK_D: tl.constexpr):
    """0 or 1 / (1 - p) for the columns of a slot: Philox yields four at a time."""
    counter = tl.arange(0, BLOCK_D // 4)
    low = tl.zeros_like(counter) + slot.to(tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, counter, low, tl.zeros_like(counter), tl.zeros_like(counter))
    bits_D = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK_D)
    return tl.where(tl.uint_to_uniform_float(bits_D) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def _gate(gate_ptr, slot, TOP_K: tl.constexpr):
    if gate_ptr is None:
        gate = 1.0 / TOP_K
    else:
        gate = tl.load(gate_ptr + slot).to(tl.float32)
    return gate
