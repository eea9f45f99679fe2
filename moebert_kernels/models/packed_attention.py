"""Self-attention of packed rows: one function, known to transformers by the name of `PACKED_SDPA`.

Without a pack it is transformers' "sdpa" in every respect, so that a model can keep the name whether its next
batch is packed or not. Notation: H heads of size d; N rows; see `pack`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from moebert_kernels.models.pack import Pack

PACKED_SDPA = "packed_sdpa"
_LEAST_CAPABILITY = (8, 0)  # of devices with flash attention
_HEAD_SIZES = range(8, 257, 8)  # that flash attention takes


def can_attend_to_rows(implementation: str | None) -> bool:
    """Whether an attention implementation, as a configuration names it, can be given rows."""
    return implementation in ("sdpa", PACKED_SDPA) or "flash" in str(implementation)


def attention_arguments(pack: Pack, implementation: str) -> dict[str, Any]:
    """What attention is called with beside rows: the pack, and what transformers calls its parts."""
    if implementation == PACKED_SDPA or pack.cu_seqlens is None:
        return {"pack": pack}
    lengths, longest = pack.cu_seqlens, pack.max_length
    return {
        "pack": pack,
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pack: Pack | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend, as transformers calls it: `query`, `key` and `value` are [1, H, N, d] with a pack.

    Returns:
        The context [1, N, H, d], and None in the place of weights.
    """
    if pack is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    q_NHd, k_NHd, v_NHd = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if pack.windows is not None:
        context_NHd = attend_in_windows(q_NHd, k_NHd, v_NHd, pack, dropout, scaling)
    elif _has_varlen(query, pack, dropout):
        context_NHd = attend_by_varlen(q_NHd, k_NHd, v_NHd, pack, scaling)
    else:
        context_NHd = attend_in_grid(q_NHd, k_NHd, v_NHd, pack, dropout, scaling)
    return context_NHd.unsqueeze(0), None


def attend_in_windows(
    q_NHd: Tensor, k_NHd: Tensor, v_NHd: Tensor, pack: Pack, dropout: float, scaling: float | None
) -> Tensor:
    """A few sequences at a time, and windows of one size at once; rows stay where they are."""
    assert pack.windows is not None
    sizes = [window.number * window.size for window in pack.windows]
    contexts = []
    for window, *qkv in zip(pack.windows, *(x.split(sizes) for x in (q_NHd, k_NHd, v_NHd)), strict=True):
        q, k, v = (x.reshape(window.number, window.size, *x.shape[1:]).transpose(1, 2) for x in qkv)
        apart = None if window.apart is None else window.apart.to(q.dtype)
        context = scaled_dot_product_attention(q, k, v, attn_mask=apart, dropout_p=dropout, scale=scaling)
        contexts.append(context.transpose(1, 2).flatten(0, 1))
    return torch.cat(contexts)


def attend_in_grid(
    q_NHd: Tensor, k_NHd: Tensor, v_NHd: Tensor, pack: Pack, dropout: float, scaling: float | None
) -> Tensor:
    """In the padded form, with a mask: sizes are those of the batch alone."""
    assert pack.row_T is not None
    shape = (pack.batch_size, pack.length)
    q, k, v = (
        x.index_select(0, pack.row_T).unflatten(0, shape).transpose(1, 2) for x in (q_NHd, k_NHd, v_NHd)
    )
    context = scaled_dot_product_attention(q, k, v, attn_mask=pack.key_B11S, dropout_p=dropout, scale=scaling)
    return pack.rows(context.transpose(1, 2))


def attend_by_varlen(
    q_NHd: Tensor, k_NHd: Tensor, v_NHd: Tensor, pack: Pack, scaling: float | None
) -> Tensor:
    """By flash attention, which reads where sequences begin from the device."""
    assert pack.cu_seqlens is not None
    begin, longest = pack.cu_seqlens, pack.max_length
    # PyTorch 2.10 knows the usual scale alone, and takes no other.
    scale: dict[str, Any] = {} if scaling in (None, q_NHd.shape[-1] ** -0.5) else {"scale": scaling}
    context = varlen_attn(q_NHd, k_NHd, v_NHd, begin, begin, longest, longest, **scale)
    return cast(Tensor, context)


def _has_varlen(query: Tensor, pack: Pack, dropout: float) -> bool:
    return (
        query.is_cuda
        and pack.cu_seqlens is not None
        and query.dtype in (torch.bfloat16, torch.float16)
        and not dropout
        and query.shape[-1] in _HEAD_SIZES
        and torch.cuda.get_device_capability(query.device) >= _LEAST_CAPABILITY
    )


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, AttentionMaskInterface()["sdpa"])
