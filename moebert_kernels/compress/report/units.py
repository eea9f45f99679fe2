"""Counts as people read them."""

from __future__ import annotations


def short_count(count: float) -> str:
    """Three digits of a count and its unit, none, K, M or G: "512", "3.54 M", "110 M"."""
    if count < 999.5:
        return f"{count:.0f}"
    thousands = 1 if count < 999.5e3 else 2 if count < 999.5e6 else 3
    value = count / 1000**thousands
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {' KMG'[thousands]}"
