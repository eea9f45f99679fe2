"""Losses of the teacher's own, for importance without labels: how far its predictions or embeddings move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.compress.data.predictions import Pooling, prediction_kind
from moebert_kernels.compress.scoring.importance import LossFunction

_NUM_DIRECTIONS = 1021  # a prime: sums of token ids fall on all of them
_NEXT_PLACE = 31  # from one token's direction to the next one's


def _sample_numbers(input_ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """A number for every sample [B], from its token ids alone: how samples are batched changes nothing."""
    return (input_ids_BS * (mask_BS != 0)).sum(1)


def _drawn_directions(width: int, seed: int) -> Tensor:
    """Directions [_NUM_DIRECTIONS, width] to take components along; normal, float32."""
    return torch.randn((_NUM_DIRECTIONS, width), generator=torch.Generator().manual_seed(seed))


def prediction_shift_loss(config: Any, *, seed: int = 0) -> LossFunction:
    """The component of the teacher's prediction along a direction that is drawn for every sample.

    A divergence from the teacher's own prediction has no gradient where it is 0. But twice the roots of
    probabilities, 2 sqrt(p), are coordinates in which it is half a squared distance, to second order (Fisher
    information); and along a random direction, the square of a move is the squared distance in the mean. So
    importance by this loss says how far predictions move without a neuron. Real positions alone count.

    * Classes: of their probabilities; of tokens, a direction for each.
    * Several classes to a text: of the probabilities of each class's yes and no.
    * Spans: of the probabilities of start and end among the positions; the mean of the two.
    * Numbers: of the numbers themselves.

    Args:
        config: the teacher's.
        seed: of the directions.

    Returns:
        A loss for `compute_importance`: of a model's output and its batch, the sum over samples.
    """
    directions_NC = _drawn_directions(config.num_labels, seed)
    no_directions_NC = _drawn_directions(config.num_labels, seed + 1)
    places_N1 = _drawn_directions(1, seed)

    def loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        ids_BS = batch["input_ids"]
        mask_BS = batch.get("attention_mask", torch.ones_like(ids_BS))
        number_B = _sample_numbers(ids_BS, mask_BS)
        number_BS = number_B.unsqueeze(1) + _NEXT_PLACE * (mask_BS != 0).cumsum(1)

        def along(directions: Tensor, number: Tensor) -> Tensor:
            return directions.to(number.device)[number % _NUM_DIRECTIONS]

        kind = prediction_kind(output, config)
        if kind == "question_answering":
            total = torch.zeros((), device=ids_BS.device)
            for which, logits_BS in enumerate((output.start_logits, output.end_logits)):
                lowest = torch.finfo(logits_BS.dtype).min
                root_BS = _roots(logits_BS.masked_fill(mask_BS == 0, lowest))
                direction_BS = along(places_N1, number_BS + which * _NUM_DIRECTIONS // 2).squeeze(-1)
                total = total + (root_BS * direction_BS).sum() / 2
            return total
        if kind == "token_classification":
            component_BS = (_roots(output.logits) * along(directions_NC, number_BS)).sum(-1)
            return component_BS.masked_fill(mask_BS == 0, 0).sum()
        if kind == "multi_label_classification":
            directions_BC2 = torch.stack(
                [along(directions_NC, number_B), along(no_directions_NC, number_B)], -1
            )
            return (_yes_and_no_roots(output.logits) * directions_BC2).sum()
        moved_BC = _wide(output.logits) if kind == "regression" else _roots(output.logits)
        return (moved_BC * along(directions_NC, number_B)).sum()

    return loss


def embedding_shift_loss(pooling: Pooling, width: int, *, seed: int = 0) -> LossFunction:
    """The component of the teacher's embedding along a direction that is drawn for every sample.

    A loss that compares an embedding with itself has no gradient. Over many sentences, moves in every
    direction count.

    Args:
        pooling: makes embeddings of last hidden states.
        width: D, of the embeddings.
        seed: of the directions.

    Returns:
        As `prediction_shift_loss`.
    """
    directions_ND = _drawn_directions(width, seed)

    def loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        mask_BS = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        embedding_BD = pooling(output.last_hidden_state, mask_BS)
        number_B = _sample_numbers(batch["input_ids"], mask_BS) % _NUM_DIRECTIONS
        return (embedding_BD * directions_ND.to(embedding_BD.device)[number_B]).sum()

    return loss


def _roots(logits: Tensor) -> Tensor:
    """2 sqrt(p), by way of log p: where p is 0 its root has no gradient, and no infinite one."""
    return 2 * (_wide(logits).log_softmax(-1) / 2).exp()


def _yes_and_no_roots(logits_BC: Tensor) -> Tensor:
    """The roots [B, C, 2] of classes that are each true or not, whatever the others are."""
    return _roots(torch.stack([logits_BC, torch.zeros_like(logits_BC)], -1))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
