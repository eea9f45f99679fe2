"""Errors relative to the reference's own size, per output and per expert, and how large they may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .registry import DidNotRun

# Of rms(delta) / rms(reference) and of max|delta| / rms(reference). float32 leaves no room for TF32 nor for
# the tanh form of GELU; the 16-bit types leave room for rounding between the two GEMMs, and none for a row
# that went to another expert. Parameters' gradients may be ten times as far off, since some peers sum them in
# 16 bits: that is imprecise, and reported with the figure, but not another function.
LIMITS = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-3, 3e-2),
    torch.bfloat16: (1.5e-2, 2e-1),
}
_SLACK_OF_SUMS = 10

Parts = Callable[[str, Tensor], list[Tensor]]


def relative_errors(output: Tensor, reference: Tensor) -> tuple[float, float]:
    """rms and maximum of the difference over the reference's rms; infinite where they cannot be compared."""
    if reference.numel() == 0:
        return 0.0, 0.0
    delta = output.to(reference.dtype) - reference
    if not bool(delta.isfinite().all()):
        return float("inf"), float("inf")
    scale = float(reference.square().mean().sqrt())
    rms, largest = float(delta.square().mean().sqrt()), float(delta.abs().max())
    if scale == 0:
        return (0.0, 0.0) if largest == 0 else (float("inf"), float("inf"))
    return rms / scale, largest / scale


def check_close(
    outputs: dict[str, Tensor],
    reference: dict[str, Tensor],
    dtype: torch.dtype,
    parts: Parts = lambda name, tensor: [tensor],
    sums: tuple[str, ...] = (),
    slack: float = 1.0,
) -> dict[str, float]:
    """Compare every output with its reference, part by part.

    Args:
        outputs: of the entry.
        reference: float64, with at least the same names.
        dtype: the entry's, which decides the limits.
        parts: splits an output by expert: an expert with few tokens must not hide behind the others.
        sums: outputs that add up over the tokens, which may be further off.
        slack: factor on the limits, where errors of many layers add up.

    Returns:
        The largest rms error among the parts of each output.

    Raises:
        DidNotRun: an output is missing, has another shape, or is wrong.
    """
    errors = {}
    for name, expected in reference.items():
        factor = slack * (_SLACK_OF_SUMS if name in sums else 1)
        rms_limit, max_limit = (limit * factor for limit in LIMITS[dtype])
        if name not in outputs:
            raise DidNotRun(f"gives no {name}")
        output = outputs[name]
        if output.shape != expected.shape:
            raise DidNotRun(f"{name} has shape {tuple(output.shape)}, expected {tuple(expected.shape)}")
        found = [
            relative_errors(part, expected_part)
            for part, expected_part in zip(parts(name, output), parts(name, expected), strict=True)
        ]
        rms, largest = (max(column, default=0.0) for column in zip(*found, strict=True))
        if rms > rms_limit or largest > max_limit:
            raise DidNotRun(
                f"wrong: {name} is off by {rms:.1e} rms and {largest:.1e} at most, relative to the reference "
                f"(limits {rms_limit:.0e} and {max_limit:.0e})"
            )
        errors[name] = rms
    return errors
