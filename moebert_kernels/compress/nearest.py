"""The weights with which a student was nearest to its teacher, on rows that it is not trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from moebert_kernels.compress import processes
from moebert_kernels.compress.artifacts import replace_whole
from moebert_kernels.errors import UserError

SHARES = (1.0, 0.5, 0.25)  # of the way from what a student was to what training has made of it

_KEY = "held_out"


class Nearest(NamedTuple):
    """What was kept of a training.

    Attributes:
        distances: as it began and after every epoch, the last of which may be a part of one; the least of
            those at `SHARES` of the way there.
        kept: which of them is that of the weights that were kept; 0: as it began.
        share: of the way to that epoch's weights.
    """

    distances: list[float]
    kept: int
    share: float

    def told(self, epochs: float) -> str:
        """Which weights were kept and why, in a sentence.

        Args:
            epochs: of the training.
        """
        first, *after = (f"{distance:.4g}" for distance in self.distances)
        told = f"divergence from the teacher on held-out rows {first}, after training {', '.join(after)}"
        if not self.kept:
            return f"kept as it began: {told}"
        way = "" if self.share == 1 else f"{self.share:.0%} of the way to "
        return f"kept {way}as after epoch {self.kept} of {epochs:g}: {told}"


class KeepNearest(TrainerCallback):
    """Keeps the student of an epoch's end, or of the beginning, that is nearest to its teacher.

    Between the two, too: of the way that training takes away from a student that is near its teacher already,
    a part is noise of the steps, and a share of it is often nearer than the whole.

    The distances are part of a checkpoint's state, so that a resumed run knows them. The kept weights are in
    a file of their own beside the checkpoints, which says what they are: those of an epoch that a stopped
    run came to and a resumed one comes to again are replaced by nearer ones alone.

    Args:
        student: as training begins, on the device where it is trained.
        file: to keep weights in, .safetensors.
        distance: of the student as it is from its teacher; called in the main process alone.
        steps_per_epoch: of the optimizer.
    """

    def __init__(
        self, student: PreTrainedModel, file: Path, distance: Callable[[], float], steps_per_epoch: int
    ):
        self._student = student
        self._file = file
        self._distance = distance
        self._steps_per_epoch = steps_per_epoch
        self._began = self._weights()

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep what training begins with."""
        if state.global_step == 0:
            self._look(state)

    # Not at the epoch's end, which comes after the checkpoint of its last step: a run that goes on from that
    # one would never come by.
    def on_step_end(self, args, state, control, **kwargs):
        """At the last step of an epoch, see how near the student is."""
        if state.global_step % self._steps_per_epoch == 0 or state.global_step >= state.max_steps:
            self._look(state)

    def restore(self, state: TrainerState) -> Nearest:
        """Give the student the weights that were kept; collective."""
        load_model(self._student, self._file, device=str(self._student.device))
        kept = self._kept()
        processes.wait_for_all()  # the file may go now
        distances = {entry["step"]: entry[_KEY] for entry in state.log_history if _KEY in entry}
        return Nearest(list(distances.values()), list(distances).index(kept["step"]), kept["share"])

    def _look(self, state: TrainerState) -> None:
        step, weights = state.global_step, self._weights()
        distances = []
        for share in SHARES if step else SHARES[:1]:
            self._give([begun.lerp(now, share) for begun, now in zip(self._began, weights, strict=True)])
            distance = processes.on_main(self._distance)
            if not math.isfinite(distance):
                raise UserError(
                    f"distillation diverged: on held-out rows the student is {distance} from its teacher at "
                    f"step {step} of {state.max_steps}; use a lower learning rate"
                )
            distances.append(distance)
            told = {"step": step, "share": share, "distance": distance}
            processes.on_main(lambda told=told: self._keep(told))
        self._give(weights)
        state.log_history.append({"step": step, _KEY: min(distances)})

    def _weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self._student.parameters()]

    def _give(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self._student.parameters(), values, strict=True):
                weight.copy_(value)

    def _keep(self, told: dict[str, Any]) -> None:
        if told["step"] and self._file.exists() and told["distance"] >= self._kept()["distance"]:
            return
        with replace_whole(self._file) as fresh:
            save_model(self._student, str(fresh), {"kept": json.dumps(told)})

    def _kept(self) -> dict[str, Any]:
        with safe_open(self._file, "pt") as file:
            return json.loads(file.metadata()["kept"])
