"""What any training may be asked for, and is given."""

from __future__ import annotations

from transformers import TrainingArguments

from moebert_kernels.errors import ArgumentError

MAX_SEED = 2**32 - 1  # numpy takes no larger one


def check_learning_rate(argument: str, rate: float | None) -> None:
    """Raise an ArgumentError unless `rate` is above 0 and below 1, or None.

    AdamW moves a weight by about the learning rate in each step, whatever its gradient is: from 1 on, by more
    than any weight of an encoder is large.
    """
    if rate is not None and not rate > 0:
        raise ArgumentError(argument, f"must be more than 0, got {rate}")
    if rate is not None and rate >= 1:
        raise ArgumentError(
            argument, f"must be less than 1, got {rate:g}: a step moves every weight by about that much"
        )


class OneDevice(TrainingArguments):
    """One device to a process: with DataParallel, batches and outcome would depend on the machine."""

    @property
    def n_gpu(self) -> int:
        """0 or 1."""
        return min(super().n_gpu, 1)
