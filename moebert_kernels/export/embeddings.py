"""The embeddings of every family on rows: what they have of words, positions, token types and projections."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.export.rows import Layout
from moebert_kernels.models.families import Family


class Embeddings(nn.Module):
    """The sum of a family's embeddings, normalised, on rows [N, D] alone.

    Args:
        base: the base model.
        family: its.
    """

    def __init__(self, base: Any, family: Family):
        super().__init__()
        own = copy.deepcopy(base.embeddings)  # the model keeps its own, and its mode
        self.words, self.norm = own.word_embeddings, own.LayerNorm
        self.positions = own.position_embeddings
        self.types = getattr(own, "token_type_embeddings", None)
        self.tasks = getattr(own, "task_type_embeddings", None)  # ERNIE's
        self.project_before = getattr(own, "embed_proj", None)  # DeBERTa's
        self.project_after = copy.deepcopy(getattr(base, "embeddings_project", None))  # ELECTRA's
        self.padding_id = own.padding_idx if family.skips_positions else None

    def forward(self, layout: Layout, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Embed the real tokens of int64 [B, S]; without token types, all are 0."""

        def rows(of_BS: Tensor) -> Tensor:
            return of_BS.flatten().index_select(0, layout.place_N)

        x_ND = self.words(rows(input_ids))
        first_1 = torch.zeros(1, dtype=torch.long)  # one embedding for all rows
        if self.types is not None:
            x_ND = x_ND + self.types(first_1 if token_type_ids is None else rows(token_type_ids))
        if self.positions is not None:
            x_ND = x_ND + self.positions(rows(self._position_ids(input_ids)))
        if self.tasks is not None:
            x_ND = x_ND + self.tasks(first_1)
        x_ND = self.norm(x_ND if self.project_before is None else self.project_before(x_ND))
        return x_ND if self.project_after is None else self.project_after(x_ND)

    def _position_ids(self, input_ids: Tensor) -> Tensor:
        if self.padding_id is None:
            return torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        real_BS = input_ids.ne(self.padding_id).long()
        return real_BS.cumsum(1) * real_BS + self.padding_id
