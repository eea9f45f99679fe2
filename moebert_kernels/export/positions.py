"""Relative positions, in the families whose attention has them.

They are looked up by distance in tables that are made when the module is: a distance that falls on the border
of two buckets in torch falls into the same one in any runtime.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """MPNet's: a bias of each head for each distance, the same in all layers.

    Args:
        encoder: the family's, dense or with experts.
        most: tokens of the longest row.

    Attributes:
        spread: the most by which two biases differ.
    """

    def __init__(self, encoder: Any, most: int):
        super().__init__()
        distance_P = torch.arange(-most, most + 1)
        bias_PH = encoder.relative_attention_bias(encoder.relative_position_bucket(distance_P)).detach()
        self.bias_PH = nn.Parameter(bias_PH)
        self.most = most
        self.spread = float(bias_PH.max() - bias_PH.min())

    def forward(self, length: Any) -> tuple[Tensor, ...]:
        """The bias, [1, H, S, S]."""
        # MPNet counts a distance from the query to the key.
        number_SS = _distances(length, self.most).transpose(0, 1)
        bias_SSH = nn.functional.embedding(number_SS, self.bias_PH)
        return (bias_SSH.permute(2, 0, 1).unsqueeze(0),)


class RelativeNumbers(nn.Module):
    """DeBERTa's: which relative embedding is for each query and key, and for each key and query.

    Args:
        encoder: the family's, dense or with experts.

    Attributes:
        spread: no bound is known of what they add to scores: all that padding can be moved by.
    """

    spread = torch.finfo(torch.float32).max
    query_key_P: Tensor
    key_query_P: Tensor

    def __init__(self, encoder: Any):
        super().__init__()
        buckets, self.most = encoder.position_buckets, encoder.max_relative_positions
        span = buckets if buckets > 0 else self.most
        distance_P = torch.arange(-self.most, self.most + 1)
        bucket_P = _log_buckets(distance_P, buckets, self.most) if buckets > 0 else distance_P
        for name, number_P in (("query_key_P", bucket_P + span), ("key_query_P", span - bucket_P)):
            self.register_buffer(name, number_P.clamp(0, 2 * span - 1))

    def forward(self, length: Any) -> tuple[Tensor, ...]:
        """Numbers [S, S] by query and key, and by key and query."""
        number_SS = _distances(length, self.most)
        return self.query_key_P[number_SS], self.key_query_P[number_SS]


def _distances(length: Any, most: int) -> Tensor:
    """[S, S]: first minus second position, cut to at most `most` and counted from 0."""
    position_S = torch.arange(length)
    return (position_S.unsqueeze(1) - position_S).clamp(-most, most) + most


def _log_buckets(distance_P: Tensor, num_buckets: int, most: int) -> Tensor:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    return make_log_bucket_position(distance_P, num_buckets, most).long()
