"""How good a model is on a task's validation rows, and where its tokens go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.batching import padded_batches
from moebert_kernels.compress.tasks import TaskData, compute_metrics


def batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield tokenised rows, shortest first, in padded batches; see `padded_batches`.

    Args:
        rows: as `tasks.tokenize` returns them.
        tokenizer: pads.
        batch_size: rows of a batch; the last may have fewer.
        device: where the tensors go.
        progress: called after each batch has been used with (rows done, rows in all).
    """
    done = 0
    for batch in padded_batches(rows, tokenizer, batch_size):
        yield {name: tensor.to(device) for name, tensor in batch.items()}
        done += len(batch["input_ids"])
        if progress is not None:
            progress(done, len(rows))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Score a model on the validation rows by the task's official metrics.

    Args:
        model: sequence classification or regression; put into eval mode, used where it is.
        data: tokenised.
        tokenizer: the model's.
        batch_size: rows at a time; changes speed alone.
        progress: called with (rows done, rows in all).

    Returns:
        `data.task.metric_names` to their values.
    """
    model.eval()
    logits, labels = [], []
    for batch in batches(
        data.validation, tokenizer, batch_size=batch_size, device=model.device, progress=progress
    ):
        labels.append(batch.pop("labels"))
        logits.append(model(**batch).logits.float())
    prediction = EvalPrediction(
        predictions=np.asarray(torch.cat(logits).cpu()), label_ids=np.asarray(torch.cat(labels).cpu())
    )
    return compute_metrics(data.task)(prediction)


@torch.no_grad()
def expert_load(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> list[list[float]]:
    """Measure which share of the real tokens each expert of each layer gets.

    Args:
        model: a MoE model; put into eval mode.
        batches: its inputs, on its device; "labels" are ignored.

    Returns:
        [L][E], each layer's shares adding up to 1 (0 throughout if there are no tokens).
    """
    model.eval()
    counts_LE: Tensor | int = 0
    for batch in batches:
        routers: list = []
        model(**{name: value for name, value in batch.items() if name != "labels"}, router_outputs=routers)
        counts_LE = counts_LE + torch.stack([router.plan.counts_E for router in routers]).long()
    if isinstance(counts_LE, int):
        raise ValueError("expert_load needs at least one batch")
    return (counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)).tolist()
