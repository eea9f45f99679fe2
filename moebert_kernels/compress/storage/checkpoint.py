"""Saved models, read with suspicion: the files are compared with each other before a model is built.

A `config.json` is a few bytes that ask for any amount of memory or time, and transformers believes it. Here
its numbers are held against the shapes in the weights' headers first. Weights are read from safetensors
alone: a pickle (`.bin`, `.pt`) is a program.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from moebert_kernels.compress.data.files import describe_folder, read_json
from moebert_kernels.errors import UserError

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pt", "model.pt")
_MAX_JSON_BYTES = 64 << 20
# What the families' code reads of a configuration although its class does not declare it.
_UNDECLARED = {"attention_head_size", "conv_groups", "conv_kernel_size", "embedding_size", "num_labels"}
_UNDECLARED |= {"max_relative_positions", "position_buckets"}
_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers")

# What transformers raises, from deep inside, over values that it has not looked at.
TRANSFORMERS_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor.

    Attributes:
        shape: of it.
        dtype: as safetensors names it, "F32" for example.
        path: of the file.
    """

    shape: tuple[int, ...]
    dtype: str
    path: Path

    @property
    def is_floating_point(self) -> bool:
        """Whether its numbers are real ones."""
        return self.dtype.startswith(("F", "BF"))


def read_config(folder: Path, **changes: Any) -> PreTrainedConfig:
    """Read the configuration of a saved model, dense or MoE, after a look at its weights' headers.

    Args:
        folder: of the model.
        changes: values to put in the place of those in the file.

    Raises:
        UserError: the folder does not hold a model, one of its files is damaged, or the configuration cannot
            belong to the weights.
    """
    check_model_folder(folder)
    path = folder / _CONFIG
    _check_values(path, _read_object(path), _read_headers(folder))
    try:
        # Our callers name a model's outputs, and their rows are of any length, not multiples of a chunk's.
        plain = {"return_dict": True, "chunk_size_feed_forward": 0}
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **plain, **changes)
    except TRANSFORMERS_ERRORS as error:
        raise UserError(f"{path} is not the configuration of a model: {cause_of(error)}") from None


def load_weights(
    folder: Path, config: PreTrainedConfig, auto_model: Any, *, new_head: bool = False
) -> PreTrainedModel:
    """Build the model that a configuration describes and load a folder's weights into it, in float32.

    Args:
        folder: of the model.
        config: from `read_config`.
        auto_model: the transformers Auto class to load it with.
        new_head: whether the weights may be those of another head or of none.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        UserError: no such model can be built, or the weights are not its: too few, of other shapes or types,
            or not finite.
    """
    path = folder / _CONFIG
    headers = _read_headers(folder)
    try:
        with no_init_weights(), torch.device("meta"):
            skeleton = (AutoModel if new_head else auto_model).from_config(config, trust_remote_code=False)
    except TRANSFORMERS_ERRORS as error:
        raise UserError(f"{path} does not describe a model that can be built: {cause_of(error)}") from None
    _check_shapes(skeleton, headers, path)
    try:
        model, found = auto_model.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=new_head,
        )
    except TRANSFORMERS_ERRORS as error:
        raise UserError(f"cannot load the model in {folder}: {cause_of(error)}") from None
    lacking = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if new_head:
        base = f"{model.base_model_prefix}."
        lacking = {name for name in lacking if name.startswith(base) and ".pooler." not in name}
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"the weights in {folder} lack {min(lacking)}{more}, which {path} asks for")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"the weights in {folder} are damaged: {name} has numbers that are not finite")
    return model.eval()


def check_model_folder(folder: Path) -> None:
    """Raise a UserError unless `folder` is one that a transformers model was saved to."""
    if not os.path.exists(folder):  # of any name: Path.exists raises for one that is too long
        raise UserError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder of a saved transformers model")
    if not (folder / _CONFIG).is_file():
        student = folder / "student"
        there = (student / _CONFIG).is_file()
        meant = f"{student}, for instance" if there else "the folder of a saved transformers model"
        raise UserError(f"{folder} holds no {_CONFIG}: give {meant}")


def cause_of(error: BaseException) -> str:
    """An exception in a line: libraries' messages are paragraphs, and some are nothing but a key."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _read_object(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise UserError(f"{path} has {size} bytes, expected a small file of json")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a json object, found a {type(content).__name__}")
    return content


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """What is stored under which name, in one file or several."""
    if (folder / _WEIGHTS).is_file():
        return _read_header(folder / _WEIGHTS)
    if not (folder / _INDEX).is_file():
        for name in _PICKLES:
            if (folder / name).is_file():
                problem = f"{folder / name} is a pickle, which can run any code when it is read"
                raise UserError(f"{problem}. {_remedy(folder, name)}")
        raise UserError(f"there are no weights {folder / _WEIGHTS}: {describe_folder(folder)}")
    index = _read_object(folder / _INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{folder / _INDEX} must have a weight_map of tensors to the files that hold them")
    headers: dict[str, StoredTensor] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / _INDEX} names the file {name!r}, which is not in {folder}")
        headers |= _read_header(folder / name)
    for tensor, name in index.items():
        if tensor not in headers or headers[tensor].path.name != name:
            raise UserError(f"{folder / _INDEX} says that {tensor} is in {name}, and it is not")
    return headers


def _remedy(folder: Path, pickle: str) -> str:
    """How to have safetensors of a pickle: transformers reads its own without running what they hold."""
    if not pickle.startswith("pytorch_model.bin"):
        return "Save the model again by its save_pretrained, which writes model.safetensors"
    names, path = _read_object(folder / _CONFIG).get("architectures"), str(folder)
    name = names[0] if isinstance(names, list) and names and str(names[0]).isidentifier() else "AutoModel"
    script = f"from transformers import {name} as M; M.from_pretrained({path!r}).save_pretrained({path!r})"
    return (
        "This puts model.safetensors beside it, by way of torch's unpickler for weights alone, which runs "
        f"nothing: python -c {shlex.quote(script)}"
    )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {
                name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), path)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {cause_of(error)}") from None
    if not headers:
        raise UserError(f"{path} holds no tensors")
    return headers


def _check_values(path: Path, content: dict[str, Any], headers: dict[str, StoredTensor]) -> None:
    """Refuse numbers that the weights have no room for, and what would load more than a model."""
    if not isinstance(content.get("model_type"), str):
        raise UserError(f"{path} must say its model_type, found {content.get('model_type')!r}")
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: architectures must be a list of class names, found {_short(names)}")
    for key in ("quantization_config", "transformers_weights"):
        if content.get(key) is not None:
            raise UserError(f"{path} has {key}, found {_short(content[key])}: plain weights are expected")
    for key, value in content.items():
        if key.endswith("_implementation") and "/" in str(value):
            raise UserError(f"{path}: {key} {_short(value)} is code to be fetched, and is refused")
    most = sum(prod(tensor.shape) for tensor in headers.values())
    widest = max((max(tensor.shape, default=0) for tensor in headers.values()), default=0)
    limits = dict.fromkeys(_LAYER_COUNTS, len(headers)) | {"num_labels": widest}
    known = _known_keys(content["model_type"])
    read = {key: value for key, value in content.items() if known is None or key in known}
    for key, number in _numbers(read):
        limit = limits.get(key, most)
        if not number <= limit and not key.endswith(("seed", "_token_id")):  # NaN is not
            raise UserError(
                f"{path}: {key} is {_short(number)}, expected no more than {limit}, as its weights "
                "have room for"
            )


def _known_keys(model_type: str) -> set[str] | None:
    """What transformers reads of such a configuration; all else are notes. None if the type is unknown."""
    try:
        default = AutoConfig.for_model(model_type)
    except TRANSFORMERS_ERRORS:
        return None
    return {*vars(default), *default.attribute_map, *_UNDECLARED}


def _numbers(content: Any) -> Iterator[tuple[str, float]]:
    """Every number in a json value with the key it is under."""
    waiting = [("", content)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, one) for one in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value


def _check_shapes(model: PreTrainedModel, headers: dict[str, StoredTensor], path: Path) -> None:
    """Refuse weights that are not those of `model`, which is on the meta device."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        stored = headers.get(name)
        if stored is None:
            continue  # perhaps an older name, which transformers knows
        if stored.shape != tuple(tensor.shape):
            raise UserError(
                f"{stored.path}: {name} is {list(stored.shape)}, but {path} asks for {list(tensor.shape)}"
            )
        if stored.is_floating_point != tensor.is_floating_point():
            kind = "floating-point" if tensor.is_floating_point() else "whole"
            raise UserError(f"{stored.path}: {name} is of type {stored.dtype}, expected {kind} numbers")
    needed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(prod(tensor.shape) for tensor in headers.values())
    if needed > 2 * held:
        raise UserError(
            f"{path} asks for a model of {needed} numbers, but the weights beside it are {held}: they do not "
            "belong together"
        )


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"about {'-' if value < 0 else ''}2^{value.bit_length()}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
