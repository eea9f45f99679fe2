"""A padded batch without its padding: real tokens as rows, and the way back.

Notation: B sequences of S places each, T = B * S; N rows, one for every real token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moebert_kernels.checks import check_mask, check_whole
from moebert_kernels.models.windows import DROPOUT, FLASH, Costs, choose_windows

# On the CPU: a batch with fewer places of padding than one in so many is computed as it is.
_LEAST_PADDING = 16
# Of a batch's places, padding among them. Packing is work of the host: 32 x 37 of them, half of it padding,
# took BERT-base 6.8 ms padded and 8.1 packed on an H200 (bench/results/h200/packing.json), whose own work
# was less than either. So many keep it busy for longer.
_LEAST_ON_DEVICE = 16384


class Windows(NamedTuple):
    """Rows that follow each other, cut into windows; see `windows`.

    Attributes:
        number: of windows.
        size: rows of each.
        apart: float32 [number, 1, size, size], what is added to scores: 0 within a sequence and -inf between
            two; None where each window is one. Of bools PyTorch would make as much in every layer.
    """

    number: int
    size: int
    apart: Tensor | None


@dataclass(frozen=True, eq=False)
class Pack:
    """Which rows the real tokens of a batch are, and which of them attend to each other.

    The rows of a sequence follow each other in the order of its tokens; a token attends to those alone. The
    sequences follow each other in the order of their windows on the CPU, and in their own elsewhere.

    Made by `from_mask`, and given to a model as `pack=`: several models that are given the same batch need it
    only once.

    Attributes:
        batch_size: B.
        length: S.
        place_N: int64, the place of each row, counted over the whole batch; T for a row that no token has.
        real_N: bool, which rows a token has; None if all.
        windows: what attention takes at a time, in the order of rows; None where the host does not know
            how long sequences are, and on accelerators.
        max_length: no sequence is longer.
        row_T: int64, the row of each place, at padding any; None where attention needs none.
        key_B11S: bool, which places attention may look at; with `row_T`.
        cu_seqlens: int32, where sequences begin, and the number of rows last, as variable-length attention
            takes them; None on the CPU.
        surplus: 0, or NaN where there were more real tokens than rows; None where that cannot be.
        keep_rows: what the model says of tokens stays rows, see `from_mask`.
    """

    batch_size: int
    length: int
    place_N: Tensor
    real_N: Tensor | None
    windows: tuple[Windows, ...] | None
    max_length: int
    row_T: Tensor | None
    key_B11S: Tensor | None
    cu_seqlens: Tensor | None
    surplus: Tensor | None
    keep_rows: bool = False

    @classmethod
    def from_mask(cls, mask: Tensor, *, max_tokens: int | None = None, keep_rows: bool = False) -> Pack:
        """Pack a batch, however much of it is padding.

        Args:
            mask: [B, S], bool or integer, nonzero at real tokens. Heads that read a sequence's first place
                find nothing there if it is padding: such batches are computed padded where no pack is given.
            max_tokens: so many rows, whatever the mask holds: the host then asks the device nothing, and a
                CUDA graph can be captured. Of a batch with more real tokens, everything becomes NaN.
            keep_rows: the model's hidden states stay [N, D] and its router outputs are of rows, both in the
                order of `place_N`, for losses that are sums over tokens. What heads read and give is [B, S]
                nevertheless, and so is the last hidden state.

        Raises:
            TypeError: `mask` is neither bool nor integer, or `max_tokens` no whole number.
            ValueError: `mask` is not [B, S], or `max_tokens` less than 1.
        """
        check_mask("mask", mask)
        if mask.dim() != 2 or not mask.numel():
            raise ValueError(f"mask must have shape [B, S], got {tuple(mask.shape)}")
        real_BS = mask if mask.dtype == torch.bool else mask != 0
        if max_tokens is not None:
            check_whole("max_tokens", max_tokens, least=1)
            return _of_bounded(real_BS, min(max_tokens, mask.numel()), keep_rows)
        count_B = real_BS.sum(1)
        if _on_host(mask):
            counts = count_B.tolist()
            if not any(counts):
                return _of_bounded(real_BS, 1, keep_rows)
            return _of_host(real_BS, counts, FLASH, keep_rows)
        total, longest = torch.stack([count_B.sum(), count_B.max()]).tolist()
        if not total:
            return _of_bounded(real_BS, 1, keep_rows)
        return _of_device(real_BS, count_B, total, longest, keep_rows)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.place_N.shape[0]

    def with_rows_kept(self) -> Pack:
        """The same with `keep_rows`."""
        return replace(self, keep_rows=True)

    def rows(self, of_BS: Tensor) -> Tensor:
        """What a tensor [B, S, ...] has for the rows, [N, ...]; for rows that no token has, anything."""
        place_N = self.place_N
        if self.real_N is not None:
            place_N = place_N.clamp(max=self.batch_size * self.length - 1)
        return of_BS.flatten(0, 1).index_select(0, place_N)

    def padded(self, x_N: Tensor, fill: float = 0) -> Tensor:
        """Rows [N, ...] at their places, [B, S, ...], and `fill` at padding."""
        T = self.batch_size * self.length
        spare = 0 if self.real_N is None else 1  # where rows go that no token has
        x_T = x_N.new_full((T + spare, *x_N.shape[1:]), fill).index_copy_(0, self.place_N, x_N)
        if self.surplus is not None and x_N.is_floating_point():  # tokens without a row have the fill
            x_T = x_T + self.surplus.to(x_N.dtype)
        return x_T[:T].view(self.batch_size, self.length, *x_N.shape[1:])

    def sentence_N(self) -> Tensor:
        """int64: which sequence each row is of; B for a row that no token has."""
        return self.place_N.div(self.length, rounding_mode="floor")

    def column_N(self) -> Tensor:
        """int64: where each row stands in its sequence, padding counted."""
        return self.place_N % self.length


class Verdict(NamedTuple):
    """What was found of a batch.

    Attributes:
        pack: how to compute it without padding; None if it is to be computed as it is.
        full: whether it is known to have no padding.
    """

    pack: Pack | None
    full: bool


def pack_if_worthwhile(mask: Tensor, read_BS: Tensor | None = None, *, dropout: bool = False) -> Verdict:
    """Pack a batch if that saves anything and changes nothing that anyone reads.

    That is where every sequence begins with a real token, which poolers and heads read, and wherever else
    something is read. On an accelerator, where of smaller batches the host is the bottleneck, from 16,384
    places on; it is asked one question then, as transformers' own masks for SDPA do.

    Args:
        mask: [B, S], bool or integer, nonzero at real tokens.
        read_BS: bool, further places that are read.
        dropout: whether attention will drop weights.
    """
    total = mask.numel()
    if not total or (total < _LEAST_ON_DEVICE and not _on_host(mask)):
        return Verdict(None, False)
    real_BS = mask if mask.dtype == torch.bool else mask != 0
    count_B = real_BS.sum(1)
    if _on_host(mask):
        counts = count_B.tolist()
        num_real = sum(counts)
        if num_real == total:
            return Verdict(None, True)
        if (total - num_real) * _LEAST_PADDING < total or not _reads_real(real_BS, read_BS):
            return Verdict(None, False)
        return Verdict(_of_host(real_BS, counts, DROPOUT if dropout else FLASH, False), False)
    found = torch.stack([count_B.sum(), count_B.max(), _reads_real(real_BS, read_BS)]).tolist()
    num_real, longest, reads_real = found
    if num_real == total:
        return Verdict(None, True)
    return Verdict(_of_device(real_BS, count_B, num_real, longest, False) if reads_real else None, False)


def _on_host(mask: Tensor) -> bool:
    """Whether the host can look at values without waiting for them."""
    return mask.device.type == "cpu"


def _reads_real(real_BS: Tensor, read_BS: Tensor | None) -> Tensor:
    first = real_BS[:, 0].all()
    return first if read_BS is None else first & (real_BS | ~read_BS).all()


def _of_host(real_BS: Tensor, counts: list[int], costs: Costs, keep_rows: bool) -> Pack:
    """On the CPU."""
    B, S = real_BS.shape
    groups = choose_windows(counts, costs)
    order = [number for group in groups for window in group.windows for number in window]
    order_b = torch.tensor(order, dtype=torch.int64)
    rank_N, column_N = real_BS.index_select(0, order_b).nonzero(as_tuple=True)
    place_N = order_b.index_select(0, rank_N) * S + column_N
    windows, ranks = [], rank_N.split([len(group.windows) * group.size for group in groups])
    for (size, members), rank_n in zip(groups, ranks, strict=True):
        apart = None
        if any(len(window) > 1 for window in members):
            rank_WR = rank_n.view(len(members), size)
            differ_WRR = rank_WR.unsqueeze(2) != rank_WR.unsqueeze(1)
            apart = torch.zeros(differ_WRR.shape).masked_fill_(differ_WRR, -torch.inf).unsqueeze(1)
        windows.append(Windows(len(members), size, apart))
    return Pack(B, S, place_N, None, tuple(windows), max(counts), None, None, None, None, keep_rows)


def _of_device(real_BS: Tensor, count_B: Tensor, num_rows: int, longest: int, keep_rows: bool) -> Pack:
    B, S = real_BS.shape
    place_N, row_T = _places(real_BS, num_rows)
    cu_seqlens = torch.nn.functional.pad(count_B.cumsum(0, dtype=torch.int32), (1, 0))
    key_B11S = _keys(real_BS)
    return Pack(B, S, place_N, None, None, longest, row_T, key_B11S, cu_seqlens, None, keep_rows)


def _of_bounded(real_BS: Tensor, num_rows: int, keep_rows: bool) -> Pack:
    """Rows that no token has are sequences of their own, so that attention gives them finite numbers."""
    B, S = real_BS.shape
    place_N, row_T = _places(real_BS, num_rows)
    ends_B = real_BS.sum(1).cumsum(0)
    spare_B = ends_B[-1] + S * torch.arange(1, B + 1, device=ends_B.device)
    ends = torch.cat([ends_B, spare_B]).clamp(max=num_rows).to(torch.int32)
    return Pack(
        B,
        S,
        place_N,
        place_N < B * S,
        None,
        S,
        row_T,
        _keys(real_BS),
        torch.nn.functional.pad(ends, (1, 0)),
        torch.where(ends_B[-1] > num_rows, torch.nan, 0.0),
        keep_rows,
    )


def _places(real_BS: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`place_N` and `row_T`, in sizes that the host knows: nothing is asked of the device."""
    real_T = real_BS.flatten()
    T = real_T.shape[0]
    rank_T = real_T.cumsum(0) - 1
    target_T = torch.where(real_T, rank_T, num_rows).clamp(max=num_rows)
    place_T = torch.arange(T, device=real_T.device)
    place_N = place_T.new_full((num_rows + 1,), T).scatter(0, target_T, place_T)[:num_rows]
    return place_N, rank_T.clamp(0, num_rows - 1)


def _keys(real_BS: Tensor) -> Tensor:
    """All places of a sequence without real tokens: of nothing to look at, attention would make NaN."""
    return (real_BS | ~real_BS.any(1, keepdim=True))[:, None, None, :]
