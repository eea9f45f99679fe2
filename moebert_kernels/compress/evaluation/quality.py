"""How good a model is on a task's validation rows, and where its tokens go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.data.batching import LABEL_COLUMNS, padded_batches, shortest_first
from moebert_kernels.compress.data.predictions import Pooling
from moebert_kernels.compress.data.tasks import EncodedData


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
def predict(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: Pooling | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Return what a model says of every row, in the rows' order.

    Args:
        model: with any of the heads that `tasks` knows, or none but a `pooling`; put into eval mode, used
            where it is.
        rows: as `tasks.tokenize` makes them; labels are ignored.
        tokenizer: the model's.
        pooling: makes embeddings of last hidden states and mask; None for a model with a head.
        batch_size: rows at a time; changes speed alone.
        progress: called with (rows done, rows in all).

    Returns:
        float32 [D] of each row that is embedded, [C] of one that is classified, or [S, C] for its S tokens
        without padding; for question answering C is 2, the logits of start and end.
    """
    model.eval()
    found: list[np.ndarray] = []
    for batch in batches(rows, tokenizer, batch_size=batch_size, device=model.device, progress=progress):
        output = model(**_without_labels(batch))
        if pooling is not None:
            logits = pooling(output.last_hidden_state, batch.get("attention_mask"))
        elif "start_logits" in output:
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        else:
            logits = output.logits
        values = logits.float().cpu().numpy()
        if logits.dim() == 3:
            mask_BS = batch["attention_mask"].bool().cpu().numpy()
            found += [row_SC[mask_S] for row_SC, mask_S in zip(values, mask_BS, strict=True)]
        else:
            found += list(values)
    in_order: list[np.ndarray] = [np.empty(0)] * len(found)
    for index, value in zip(shortest_first(rows), found, strict=True):
        in_order[index] = value
    return in_order


def evaluate(
    model: PreTrainedModel,
    data: EncodedData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: Pooling | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Score a model on all validation sets by the task's official metrics.

    Args:
        model: with the task's head; put into eval mode, used where it is.
        data: tokenised.
        tokenizer: the model's.
        pooling: as for `predict`.
        batch_size: rows at a time; changes speed alone.
        progress: called with (rows done, rows in all).

    Returns:
        `data.task.metric_names` to their values; those of a further validation set have its name appended,
        as in "accuracy_mismatched".
    """
    total = sum(len(encoded.rows) for encoded in data.validation_sets.values())
    outputs: dict[str, list[np.ndarray]] = {}
    before = 0
    for name, encoded in data.validation_sets.items():

        def report(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        outputs[name] = predict(
            model, encoded.rows, tokenizer, pooling=pooling, batch_size=batch_size, progress=report
        )
        before += len(encoded.rows)
    return score(data, outputs)


def score(data: EncodedData, outputs: Mapping[str, list[np.ndarray]]) -> dict[str, float]:
    """Score what `predict` returned of each of `data.validation_sets`, by name; see `evaluate`."""
    metrics: dict[str, float] = {}
    for name, encoded in data.validation_sets.items():
        suffix = f"_{name}" if name else ""
        metrics |= {metric + suffix: value for metric, value in encoded.score(outputs[name]).items()}
    return metrics


def _without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in LABEL_COLUMNS}


@torch.no_grad()
def expert_load(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> list[list[float]]:
    """Measure which share of the real tokens each expert of each layer gets.

    Args:
        model: a MoE model; put into eval mode.
        batches: its inputs, on its device; labels are ignored.

    Returns:
        [L][E], each layer's shares adding up to 1 (0 throughout if there are no tokens).
    """
    model.eval()
    counts_LE: Tensor | int = 0
    for batch in batches:
        routers: list = []
        model(**_without_labels(batch), router_outputs=routers)
        counts_LE = counts_LE + torch.stack([router.plan.counts_E for router in routers]).long()
    if isinstance(counts_LE, int):
        raise ValueError("expert_load needs at least one batch")
    return (counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)).tolist()
