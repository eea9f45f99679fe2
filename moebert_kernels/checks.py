"""Checks of what kind of thing an argument is, made where users call."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError that names the argument unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_described(value)}")


def check_mask(name: str, value: Any) -> None:
    """Check a mask, nonzero at real tokens.

    Raises:
        TypeError: it is not a tensor of bool or integers. Masks of floating point are mostly those that are
            added to attention scores: zero at real tokens.
    """
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} must be bool or integer, nonzero at real tokens, got {value.dtype}")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Check a whole number.

    Raises:
        TypeError: it is none; the message names the argument.
        ValueError: it is less than `least`.
    """
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {_described(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any) -> None:
    """Raise a TypeError that names the argument unless it is a number."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {_described(value)}")


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
