"""How far a Trainer is, for whoever wants to hear it."""

from __future__ import annotations

from collections.abc import Callable

from transformers import TrainerCallback


class ReportSteps(TrainerCallback):
    """Tells how many steps a Trainer has done; a resumed one begins where it was, and says so.

    Args:
        progress: called with (steps done, steps in all), at the start and after each step.
        say: hears in a sentence that training goes on from a checkpoint.
    """

    def __init__(
        self,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self._progress = progress
        self._say = say

    def on_train_begin(self, args, state, control, **kwargs):
        """Tell where training begins."""
        self._tell(state)
        if self._say is not None and state.global_step:
            self._say(f"goes on from the checkpoint of step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args, state, control, **kwargs):
        """Tell that a step is done."""
        self._tell(state)

    def _tell(self, state):
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)
