"""What comes after the encoder, and the names of what goes in and comes out.

Heads are the family's own modules. One that looks at each token by itself is given the rows, one for whole
sequences their first tokens: neither sees padding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from moebert_kernels.errors import UserError
from moebert_kernels.export.encoder import Encoded, RowEncoder, base_of
from moebert_kernels.models.families import HEADS

SEQUENCE, TOKENS, ANSWERS, MASKED = HEADS
NO_ANSWER = -10000.0  # a logit: no answer begins or ends at padding


class _StatesBase(nn.Module):
    """Stands for a base model: returns the states it is given as `inputs_embeds`, pooled if need be."""

    def __init__(self, pooler: nn.Module | None):
        super().__init__()
        self.pooler = pooler

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPooling:
        pooled = None if self.pooler is None else self.pooler(inputs_embeds)
        states: Any = inputs_embeds
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)


class ExportedModel(nn.Module):
    """A model as it is exported: takes int64 [B, S] tensors and returns a tuple of tensors.

    Args:
        model: a base model of one of our families, dense or with experts, or one of `families.HEADS` on it.
        pool: for a base model that embeds sentences: makes embeddings [B, D] of states [B, S, D] and a mask.
        token_types: whether `token_type_ids` are an input.

    Attributes:
        input_names: of the graph.
        output_names: of the graph.

    Raises:
        UserError: the model is none of these.
    """

    def __init__(self, model: PreTrainedModel, *, pool: Any = None, token_types: bool = False):
        super().__init__()
        self.encoder = RowEncoder(model)
        self.kind, self.pool = head_of(model), pool
        base, _ = base_of(model)
        self.head = None
        if self.kind is not None:
            pooler = copy.deepcopy(getattr(base, "pooler", None)) if self.kind == SEQUENCE else None
            stub = _StatesBase(pooler)
            self.head = copy.deepcopy(model, {id(base): stub})
        self.input_names = ["input_ids", "attention_mask"] + ["token_type_ids"] * token_types
        if self.kind is None:
            self.output_names = ["last_hidden_state"] + ["sentence_embedding"] * (pool is not None)
        else:
            self.output_names = ["start_logits", "end_logits"] if self.kind == ANSWERS else ["logits"]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs in the order of `output_names`."""
        encoded = self.encoder(input_ids, attention_mask, token_type_ids)
        if self.head is None:
            states_BSD = _padded(encoded, encoded.x_ND, attention_mask, 0.0)
            return (states_BSD, *([] if self.pool is None else [self.pool(states_BSD, attention_mask)]))
        if self.kind == SEQUENCE:
            B, S = input_ids.shape
            first_B = encoded.layout.row_T.view(B, S)[:, 0]
            return (self.head(inputs_embeds=encoded.x_ND.index_select(0, first_B).unsqueeze(1)).logits,)
        found = self.head(inputs_embeds=encoded.x_ND.unsqueeze(0))
        fill = NO_ANSWER if self.kind == ANSWERS else 0.0
        logits = [found[name] for name in self.output_names]
        return tuple(_padded(encoded, rows.squeeze(0), attention_mask, fill) for rows in logits)


def _padded(encoded: Encoded, rows: Tensor, mask_BS: Tensor, fill: float) -> Tensor:
    """Rows [N, ...] in their places, [B, S, ...], and `fill` at padding."""
    padded = encoded.layout.padded(rows, encoded.batch.grid.batch_size, encoded.batch.grid.length)
    real = mask_BS != 0
    return torch.where(real if padded.dim() == 2 else real.unsqueeze(-1), padded, fill)


def head_of(model: PreTrainedModel) -> str | None:
    """The head's name in `families.HEADS`; None for a base model.

    Raises:
        UserError: it is another head.
    """
    base, family = base_of(model)
    if model is base:
        return None
    name = type(model).__name__.removeprefix("MoE").removeprefix(family.name)
    if name not in HEADS:
        raise UserError(
            f"model must be a base model or have one of the heads {', '.join(HEADS)}, got "
            f"{type(model).__name__}"
        )
    return name
