"""Real tokens as rows, [N, D], in whatever order an expert layer wants them.

A batch [B, S] has T = B * S places. Hidden states exist at real tokens only; a `Layout` says which place each
row is of and which row each place reads where attention needs the padded form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The padded form: B sequences of S places, H heads."""

    batch_size: Any
    length: Any
    num_heads: int

    def context_blocks(self) -> Tensor:
        """Which blocks of a context [B * H * S, d] are those of each place, [T, H]."""
        B, S, H = self
        first_BS = torch.arange(B).unsqueeze(1) * (H * S) + torch.arange(S)
        return first_BS.view(-1, 1) + torch.arange(H) * S


class Heads(NamedTuple):
    """What attention gathers, so that nothing has to be split or transposed.

    The product of queries, keys and values [N, 3D] is read as blocks of one head each, [N * 3H, d].

    Attributes:
        query_P, key_P, value_P: int64, the block of each head and place, P = B * H * S of them.
    """

    query_P: Tensor
    key_P: Tensor
    value_P: Tensor


class Layout(NamedTuple):
    """An order of the rows.

    Attributes:
        place_N: int64, the place of each row.
        row_T: int64, the row of each place; at padding that of its sequence's first token: as a key, it
            scores no higher than the highest, and a small number is enough to mask it.
        heads: None until attention asks.
    """

    place_N: Tensor
    row_T: Tensor
    heads: Heads | None = None

    def ordered_as(self, other: Layout, x_ND: Tensor) -> Tensor:
        """Rows in this order put into another's."""
        return x_ND if other is self else x_ND.index_select(0, self.row_T.index_select(0, other.place_N))

    def moved(self, rank_N: Tensor) -> Layout:
        """The layout whose row `rank_N[i]` is this one's row i."""
        place_N = torch.zeros_like(rank_N).scatter(0, rank_N, self.place_N)
        return Layout(place_N, rank_N.index_select(0, self.row_T))

    def padded(self, x_ND: Tensor, batch_size: Any, length: Any) -> Tensor:
        """The rows at their places, [B, S, ...]; rows of any kind at padding."""
        return x_ND.index_select(0, self.row_T).view(batch_size, length, *x_ND.shape[1:])

    def with_heads(self, grid: Grid) -> Layout:
        """The same, for attention."""
        if self.heads is not None:
            return self
        (layout,) = _layouts(self.place_N.unsqueeze(0), self.row_T.unsqueeze(0), grid)
        return layout


def _layouts(place_UN: Tensor, row_UT: Tensor, grid: Grid) -> list[Layout]:
    """U layouts, for attention."""
    B, S, H = grid
    number_H1 = torch.arange(H).unsqueeze(1)
    query_UP = (row_UT.view(row_UT.shape[0], B, 1, S) * (3 * H) + number_H1).flatten(1)
    stacked = (place_UN, row_UT, query_UP, query_UP + H, query_UP + 2 * H)
    return [
        Layout(place_N, row_T, Heads(*heads))
        for place_N, row_T, *heads in zip(*map(torch.unbind, stacked), strict=True)
    ]


def real_rows(mask_BS: Tensor) -> Layout:
    """All real tokens in order.

    Of a batch that is nothing but padding, one token counts as real: graphs do not read from empty tensors.
    """
    mask_T = (mask_BS != 0).flatten()
    nobody = (mask_T.sum() == 0).unsqueeze(0)
    place_T = torch.arange(mask_T.shape[0])
    place_N = (mask_T | (nobody & (place_T == 0))).nonzero().squeeze(1)
    count_B = (mask_BS != 0).long().sum(1)
    first_B1 = (count_B.cumsum(0) - count_B).clamp(max=place_N.shape[0] - 1).unsqueeze(1)
    row_BS = mask_T.long().cumsum(0).view_as(mask_BS) - 1
    return Layout(place_N, torch.where(mask_BS != 0, row_BS, first_B1).flatten())


class Sorted(NamedTuple):
    """Rows sorted by expert, for each of U routings.

    Attributes:
        layouts: U, one of each routing.
        counts_UE: int64, the rows of each expert.
    """

    layouts: list[Layout]
    counts_UE: Tensor


def sort_by_hash(
    tables_UV: Tensor, input_ids_T: Tensor, real: Layout, num_experts: int, grid: Grid
) -> Sorted:
    """Sort the rows of real tokens by each table, in token order within one expert.

    Args:
        tables_UV: int64, the expert of every token id.
        input_ids_T: of all places.
        real: of the real tokens.
        num_experts: E.
        grid: the batch's.
    """
    expert_UN = tables_UV.index_select(1, input_ids_T.index_select(0, real.place_N))
    rank_UN, counts_UE = rank_by_expert(expert_UN, num_experts)
    place_UN = torch.zeros_like(rank_UN).scatter(1, rank_UN, real.place_N.expand(rank_UN.shape))
    return Sorted(_layouts(place_UN, rank_UN.index_select(1, real.row_T), grid), counts_UE)


def rank_by_expert(expert_UN: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where each row goes when rows are sorted by expert, stably, and how many rows each expert has.

    By counting, in sizes that are known without the data.

    Args:
        expert_UN: int64, the expert of every row, for each of U routings.
        num_experts: E.

    Returns:
        rank_UN and counts_UE, int64.
    """
    chosen_UEN = (expert_UN.unsqueeze(1) == torch.arange(num_experts).unsqueeze(1)).long()
    upto_UEN = chosen_UEN.flatten(1).cumsum(1).view_as(chosen_UEN)
    # 1 is taken off before the sum: what follows a sum of integers OpenVINO 2026.4 joins to it, wrongly.
    return ((upto_UEN - 1) * chosen_UEN).sum(1), chosen_UEN.sum(2)
