"""Batches of rows of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainerCallback

from moebert_kernels.models.config import IGNORED_LABEL

LABEL_COLUMNS = ("labels", "start_positions", "end_positions")


class RowCollator(DataCollatorWithPadding):
    """Pads rows of any kind of task to the longest; labels of tokens, with -100.

    Args:
        tokenizer: pads.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of rows: their columns as tensors [B, S], their labels [B] or [B, S]."""
        rows = [dict(row) for row in features]
        if not isinstance(rows[0].get("labels"), (list, Tensor, np.ndarray)):
            return dict(super().__call__(rows))
        labels = [torch.as_tensor(row.pop("labels")) for row in rows]
        batch = dict(super().__call__(rows))
        side = getattr(self.tokenizer, "padding_side", "right")
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(
            labels, batch_first=True, padding_value=IGNORED_LABEL, padding_side=side
        )
        return batch


class LengthGroupedSampler(Sampler[int]):
    """All rows in a random order whose batches hold rows of like length.

    Rows are shuffled, sorted by length within stretches of `STRETCH` batches, cut into batches, and the
    batches shuffled. The order depends on seed and epoch alone, so that interrupted training goes on with the
    rows it has not seen.

    Args:
        lengths: of every row.
        batch_size: of the batches that the order will be cut into.
        seed: of the order.
    """

    STRETCH = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        stretch = self.STRETCH * self.batch_size
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            order[start : start + stretch] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # Only the last batch may be short, or all those after it would be cut elsewhere.
        for i in generator.permutation(len(order) // self.batch_size):
            yield from batches[i].tolist()
        for rest in batches[len(order) // self.batch_size :]:
            yield from rest.tolist()


class SharedBatchSampler(BatchSampler):
    """The rows of each batch that fall to one of several processes: a step takes those it would take in one.

    The processes take turns, so that their shares are of like length. Shares differ by a row if a last, short
    batch does not divide; if it has fewer rows than there are processes, all of them take it whole. Either
    way the mean over all shares, each item counted wherever it is, is the mean over the batch.

    Args:
        sampler: gives the order of rows.
        batch_size: of a step, over all processes.
        count: of processes.
        index: of this one.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, count: int, index: int):
        super().__init__(sampler, batch_size, drop_last=False)
        self.count = count
        self.index = index

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch if len(batch) < self.count else batch[self.index :: self.count]


class LengthGroupedTrainer(Trainer):
    """A Trainer that takes the rows of a tokenized dataset by `LengthGroupedSampler`.

    Several processes share the rows of each step by `SharedBatchSampler`. Each then draws its own dropout, by
    seed, step and process alone: a resumed run goes on as the interrupted one would have.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.args.world_size > 1:
            self.add_callback(_SeedEachProcess())

    def train(self, *args, **options):
        """Train as `Trainer.train` does, and take off the model what accelerate leaves on it: autocast."""
        model: Any = self.model
        forward = vars(model).get("forward")
        try:
            return super().train(*args, **options)
        finally:
            vars(model).pop("forward", None)
            if forward is not None:
                model.forward = forward

    def get_train_dataloader(self) -> DataLoader:
        """Give each process its share of every batch."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        dataset = self._remove_unused_columns(self.train_dataset, description="Training")
        count = self.args.world_size
        step_size = count * self.args.train_batch_size
        sampler = LengthGroupedSampler(row_lengths(dataset), step_size, self.args.seed)
        loader = DataLoader(
            dataset,
            batch_sampler=SharedBatchSampler(sampler, sampler.batch_size, count, self.args.process_index),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # accelerate's own shares would fill up a short last batch with rows that have had their turn.
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedSampler(row_lengths(dataset), self.args.train_batch_size, self.args.seed)


class _SeedEachProcess(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        entropy = np.random.SeedSequence((args.seed, state.global_step, args.process_index))
        torch.manual_seed(int(entropy.generate_state(1)[0]))


def count_labels(batch: Mapping[str, Any]) -> Tensor:
    """Return how many items of a batch have a label: rows, or tokens if those are labelled."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():  # spans; regression, where -100 is a number like others
        rows = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
        # torch.full, not torch.tensor: the latter copies from the host and waits for the device.
        return torch.full((), rows.shape[0], device=rows.device)
    return labels.ne(IGNORED_LABEL).sum()


def row_lengths(dataset: Dataset) -> list[int]:
    """Return the number of tokens of every row of a tokenized dataset."""
    return [len(ids) for ids in dataset["input_ids"]]


def shortest_first(dataset: Dataset) -> np.ndarray:
    """Return the rows' indices by length; of equal lengths, in their order."""
    return np.argsort(row_lengths(dataset), kind="stable")


def sample_rows(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    """Return `count` rows drawn at random, in the dataset's order; all of them if None or too many."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(np.sort(order[:count]))


def hold_out(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Part rows at random in those to train on and those to choose between models by: a tenth, at most 512.

    Of a single row there is no part: it is both.
    """
    count = min(max(len(dataset) // 10, 1), 512)
    order = np.random.default_rng((seed, 1)).permutation(len(dataset))
    return dataset.select(np.sort(order[count:] if len(dataset) > 1 else order)), dataset.select(
        np.sort(order[:count])
    )


def padded_batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, num_samples: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield every row once, by `shortest_first`, in padded batches: for passes that do not train.

    Args:
        dataset: tokenized, with "labels".
        tokenizer: pads.
        batch_size: rows of a batch.
        num_samples: take so many rows only, evenly spread over the dataset; None for all.
    """
    if num_samples is not None and num_samples < len(dataset):
        dataset = dataset.select(np.linspace(0, len(dataset) - 1, num_samples).round().astype(int))
    collate = RowCollator(tokenizer)
    order = shortest_first(dataset)
    for start in range(0, len(order), batch_size):
        rows = dataset.select(order[start : start + batch_size])
        yield collate(rows.to_list())
