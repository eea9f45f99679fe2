"""Damage to files, drawn at random: bytes, json, and safetensors that are whole but say something else."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**31,
    2**63,
    10**9,
    -(10**9),
    10**12,
    10**40,
    0.5,
    -2.5,
    1e308,
    float("nan"),
)
_WORDS = (
    "",
    "x",
    "gpt2",
    "deberta-v2",
    "../../x",
    "/etc/passwd",
    "None",
    "float16",
    "gate-token",
    "é" * 9,
    "9" * 5000,
)
_LENGTHS = (0, 1, 7, 100, 10**6, 10**8, 10**9, 2**31, 2**63, 2**64 - 1)


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def other_value(rng: random.Random) -> Any:
    """A value of any json type, too large, too small or none at all."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(_NUMBERS)
    if kind < 5:
        return rng.choice(_WORDS)
    return rng.choice([None, True, False, [], {}, [1, 2], {"a": 1}, [None] * 50, {"": []}, nested(300)])


def mutate_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """Flip, cut, insert, repeat or blank; `within` the first so many bytes."""
    place = rng.randrange(max(1, min(len(data), within or len(data))))
    length = rng.choice([1, 2, 8, 60])
    kind = rng.randrange(7)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(length) + data[place:]
    if kind == 2:
        return data[:place] + data[place + length :]
    if kind == 3:
        return data[: place + length] + data[place:]
    if kind == 4:
        return data[:place] + bytes([rng.choice([0, 255])]) * length + data[place + length :]
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(max(1, min(len(data), within or len(data))))
        flipped[at] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a json value with every key or index of it."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def mutate_json(data: bytes, rng: random.Random, hostile: tuple[dict[str, Any], ...] = ()) -> bytes:
    """Change a value, its name or its place; or put in one of the `hostile` keys."""
    value = json.loads(data)
    places = _places(value)
    holder, key = rng.choice([p for p in places if p[0] is value] if rng.random() < 0.5 else places)
    kind = rng.randrange(8)
    if kind < 4:
        holder[key] = other_value(rng)
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[rng.choice([key.upper(), key + "s", ""])] = holder.pop(key)
    elif kind == 6 and isinstance(value, dict) and hostile:
        value |= rng.choice(hostile)
    elif kind == 7 and isinstance(value, dict):
        text = json.dumps(value)  # the same name twice
        return (text[:-1] + f", {json.dumps(str(key))}: {json.dumps(other_value(rng))}}}").encode()
    else:
        value = rng.choice([other_value(rng), [value], {"a": value}])
    return json.dumps(value).encode()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Another header, of the right length or not, before the same numbers."""
    size = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice([*_LENGTHS, size + 1, size - 1])) + header + numbers
    content = json.loads(header)
    tensors = [name for name in content if name != "__metadata__"]
    one, other = rng.choice(tensors), rng.choice(tensors)
    kind = rng.randrange(9)
    if kind == 0:
        content[one]["dtype"] = rng.choice(
            ["I32", "U32", "F64", "F16", "BF16", "F8_E4M3", "BOOL", "I4", "", 3, None]
        )
    elif kind == 1:
        content[one]["shape"] = content[one]["shape"][::-1]
    elif kind == 2:
        content[one]["shape"] = rng.choice(
            [[], [-1], [2**62, 4], [10**30], [0], nested(5), [10**9, 0], "x", [1.5]]
        )
    elif kind == 3:
        content[one], content[other] = content[other], content[one]
    elif kind == 4:
        content[one]["data_offsets"] = rng.choice(
            [content[other]["data_offsets"], [0, 10**15], [-4, 0], [8, 4], [0]]
        )
    elif kind == 5:
        content[other_word(rng)] = content.pop(one)
    elif kind == 6:
        content["__metadata__"] = rng.choice([{}, {"format": "tf"}, {"format": 3}, [], None, {"a": {"b": 1}}])
    else:
        return with_header(mutate_json(header, rng), numbers)
    return with_header(json.dumps(content).encode(), numbers)


def other_word(rng: random.Random) -> str:
    """A name that nothing has."""
    return rng.choice(_WORDS)


def with_header(header: bytes, numbers: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + numbers


def mutate_tensors(data: bytes, rng: random.Random, metadata: dict[str, str] | None = None) -> bytes:
    """A whole safetensors file of other tensors: fewer, more, turned, cut, of other types or values."""
    tensors = load(data)
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.T.contiguous(),
        lambda t: t[: len(t) // 2],
        lambda t: t[:0],
        lambda t: t.new_zeros(()),
        lambda t: t.unsqueeze(0),
        lambda t: t.flatten(),
        lambda t: t.to(rng.choice([torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool])),
        lambda t: t.to(rng.choice([torch.float8_e4m3fn, torch.complex64, torch.uint8])),
        lambda t: torch.full_like(t, float("nan") if t.is_floating_point() else 99),
        lambda t: torch.full_like(t, float("inf") if t.is_floating_point() else -1),
        lambda t: torch.full_like(t, 1e38 if t.is_floating_point() else 2**31 - 1),
        lambda t: torch.full_like(t, -1),
    ]
    kind = rng.randrange(len(changes) + 4)
    if kind < len(changes):
        if tensors[name].dim() or kind in (3, 4, 5):
            tensors[name] = changes[kind](tensors[name])
    elif kind == len(changes):
        del tensors[name]
    elif kind == len(changes) + 1:
        tensors["more"] = torch.zeros(3)
    elif kind == len(changes) + 2:
        tensors = {}
    else:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return save(tensors, metadata)
