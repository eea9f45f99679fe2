"""Paired bootstrap: how far a difference between models may come from the rows and seeds that were drawn."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000

_LEVEL = 0.95


class Interval(NamedTuple):
    """What was found, and where 95 % of the resamples lie."""

    found: float
    low: float
    high: float

    @classmethod
    def of(cls, values_R: np.ndarray) -> Interval:
        """Of values whose first is what was found and whose others are the resamples'."""
        low, high = np.quantile(values_R[1:], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        return cls(float(values_R[0]), float(low), float(high))


class Resampled:
    """One task's rows and seeds as they were drawn and, `RESAMPLES` times, drawn again with repetitions.

    All models are scored on the same resamples, so that differences between them are paired: by row, and by
    seed too.

    Args:
        task: its name, the seed of the draws.
        labels: of every row.
        teacher: what the teacher predicts.
        num_seeds: of each model.
    """

    def __init__(self, task: str, labels: np.ndarray, teacher: np.ndarray, num_seeds: int):
        self._labels_N, self._teacher_N = labels.astype(np.float64), teacher.astype(np.float64)
        self._random = np.random.default_rng(zlib.crc32(task.encode()))
        self._share_RS = self._shares(num_seeds)

    @cached_property
    def _share_RN(self) -> np.ndarray:
        return self._shares(len(self._labels_N))

    def _shares(self, count: int) -> np.ndarray:
        """How much each of `count` things weighs in each resample; in row 0 all alike."""
        drawn_Rn = self._random.integers(count, size=(RESAMPLES, count))
        share_Rn = np.full((1 + RESAMPLES, count), 1 / count)
        for resample, chosen_n in enumerate(drawn_Rn, start=1):
            share_Rn[resample] = np.bincount(chosen_n, minlength=count) / count
        return share_Rn

    def metric(self, name: str, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """A model's metric in every resample [1 + RESAMPLES].

        Args:
            name: "accuracy", "f1", "matthews" or "pearson".
            predictions: [N], seed by seed; of a model that no seed changes, one.
        """
        return self._over_seeds(_metric(name, np.stack(predictions), self._labels_N, self._share_RN))

    def agreement(self, name: str, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """The share of rows of which a model says what the teacher says; of numbers their correlation."""
        name = "pearson" if name == "pearson" else "accuracy"
        return self._over_seeds(_metric(name, np.stack(predictions), self._teacher_N, self._share_RN))

    def mean(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The mean of what was found row by row, seed by seed."""
        return self._over_seeds(self._share_RN @ np.stack(values).astype(np.float64).T)

    def _over_seeds(self, value_RS: np.ndarray) -> np.ndarray:
        if value_RS.shape[1] == 1:
            return value_RS[:, 0]
        return (value_RS * self._share_RS).sum(1)


def _metric(name: str, said_SN: np.ndarray, true_N: np.ndarray, share_RN: np.ndarray) -> np.ndarray:
    """A metric [R, S] of the weighted rows, from sums over them."""
    said_SN = said_SN.astype(np.float64)
    if name == "accuracy":
        return share_RN @ (said_SN == true_N).T
    said_RS, true_R1 = share_RN @ said_SN.T, (share_RN @ true_N)[:, None]
    both_RS = share_RN @ (said_SN * true_N).T
    if name == "f1":
        return 2 * both_RS / np.maximum(said_RS + true_R1, 1e-300)
    if name not in ("pearson", "matthews"):  # of two classes Matthews' is the correlation
        raise ValueError(f"there is no bootstrap of {name}")
    said_variance_RS = share_RN @ np.square(said_SN).T - np.square(said_RS)
    true_variance_R1 = (share_RN @ np.square(true_N))[:, None] - np.square(true_R1)
    scale_RS = np.sqrt(np.maximum(said_variance_RS * true_variance_R1, 0))
    return np.where(scale_RS > 1e-12, (both_RS - said_RS * true_R1) / np.maximum(scale_RS, 1e-12), 0.0)
