"""Which shapes each benchmark can be asked for; imports nothing, so that help is there at once."""

from __future__ import annotations

# Fields of a `Request` that a benchmark's cases depend on.
TAKES = {
    "ffn": ("T", "D", "F", "E", "K", "dtypes", "routings", "shapes", "norm"),
    "dispatch": ("T", "E", "L", "V"),
    "model": ("T", "D", "F", "E", "L", "V", "sequence", "dtypes", "shapes", "text"),
    "importance": ("T", "D", "F", "E", "L", "V", "sequence", "dtypes", "shapes"),
}

# The parameter of the command line that gives a field, and its option; V has none.
PARAMETERS = {
    "T": "tokens",
    "D": "hidden",
    "F": "expert_size",
    "E": "experts",
    "K": "top_k",
    "L": "layers",
    "sequence": "sequence",
    "dtypes": "dtype",
    "routings": "skew",
    "shapes": "shape",
    "norm": "norm",
    "text": "text",
}


def flag(field: str) -> str:
    """The option of a field."""
    return "--" + PARAMETERS[field].replace("_", "-")
