"""Saved encoders: loaded with their tokenizer, or refused with a sentence that says what is wrong."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.files import describe_folder
from moebert_kernels.compress.data.tasks import TaskData, auto_model_of
from moebert_kernels.compress.storage.artifacts import replace_whole, rows_fingerprint
from moebert_kernels.compress.storage.checkpoint import cause_of, load_weights, read_config
from moebert_kernels.errors import ArgumentError, UserError
from moebert_kernels.models import find_ffns, is_moe, max_tokens

_NOTES = "moebert_training.json"


def default_device() -> torch.device:
    """The first CUDA device if there is one, otherwise the CPU; of several processes, each takes its own."""
    return (
        torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    )


def place(model: torch.nn.Module) -> None:
    """Put a model onto `default_device`."""
    model.to(default_device())


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a saved model with the head of a task, dense or MoE, in eval mode and float32, and its tokenizer.

    Raises:
        UserError: the folder does not hold one.
    """
    config = read_config(folder)
    architectures = config.architectures or []
    auto_model = auto_model_of(architectures)
    if auto_model is None:
        raise UserError(
            f"{folder} holds a {' or '.join(architectures) or 'model of unknown class'}, not a model for "
            "classification, regression or question answering: fine-tune it first (`moebert finetune`)"
        )
    model = load_weights(folder, config, auto_model)
    return model, load_tokenizer(folder, model.config)


def load_teacher(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fine-tuned model whose feed-forward networks can become experts; see `load_model`.

    Raises:
        UserError: the folder does not hold one.
    """
    model, tokenizer = load_model(folder)
    check_can_be_cut(model, folder)
    return model, tokenizer


def check_can_be_cut(model: PreTrainedModel, folder: Path) -> None:
    """Raise a UserError unless the feed-forward networks of the model in `folder` can become experts."""
    if is_moe(model.config):
        raise UserError(f"the model in {folder} is a MoE already: give the dense model that it was made of")
    try:
        find_ffns(model)
    except ValueError as error:
        raise UserError(f"the model in {folder} cannot become a MoE: {error}") from None


def load_tokenizer(source: str | Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: the model's folder, or its name on the hub.
        config: the model's.

    Raises:
        UserError: there is none, or one of another vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        trial = tokenizer(["a", "a b"], padding=True)["input_ids"]
        ids = [*tokenizer.get_vocab().values(), *(token for row in trial for token in row)]
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"cannot load the tokenizer of {source}: {cause_of(error)}") from None
    files = sorted(set(tokenizer.vocab_files_names.values()))
    # transformers makes up an empty vocabulary where a folder has none.
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in files):
        raise UserError(
            f"{source} holds no tokenizer ({' or '.join(files)}): save the one the model was trained with "
            "beside it, by its save_pretrained"
        )
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has token ids from {min(ids)} to {max(ids)}, but its model's "
            f"vocabulary has {config.vocab_size}: they do not belong together"
        )
    most = tokenizer.model_max_length
    if not isinstance(most, (int, float)) or not most >= 1:
        raise UserError(
            f"the tokenizer of {source} has model_max_length {most!r}, expected a number of tokens"
        )
    return tokenizer


def row_length(
    asked: int | None,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    argument: str,
    *,
    default: int = 128,
) -> int:
    """Settle to how many tokens rows are cut.

    Args:
        asked: by the user; None for `default`, or as many as the model takes if those are fewer.
        config: of the model.
        tokenizer: the model's.
        argument: what the user knows this as, for the message.
        default: of the kind of task.

    Raises:
        ArgumentError: the model takes no rows that long, or rows that short hold no text.
    """
    most = min(max_tokens(config), tokenizer.model_max_length)
    if asked is None:
        return min(default, most)
    if asked > most:
        raise ArgumentError(argument, f"is {asked}, but the model takes at most {most} tokens")
    if asked < 3:
        raise ArgumentError(argument, f"is {asked}, expected at least 3: two tokens mark begin and end")
    return asked


def save_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    trained_on: TaskData | None = None,
) -> None:
    """Save a model and its tokenizer, whole or not at all; what was at `folder` is replaced.

    Args:
        model: goes there as transformers saves it.
        tokenizer: too.
        folder: made if need be.
        trained_on: raw rows; noted beside the model for `compared_with_training`.
    """
    with replace_whole(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if trained_on is not None:
            (fresh / _NOTES).write_text(json.dumps({"train_rows": rows_fingerprint(trained_on.train)}))


def compared_with_training(teacher_dir: Path, data: TaskData) -> TaskData:
    """Warn if a model that `save_encoder` made notes of was trained on other rows than those of `data`.

    Returns:
        `data`; with the oddity that was warned of, if it was.

    Rows held out by another draw are in part those that the teacher has learned by heart: its own score and
    its student's would be too good. Of rows without labels nothing is said: none are scored by.
    """
    if not data.has_labels:
        return data
    try:
        noted = json.loads((teacher_dir / _NOTES).read_text())["train_rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return data
    if noted == rows_fingerprint(data.train):
        return data
    oddity = (
        f"The training rows are not those {teacher_dir} was fine-tuned on. Unless that is meant, give "
        "the same data, --split-seed and --validation-fraction: otherwise rows that the teacher was "
        "trained on are among those held out, and scores are too good."
    )
    warnings.warn(oddity, stacklevel=2)
    return replace(data, oddities=(*data.oddities, oddity))


def check_no_model(folder: Path) -> None:
    """Raise a UserError if `folder` cannot take a new model: it is a file, or holds a model already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    if (folder / "config.json").exists() or (folder / "model.safetensors").exists():
        raise UserError(f"{folder} already holds a model; give another output folder")


def check_new_folder(folder: Path) -> None:
    """Raise a UserError unless `folder` is absent or empty: saving a model to it replaces all it holds."""
    check_no_model(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{describe_folder(folder)}: give a new or an empty output folder")
