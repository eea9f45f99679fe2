"""The weights with which a student was nearest to its teacher, on rows that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from moebert_kernels.compress import distributed
from moebert_kernels.compress.storage.artifacts import replace_whole
from moebert_kernels.errors import UserError

_KEY = "held_out"


class Nearest(NamedTuple):
    """What was kept of a training.

    Attributes:
        distances: as it began and after every epoch, the last of which may be a part of one.
        kept: which of them is that of the weights that were kept; 0: as it began.
    """

    distances: list[float]
    kept: int

    def told(self, epochs: float) -> str:
        """Which weights were kept and why, in a sentence.

        Args:
            epochs: of the training.
        """
        first, *after = (f"{distance:.4g}" for distance in self.distances)
        told = f"divergence from the teacher on held-out rows {first}, after training {', '.join(after)}"
        return f"kept {f'as after epoch {self.kept} of {epochs:g}' if self.kept else 'as it began'}: {told}"


class KeepNearest(TrainerCallback):
    """Keeps the student of the epoch's end, or of the beginning, that is nearest to its teacher.

    The distances are part of a checkpoint's state, so that a resumed run knows them. The kept weights are in
    a file of their own beside the checkpoints, which says what they are: those of an epoch that a stopped
    run came to and a resumed one comes to again are replaced by nearer ones alone.

    Args:
        student: that is trained.
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
        kept, _ = self._kept()
        distributed.barrier()  # the file may go now
        distances = {entry["step"]: entry[_KEY] for entry in state.log_history if _KEY in entry}
        return Nearest(list(distances.values()), list(distances).index(kept))

    def _look(self, state: TrainerState) -> None:
        distance = distributed.on_main(self._distance)
        if not math.isfinite(distance):
            raise UserError(
                f"distillation diverged: on held-out rows the student is {distance} from its teacher at step "
                f"{state.global_step} of {state.max_steps}; use a lower learning rate"
            )
        state.log_history.append({"step": state.global_step, _KEY: distance})
        distributed.on_main(lambda: self._keep(state.global_step, distance))

    def _keep(self, step: int, distance: float) -> None:
        if step and self._file.exists() and distance >= self._kept()[1]:
            return
        with replace_whole(self._file) as fresh:
            save_model(self._student, str(fresh), {"step": str(step), "distance": repr(distance)})

    def _kept(self) -> tuple[int, float]:
        with safe_open(self._file, "pt") as file:
            told = file.metadata()
        return int(told["step"]), float(told["distance"])
