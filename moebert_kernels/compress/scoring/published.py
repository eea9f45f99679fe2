"""Reading the importance files that the authors of MoEBERT published with their code."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.errors import UserError

# What pickle.dump writes for dicts, lists, strings, ints and floats. None of these call or import anything,
# and none reserve memory that the file does not fill (LONG_BINPUT does, by the number it is given).
_DATA_ONLY = {"PROTO", "FRAME", "STOP", "MARK", "BINPUT", "BINGET", "MEMOIZE"}
_DATA_ONLY |= {"EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"}
_DATA_ONLY |= {"BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT", "BININT", "BININT1", "BININT2"}
_FIRST_BYTE = b"\x80"  # of a pickle since protocol 2
_MAX_BYTES = 16 * 2**20  # the published files have 0.4 MB


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def convert_published(path: str | Path) -> Importance:
    """Read a pickle of {"importance": [L][F] falling scores, "idx": [L][F] their neurons}.

    The scores are put back in the order of the neurons. Where two are equal and the file has the higher
    index first, the first is raised by the least amount float32 has, so that sorting gives the file's order
    and `split_neurons` what the authors' code makes of the file.

    Nothing in the file is run: only plain lists, strings and numbers are read, anything else is refused.

    Returns:
        The scores; the task is taken from a name like importance_sst2.pkl, the model and the number of
        samples are not in the file (0).

    Raises:
        UserError: the file is missing, damaged, holds more than data, or something else.
    """
    path = Path(path)
    content = _read(path)
    layers, neurons = content["importance"], content["idx"]
    num_layers = len(layers) if type(layers) is list else 0
    width = len(layers[0]) if num_layers and type(layers[0]) is list else 0
    tables = _is_table(layers, num_layers, width, float) and _is_table(neurons, num_layers, width, int)
    if not width or not tables:
        raise UserError(f"{path}: importance and idx are not two lists of layers with as many numbers each")
    scores_LF = torch.zeros(num_layers, width)
    for layer, (scores, order) in enumerate(zip(layers, neurons, strict=True)):
        if sorted(order) != list(range(width)):
            raise UserError(f"{path}: idx of layer {layer} does not name each of {width} neurons once")
        falling = all(a >= b for a, b in pairwise(scores))
        if not falling or not math.isfinite(scores[0]) or not scores[-1] >= 0:
            raise UserError(f"{path}: the scores of layer {layer} are not finite, falling and >= 0")
        scores_LF[layer, order] = _separate_ties(scores, order)
    return Importance(scores_LF, f"published ({path.name})", path.stem.removeprefix("importance_"), 0)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{path} has more than {_MAX_BYTES} bytes: not a published importance file")
    data = path.read_bytes()
    if not data.startswith(_FIRST_BYTE):
        raise UserError(f"{path} is not one of the published importance files: it is no pickle of their kind")
    try:
        for opcode, _, _ in pickletools.genops(data):
            if opcode.name not in _DATA_ONLY:
                raise UserError(
                    f"{path} is refused: its pickle has {opcode.name}, which lists of numbers never need"
                )
        content = _DataUnpickler(io.BytesIO(data)).load()
    except UserError:
        raise
    except Exception as error:  # unpickling bad bytes raises nearly any exception
        raise UserError(f"{path} is damaged or not a pickle ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict) or set(content) != {"importance", "idx"}:
        raise UserError(f'{path} is a pickle, but not of {{"importance": ..., "idx": ...}}')
    return content


def _is_table(rows: Any, num_rows: int, width: int, kind: type) -> bool:
    if type(rows) is not list or len(rows) != num_rows or len({id(row) for row in rows}) != num_rows:
        return False  # the same row many times over would be a small file of endless work
    return all(type(row) is list and len(row) == width and all(type(x) is kind for x in row) for row in rows)


def _separate_ties(scores: list[float], order: list[int]) -> torch.Tensor:
    """Round to float32 and raise scores where a stable sort by falling score would not keep `order`."""
    scores_F = torch.tensor(scores).numpy()
    infinity = scores_F.dtype.type(math.inf)
    for i in reversed(range(len(order) - 1)):
        needed = scores_F[i + 1]
        if order[i] > order[i + 1]:
            needed = np.nextafter(needed, infinity)
        scores_F[i] = max(scores_F[i], needed)
    return torch.from_numpy(scores_F)
