"""Token scores: what each neuron is worth to each token id, for experts that know their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels.compress import distributed
from moebert_kernels.errors import UserError
from moebert_kernels.models.surgery import find_ffns

DEFAULT_LIMIT_BYTES = 2 << 30

_MOST_SIMILARITIES = 1 << 24


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The score of every neuron for every group of token ids; G groups.

    Attributes:
        scores_LGF: [layers, groups, dense width] finite and not negative; float32 on the CPU.
        group_V: int64 [V], the group of every token id, see `group_tokens`.

    Raises:
        UserError: the tensors are not of this kind.
    """

    scores_LGF: Tensor
    group_V: Tensor

    def __post_init__(self):
        scores_LGF, group_V = self.scores_LGF, self.group_V
        if scores_LGF.dim() != 3 or 0 in scores_LGF.shape or not scores_LGF.is_floating_point():
            raise UserError(
                "token scores must be floating-point numbers of shape [layers, groups, neurons], got"
                f" {tuple(scores_LGF.shape)} {scores_LGF.dtype}"
            )
        if group_V.dim() != 1 or 0 in group_V.shape or group_V.is_floating_point():
            raise UserError(
                f"group_V must be one integer per token id, got {tuple(group_V.shape)} {group_V.dtype}"
            )
        scores_LGF = scores_LGF.detach().to("cpu", torch.float32).contiguous()
        group_V = group_V.to("cpu", torch.int64).contiguous()
        low, high = scores_LGF.aminmax()  # nan if there is one
        if not (low >= 0 and high < torch.inf):
            raise UserError("token scores must be finite and not negative, and some are not")
        if not 0 <= int(group_V.min()) <= int(group_V.max()) < scores_LGF.shape[1]:
            raise UserError(
                f"group_V must name groups in [0, {scores_LGF.shape[1]}), found {int(group_V.min())} to"
                f" {int(group_V.max())}"
            )
        object.__setattr__(self, "scores_LGF", scores_LGF)
        object.__setattr__(self, "group_V", group_V)


def token_groups(
    model: PreTrainedModel, counts_V: Tensor, *, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> Tensor:
    """Group a model's token ids so that scoring them takes no more than `limit_bytes`.

    A group has 4 L F bytes of scores, F the dense width. By default, 2 GiB, BERT-base has room for 14,563
    groups and MiniLM for its whole vocabulary.

    Args:
        model: whose feed-forward networks are to be scored, with its input embeddings.
        counts_V: how often each id occurs in the rows that are to be scored.
        limit_bytes: of the scores.

    Returns:
        group_V, see `group_tokens`.

    Raises:
        ValueError: there is not one count per id, or no id occurs.
    """
    ffns = find_ffns(model)
    group_bytes = 4 * len(ffns) * ffns[0].w1.out_features
    embedding_VD = cast(nn.Embedding, model.get_input_embeddings()).weight.detach()
    return group_tokens(counts_V, embedding_VD, max(1, limit_bytes // group_bytes))


def group_tokens(counts_V: Tensor, embedding_VD: Tensor, most_groups: int) -> Tensor:
    """Give every token id a group: what is scored and routed as one.

    An id that occurs is a group by itself. If that makes too many, only the most frequent are (the lower id
    first among equals). Every other id, rare or not seen at all, joins the group whose embedding has the
    largest cosine with its own. Groups are numbered in the order of their ids.

    Similarities are taken in blocks of 64 MiB.

    Args:
        counts_V: [V] integers, not negative.
        embedding_VD: floating point, on any device.
        most_groups: at least 1.

    Returns:
        int64 [V] on the CPU, from 0 to the number of groups - 1.

    Raises:
        ValueError: there is not one count per id, or no id occurs.
    """
    if counts_V.shape != embedding_VD.shape[:1]:
        raise ValueError(
            f"counts_V must be one count per token id [{embedding_VD.shape[0]}], got {tuple(counts_V.shape)}"
        )
    counts_V = counts_V.cpu()
    num_groups = min(int((counts_V > 0).sum()), most_groups)
    if num_groups < 1:
        raise ValueError("counts_V is 0 throughout: no token occurs that could be scored")
    ids_G = counts_V.argsort(descending=True, stable=True)[:num_groups].sort().values
    group_V = torch.full_like(counts_V, -1, dtype=torch.int64)
    group_V[ids_G] = torch.arange(num_groups)

    unit_VD = F.normalize(embedding_VD.to(torch.promote_types(embedding_VD.dtype, torch.float32)), dim=1)
    unit_DG = unit_VD[ids_G.to(unit_VD.device)].T
    others = (group_V < 0).nonzero().squeeze(1)
    for ids in others.split(max(1, _MOST_SIMILARITIES // num_groups)):
        group_V[ids] = (unit_VD[ids.to(unit_VD.device)] @ unit_DG).argmax(1).cpu()
    return group_V


class TokenScoreSums:
    """Sums up token scores while a model is scored: |a_tj dL/da_tj| over the tokens t of every group.

    That is how much the loss changes, to first order, if neuron j is silent at this one token.

    Args:
        group_V: from `token_groups`.
        num_layers: L.
        width: dense width.
        dtype: of the sums.
        device: of the model.
    """

    def __init__(
        self, group_V: Tensor, num_layers: int, width: int, *, dtype: torch.dtype, device: torch.device
    ):
        self._group_V = group_V.to(device)
        shape = (num_layers, int(group_V.max()) + 1, width)
        self._scores_LGF = torch.zeros(shape, dtype=dtype, device=device)
        self._group_BS = torch.empty(0, 0)

    def begin_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Take note of the token ids of the batch that is scored next; padding will count nothing."""
        if "input_ids" not in batch:
            raise ValueError(f"token scores need a batch's input_ids, got only {', '.join(batch)}")
        self._group_BS = self._group_V[batch["input_ids"]]
        if "attention_mask" in batch:
            self._group_BS = self._group_BS.masked_fill(batch["attention_mask"] == 0, -1)

    def add(self, layer: int, first: int, product_BSF: Tensor) -> None:
        """Add a layer's a * dL/da at the positions from `first` on."""
        group_T = self._group_BS[:, first : first + product_BSF.shape[1]].flatten()
        # Each group's tokens are summed in their order; adding them up by index is in no fixed order on CUDA.
        order_T = group_T.argsort(stable=True)
        groups, counts = group_T.unique(return_counts=True)
        sums_GF = F.embedding_bag(
            order_T, product_BSF.abs().flatten(0, 1), counts.cumsum(0) - counts, mode="sum"
        )
        real = groups >= 0
        self._scores_LGF[layer].index_add_(0, groups[real], sums_GF[real])

    def add_up(self) -> None:
        """Add what other processes have found; collective."""
        distributed.all_reduce(self._scores_LGF)

    def scores(self) -> TokenScores:
        """Return what has been added so far."""
        return TokenScores(self._scores_LGF, self._group_V)
