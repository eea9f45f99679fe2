"""Which share of the tokens each expert gets while a model is trained, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class TrainingLoad(TrainerCallback, ExportableState):
    """Counts the tokens that each expert of each layer gets in every epoch of a Trainer's run.

    The counts stay on the device until somebody asks, or a checkpoint is saved: they are part of its
    trainer_state.json, and so a resumed run reports what an undisturbed one would.

    Attributes:
        counts_NLE: int64 [L, E] of each epoch begun, the slots that every expert got, padding not among them.
    """

    def __init__(self) -> None:
        self.counts_NLE: list[Tensor] = []

    def add(self, epoch: int, counts_LE: Tensor) -> None:
        """Add what one batch brought; waits for no device.

        Args:
            epoch: counted from 0.
            counts_LE: integers, the slots of each expert, padding not among them.
        """
        if epoch == len(self.counts_NLE):
            self.counts_NLE.append(torch.zeros_like(counts_LE, dtype=torch.int64))
        self.counts_NLE[epoch] = self.counts_NLE[epoch].to(counts_LE.device) + counts_LE

    def shares(self) -> list[list[list[float]]]:
        """Return [N][L][E] for the N epochs begun: each expert's share of its layer's slots.

        A layer's shares add up to 1. With one expert per token they are shares of the real tokens.
        """
        return [_shares(counts_LE) for counts_LE in self.counts_NLE]

    def describe_last(self) -> str:
        """Return in a few words what the fullest expert got in the last epoch begun."""
        shares_LE = _shares(self.counts_NLE[-1])
        share, layer = max((max(shares_E), layer) for layer, shares_E in enumerate(shares_LE, start=1))
        even = 1 / len(shares_LE[0])
        return f"fullest expert {share:.0%} of tokens (layer {layer}; even: {even:.0%})"

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin at nothing, or go on with what the checkpoint holds."""
        key = type(self).__name__
        # A checkpoint without the key is one that was saved by a Trainer without this callback.
        saved = state.stateful_callbacks.setdefault(key, TrainingLoad().state())
        counts_NLE = saved["attributes"]["counts_NLE"] if state.global_step else []
        self.counts_NLE = [torch.tensor(counts_LE) for counts_LE in counts_NLE]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "args": {},
            "attributes": {"counts_NLE": [counts_LE.tolist() for counts_LE in self.counts_NLE]},
        }


def _shares(counts_LE: Tensor) -> list[list[float]]:
    return (counts_LE.double() / counts_LE.sum(1, keepdim=True).clamp(min=1)).tolist()


class SayLoad(TrainerCallback):
    """Says at the end of each epoch what the fullest expert got.

    Args:
        load: counted by the Trainer.
        say: hears the sentence.
    """

    def __init__(self, load: TrainingLoad, say: Callable[[str], None]):
        self._load = load
        self._say = say

    def on_epoch_end(self, args, state, control, **kwargs):
        """Say it."""
        epoch = len(self._load.shares())
        self._say(f"epoch {epoch} of {state.num_train_epochs}: {self._load.describe_last()}")
