"""Losses of a teacher's own, for importance without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.compress.losses import prediction_kind

_NUM_DRAWS = 1021  # a prime: sums of token ids fall on all of them


def drawn_label_loss(config: Any, *, seed: int = 0) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """The loss of a label that is drawn from the teacher's own prediction, as `compute_importance` takes it.

    In the mean over draws, the squares of its gradients are what the divergence from the teacher's prediction
    grows by (Fisher information); that has itself no gradient where it is 0. What is drawn for a sample
    depends on the seed and its token ids alone: how samples are batched changes nothing.

    * Classes: the cross entropy of a drawn class; of tokens, one for each real token.
    * Spans: the mean of the two cross entropies of a drawn start and end, among real positions.
    * Numbers: their sum, each with a sign that is drawn, since any number is as good a label as the other.

    Args:
        config: the teacher's.
        seed: of the draws.
    """
    draws_N = torch.rand(_NUM_DRAWS, generator=torch.Generator().manual_seed(seed))

    def loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        ids_BS = batch["input_ids"]
        mask_BS = batch.get("attention_mask", torch.ones_like(ids_BS)) != 0
        number_B = (ids_BS * mask_BS).sum(1)

        def draw(number: Tensor) -> Tensor:
            return draws_N.to(number.device)[number % _NUM_DRAWS]

        kind = prediction_kind(output, config)
        if kind == "question_answering":
            logits = torch.stack([output.start_logits, output.end_logits], 1)  # [B, 2, S]
            logits = logits.masked_fill(~mask_BS.unsqueeze(1), torch.finfo(logits.dtype).min)
            places = torch.arange(2, device=ids_BS.device)
            return _drawn_cross_entropy(logits, draw(number_B.unsqueeze(1) + 512 * places)).sum() / 2
        if kind == "token_classification":
            places = torch.arange(ids_BS.shape[1], device=ids_BS.device)
            drawn_BS = draw(number_B.unsqueeze(1) + 31 * places)
            return _drawn_cross_entropy(output.logits, drawn_BS).masked_fill(~mask_BS, 0).sum()
        if kind == "regression":
            places = torch.arange(output.logits.shape[1], device=ids_BS.device)
            sign_BC = torch.where(draw(number_B.unsqueeze(1) + 31 * places) < 0.5, -1.0, 1.0)
            return (_wide(output.logits) * sign_BC).sum()
        return _drawn_cross_entropy(output.logits, draw(number_B)).sum()

    return loss


def _drawn_cross_entropy(logits: Tensor, draw: Tensor) -> Tensor:
    """That of the class [...] of logits [..., C] that a number from 0 to 1 falls on."""
    log_p = _wide(logits).log_softmax(-1)
    below = log_p.detach().double().exp().cumsum(-1) <= draw.unsqueeze(-1)
    label = below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return -log_p.gather(-1, label).squeeze(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
