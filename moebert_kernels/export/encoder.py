"""An encoder as it is exported: the weights of a transformers model in modules that work on rows.

Rows of real tokens are made once, of the token ids; hidden states are [N, D] from the embeddings to the head.
Under hash routing the rows are in the order of the layer's experts, settled for all layers before the first
runs, so that no layer has to sort its input and to undo it after.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels.activations import activate
from moebert_kernels.errors import UserError
from moebert_kernels.export.attention import Attention, Batch, DisentangledAttention, Linear
from moebert_kernels.export.embeddings import Embeddings
from moebert_kernels.export.operator import sorted_experts
from moebert_kernels.export.positions import RelativeBias, RelativeNumbers
from moebert_kernels.export.rows import Grid, Layout, Sorted, rank_by_expert, real_rows, sort_by_hash
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models import is_moe, max_tokens
from moebert_kernels.models.families import Family, dense_ffn, find_base
from moebert_kernels.models.modeling import MoEPreTrainedModel
from moebert_kernels.routing import SentenceGate

# Added to scores at padding, whose keys are copies of the sequence's first (`Layout`): e^-60 of its weight is
# far below what float32 adds to 1, and no denormal number, which the usual least float makes and CPUs take
# ten times as long for. Relative positions move copies apart, by no more than `spread`.
PADDING_SCORE = -60.0


def base_of(model: nn.Module) -> tuple[PreTrainedModel, Family]:
    """The base model under any head, dense or with experts, or `model` itself, and its family.

    Raises:
        UserError: it is of no family that is known here.
    """
    if isinstance(model, MoEPreTrainedModel):
        return cast(PreTrainedModel, model.base_model), model.family
    try:
        return find_base(model)
    except ValueError as error:
        raise UserError(str(error)) from None


class DenseFFN(nn.Module):
    """The feed-forward half of a dense layer."""

    def __init__(self, layer: nn.Module, family: Family):
        super().__init__()
        ffn = dense_ffn(layer, family.shape)
        self.w1, self.w2 = (Linear(linear.weight, linear.bias) for linear in (ffn.w1, ffn.w2))
        self.norm, self.activation = copy.deepcopy(ffn.norm), ffn.activation

    def forward(self, x_ND: Tensor) -> Tensor:
        """Apply to rows."""
        return self.norm(self.w2(activate(self.activation, self.w1(x_ND))) + x_ND)


class Experts(nn.Module):
    """The experts of a layer, each with tensors of its own, and those of the neurons that they share."""

    def __init__(self, ffn: MoEFFN):
        super().__init__()
        for name, tensors in _tensors_of(ffn).items():
            setattr(self, name, nn.ParameterList(nn.Parameter(tensor) for tensor in tensors))
        self.num_experts, self.activation, self.norm_eps = ffn.num_experts, ffn.activation, ffn.norm_eps

    def forward(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:
        """Apply to rows that are sorted by expert."""
        tensors = (list(cast(nn.ParameterList, getattr(self, name))) for name in _TENSORS)
        return sorted_experts(x_SD, counts_E, *tensors, self.activation, self.norm_eps)


_TENSORS = ("w1_DF", "b1_F", "w2_FD", "b2_D", "ln_w_D", "ln_b_D", "shared")  # in the operator's order


def _tensors_of(ffn: Any) -> dict[str, list[Tensor]]:
    """The operator's tensors of a `MoEFFN`: the one place that knows what it calls them."""
    stacked: tuple[Any, ...] = (
        ffn.w1_EFD.transpose(1, 2),
        ffn.bias1_EF,
        ffn.w2_EDF.transpose(1, 2),
        ffn.bias2_ED,
        ffn.layernorm_weight_ED,
        ffn.layernorm_bias_ED,
        (ffn.shared_w1_CD.t(), ffn.shared_bias1_C, ffn.shared_w2_DC.t()) if ffn.num_shared else (),
    )
    return {
        name: [tensor.detach().contiguous().clone() for tensor in tensors]
        for name, tensors in zip(_TENSORS, stacked, strict=True)
    }


class GatedExperts(nn.Module):
    """Experts behind a learned gate, which looks at each token or at the mean of its sentence."""

    def __init__(self, ffn: MoEFFN):
        super().__init__()
        gate: Any = ffn.router
        self.experts, self.top_k = Experts(ffn), gate.top_k
        self.by_sentence = isinstance(gate, SentenceGate)
        self.gate = Linear(gate.gate.weight, None)

    def forward(self, x_ND: Tensor, layout: Layout, batch: Batch) -> tuple[Tensor, Layout]:
        """Apply to rows; with one expert a token, the result's are sorted by expert, as its layout says."""
        K = self.top_k
        prob_NK, expert_NK = self._choose(x_ND, layout, batch)
        rank_1S, counts_1E = rank_by_expert(expert_NK.view(1, -1), self.experts.num_experts)
        rank_S = rank_1S.squeeze(0)
        if K == 1:
            sorted_ = layout.moved(rank_S)
            prob_N = torch.zeros_like(prob_NK).scatter(0, rank_1S.view(-1, 1), prob_NK)
            return self.experts(layout.ordered_as(sorted_, x_ND), counts_1E.squeeze(0)) * prob_N, sorted_
        row_S = torch.arange(expert_NK.shape[0]).repeat_interleave(K)
        order_S = torch.zeros_like(rank_S).scatter(0, rank_S, row_S)
        y_SD = self.experts(x_ND.index_select(0, order_S), counts_1E.squeeze(0))
        y_NKD = y_SD.index_select(0, rank_S).view(-1, K, x_ND.shape[1])
        return (y_NKD * prob_NK.unsqueeze(2)).sum(1), layout

    def _choose(self, x_ND: Tensor, layout: Layout, batch: Batch) -> tuple[Tensor, Tensor]:
        """The K most probable experts' probabilities and numbers, [N, K]."""
        if not self.by_sentence:
            return self.gate(x_ND).softmax(-1).topk(self.top_k, dim=-1)
        sentence_N = layout.place_N // batch.grid.length
        of_BN = (sentence_N == torch.arange(batch.grid.batch_size).unsqueeze(1)).to(x_ND.dtype)
        mean_BD = torch.matmul(of_BN, x_ND) / of_BN.sum(1, keepdim=True).clamp(min=1)
        prob_BK, expert_BK = self.gate(mean_BD).softmax(-1).topk(self.top_k, dim=-1)
        return prob_BK.index_select(0, sentence_N), expert_BK.index_select(0, sentence_N)


class Encoded(NamedTuple):
    """An encoder's result: rows, their layout and the batch's shape."""

    x_ND: Tensor
    layout: Layout
    batch: Batch


class RowEncoder(nn.Module):
    """A base model, dense or with experts, without what heads are.

    Args:
        model: a base model of one of our families, or any head on one; in eval mode.

    Raises:
        UserError: it is none, or has a part that is not known here.
    """

    tables_UV: Tensor | None

    def __init__(self, model: nn.Module):
        super().__init__()
        base: Any
        base, family = base_of(model)
        config = base.config
        self.num_heads = config.num_attention_heads
        encoder: Any = getattr(base, family.encoder_name)
        self.embeddings = Embeddings(base, family)
        self.positions: Any = _relative_positions(encoder, config)
        self.attentions = nn.ModuleList(_attentions(encoder, family, config))
        self.convolution = copy.deepcopy(getattr(encoder, "conv", None))  # of the larger DeBERTas
        if getattr(base, "z_steps", 0) > 1:
            raise UserError(f"{type(base).__name__} with z_steps > 1 cannot be exported")
        self._add_ffns(encoder, family, config)

    def _add_ffns(self, encoder: Any, family: Family, config: Any) -> None:
        self.num_experts, self.table_of_layer = 0, []
        self.register_buffer("tables_UV", None)
        if not is_moe(config):
            self.ffns = nn.ModuleList(DenseFFN(layer, family) for layer in encoder.layer)
        elif config.is_gated:
            self.ffns = nn.ModuleList(GatedExperts(layer.ffn) for layer in encoder.layer)
        else:
            self.ffns = nn.ModuleList(Experts(layer.ffn) for layer in encoder.layer)
            tables_UV, table_of_layer = encoder.tables_LV.long().unique(dim=0, return_inverse=True)
            self.num_experts, self.table_of_layer = config.num_experts, table_of_layer.tolist()
            self.tables_UV = tables_UV

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Encoded:
        """Encode; arguments are int64 [B, S]."""
        (B, S), real = attention_mask.shape, real_rows(attention_mask)
        masked = PADDING_SCORE if self.positions is None else PADDING_SCORE - self.positions.spread
        mask_B11S = torch.where(attention_mask[:, None, None, :] != 0, 0.0, masked)
        relative = () if self.positions is None else self.positions(S)
        grid = Grid(B, S, self.num_heads)
        batch = Batch(grid, grid.context_blocks(), mask_B11S, relative)
        routed = self._routed(input_ids, real, batch)
        layout = real.with_heads(batch.grid) if routed is None else routed.layouts[self.table_of_layer[0]]
        x_ND = embedded_ND = self.embeddings(layout, input_ids, token_type_ids)
        for number, (attention, ffn) in enumerate(zip(self.attentions, self.ffns, strict=True)):
            before = layout
            if routed is not None:
                table = self.table_of_layer[number]
                layout = routed.layouts[table]
                x_ND = ffn(attention(x_ND, before, layout, batch), routed.counts_UE[table])
            elif isinstance(ffn, GatedExperts):
                x_ND, layout = ffn(attention(x_ND, before, layout, batch), layout, batch)
                layout = layout.with_heads(batch.grid)
            else:
                x_ND = ffn(attention(x_ND, before, layout, batch))
            if number == 0 and self.convolution is not None:
                x_ND = self._convolve(embedded_ND, before, x_ND, layout, batch)
        return Encoded(x_ND, layout, batch)

    def _routed(self, input_ids: Tensor, real: Layout, batch: Batch) -> Sorted | None:
        if self.tables_UV is None:
            return None
        return sort_by_hash(self.tables_UV, input_ids.flatten(), real, self.num_experts, batch.grid)

    def _convolve(
        self, embedded_ND: Tensor, before: Layout, x_ND: Tensor, after: Layout, batch: Batch
    ) -> Tensor:
        """The one step beside attention that looks at neighbours: its input is put into the padded form."""
        from transformers.activations import ACT2FN

        conv: Any = self.convolution
        real_BS1 = (batch.mask_B11S == 0).view(batch.grid.batch_size, batch.grid.length, 1)
        padded_BSD = before.padded(embedded_ND, batch.grid.batch_size, batch.grid.length) * real_BS1
        seen_BSD = conv.conv(padded_BSD.transpose(1, 2)).transpose(1, 2)
        seen_ND = seen_BSD.flatten(0, 1).index_select(0, after.place_N)
        return conv.LayerNorm(x_ND + ACT2FN[conv.conv_act](seen_ND))


def _relative_positions(encoder: Any, config: Any) -> nn.Module | None:
    if hasattr(encoder, "relative_attention_bias"):
        return RelativeBias(encoder, max_tokens(config))
    return RelativeNumbers(encoder) if getattr(encoder, "relative_attention", False) else None


def _attentions(encoder: Any, family: Family, config: Any) -> Sequence[Attention]:
    if not getattr(encoder, "relative_attention", False):
        return [Attention(layer, family, config) for layer in encoder.layer]
    rel_embeddings = encoder.get_rel_embedding().detach()
    return [DisentangledAttention(layer, family, config, rel_embeddings) for layer in encoder.layer]
