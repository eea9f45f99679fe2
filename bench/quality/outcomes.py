"""Outcomes: what a model says of every validation row, and how far it is from its teacher there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moebert_kernels.compress.data.tasks.task import Outputs
from moebert_kernels.compress.scoring.losses import prediction_loss

Outcomes = dict[str, list[Any]]


def outcomes(kind: str, ours: Outputs, theirs: Outputs) -> Outcomes:
    """What is kept of a model's outputs.

    Args:
        kind: "classification" or "regression".
        ours: row by row, as `predict` returns them.
        theirs: the teacher's on the same rows.

    Returns:
        "predictions", of every row the class, or the number to three places; and "divergence", by
        `losses.prediction_loss` of the row alone, to three digits.
    """
    losses = [
        prediction_loss(kind, torch.from_numpy(a)[None], torch.from_numpy(b)[None])
        for a, b in zip(ours, theirs, strict=True)
    ]
    return {
        "predictions": predictions(kind, ours),
        "divergence": [float(f"{float(loss):.3g}") for loss in losses],
    }


def predictions(kind: str, outputs: Outputs) -> list[Any]:
    """The class of every row, or the number to three places."""
    values = np.stack(list(outputs))
    if kind == "regression":
        return [round(float(number), 3) for number in values.ravel()]
    return values.argmax(1).tolist()
