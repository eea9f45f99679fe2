"""Sentence-embedding models, read and saved as sentence_transformers saves them.

Such a model is a folder with a `modules.json`: a transformers encoder, a pooling of its last hidden states
and perhaps a normalisation to length 1. The folder is read here, so that sentence_transformers itself is only
needed by those who load the result with it. As with any model of this package, `import moebert_kernels` makes
the architecture known first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.data.batching import padded_batches
from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.storage.artifacts import replace_whole
from moebert_kernels.compress.storage.checkpoint import load_weights, read_config
from moebert_kernels.compress.storage.loading import load_tokenizer
from moebert_kernels.errors import UserError
from moebert_kernels.models import max_tokens

POOLINGS = ("mean", "cls")
_OLD_POOLING_KEYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """A sentence-embedding model.

    Attributes:
        model: the encoder, without a head.
        tokenizer: its.
        pooling: "mean" over real tokens or "cls", the first token.
        normalize: whether embeddings are scaled to length 1.
        max_length: tokens of a sentence, special ones included; what is more is cut off.
        lower_case: whether texts are put into lower case first.
        folder: where all this was read.
        model_folder: where in it the encoder is; "" if at the top.
        prompt: put before every text, as sentence_transformers puts it where it is given no other.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: str
    normalize: bool
    max_length: int
    lower_case: bool
    folder: Path
    model_folder: str
    prompt: str = ""

    def pool(self, states_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Return embeddings [B, D], float32 or wider, of last hidden states.

        Args:
            states_BSD: of the model.
            mask_BS: nonzero at real tokens; None if all are.
        """
        states_BSD = states_BSD.to(torch.promote_types(states_BSD.dtype, torch.float32))
        if self.pooling == "cls":
            embedding_BD = states_BSD[:, 0]
        elif mask_BS is None:
            embedding_BD = states_BSD.mean(1)
        else:
            real_BS1 = (mask_BS != 0).unsqueeze(-1)
            embedding_BD = torch.where(real_BS1, states_BSD, 0).sum(1) / real_BS1.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(embedding_BD, dim=-1) if self.normalize else embedding_BD

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Return embeddings [N, D] of texts, in their order, on the CPU; the model is put into eval mode."""
        self.model.eval()
        rows = tokenize_texts(texts, self)
        rows = rows.add_column("labels", range(len(rows)))
        embedding_ND = torch.empty(len(rows), self.model.config.hidden_size)
        for batch in padded_batches(rows, self.tokenizer, batch_size):
            order_B = batch.pop("labels")
            batch = {name: value.to(self.model.device) for name, value in batch.items()}
            states_BSD = self.model(**batch).last_hidden_state
            embedding_ND[order_B] = self.pool(states_BSD, batch.get("attention_mask")).float().cpu()
        return embedding_ND


def is_sentence_encoder(folder: str | Path) -> bool:
    """Whether a folder holds such a model, by its list of modules."""
    return (Path(folder) / "modules.json").is_file()


def load_sentence_encoder(folder: str | Path) -> SentenceEncoder:
    """Read a folder that sentence_transformers or `save_sentence_encoder` wrote, onto the CPU in float32.

    Raises:
        UserError: it is no such folder, or has modules or a pooling that are not known here.
    """
    folder = Path(folder)
    modules = _read_modules(folder)
    kinds = [module.get("type", "").rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder / 'modules.json'} must list Transformer, Pooling and perhaps Normalize, in this order, "
            f"found {', '.join(kinds) or 'nothing'}"
        )
    model_folder, pooling_folder = (module.get("path", "") for module in modules[:2])
    pooling_file = folder / pooling_folder / "config.json"
    pooling = _read_json(pooling_file, dict)
    mode = pooling.get("pooling_mode")
    if mode is None:  # as it was written before sentence_transformers 5
        modes = [name for name in pooling if name.startswith("pooling_mode_") and pooling[name]]
        mode = _OLD_POOLING_KEYS.get(modes[0], modes[0]) if len(modes) == 1 else modes
    if mode not in POOLINGS:
        raise UserError(f"{pooling_file} pools by {mode}, expected one of {', '.join(POOLINGS)}")
    prompt = _default_prompt(folder)
    if prompt and not pooling.get("include_prompt", True):
        raise UserError(
            f"{pooling_file} leaves the prompt out of pooling (include_prompt), which is not known here"
        )
    options_file = folder / model_folder / "sentence_bert_config.json"
    options = _read_json(options_file, dict) if options_file.is_file() else {}
    asked = options.get("max_seq_length")
    if asked is not None and (type(asked) is not int or asked < 3):
        raise UserError(
            f"{options_file} has max_seq_length {asked!r}, expected a number of tokens, at least 3"
        )
    model = load_weights(folder / model_folder, read_config(folder / model_folder), AutoModel)
    tokenizer = load_tokenizer(folder / model_folder, model.config)
    lengths = [asked, tokenizer.model_max_length, max_tokens(model.config)]
    return SentenceEncoder(
        model,
        tokenizer,
        mode,
        kinds[-1] == "Normalize",
        min(int(length) for length in lengths if length is not None),
        bool(options.get("do_lower_case", False)),
        folder,
        model_folder,
        prompt,
    )


def _default_prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    options = _read_json(path, dict) if path.is_file() else {}
    name = options.get("default_prompt_name")
    if name is None:
        return ""
    prompts = options.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise UserError(f"{path} has default_prompt_name {name!r}, and no such text among its prompts")
    return prompt


def tokenize_texts(texts: Sequence[str], encoder: SentenceEncoder) -> Dataset:
    """Return rows of token ids, in the order of `texts`, after the prompt; padding is left to a collator.

    Raises:
        UserError: there are no texts.
    """
    if not texts:
        raise UserError("there are no texts to tokenize")

    tokenizer, max_length = encoder.tokenizer, encoder.max_length  # datasets hashes what `encode` refers to

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=max_length))

    texts = [encoder.prompt + text for text in texts]
    rows = Dataset.from_dict({"text": [text.lower() for text in texts] if encoder.lower_case else texts})
    return rows.map(
        encode, batched=True, remove_columns=["text"], load_from_cache_file=False, desc="Tokenizing texts"
    )


def save_sentence_encoder(encoder: SentenceEncoder, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a folder that sentence_transformers loads: `encoder.folder` with this model in place of the old.

    The folder is written whole or not at all.

    Args:
        encoder: with the new model.
        folder: made if need be.
        overwrite: replace what the folder holds.

    Raises:
        UserError: `folder` holds something that is not to be overwritten, or `encoder.folder` is gone.
    """
    folder = Path(folder)
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; give another output folder")
    with replace_whole(folder) as fresh:
        target = fresh / encoder.model_folder
        encoder.model.save_pretrained(target)
        encoder.tokenizer.save_pretrained(target)
        copy_modules(encoder, fresh, encoder.model_folder)


def copy_modules(encoder: SentenceEncoder, folder: Path, model_folder: str = "") -> None:
    """Copy what `encoder.folder` has beside the encoder: the list of modules, their settings, the prompt.

    Args:
        encoder: read from its `folder`.
        folder: to copy to.
        model_folder: where in it the encoder is to be; "" for the top.

    Raises:
        UserError: `encoder.folder` is gone or no longer such a folder.
    """
    modules = _read_modules(encoder.folder)
    modules[0]["path"] = model_folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    options = encoder.folder / encoder.model_folder / "sentence_bert_config.json"
    general = encoder.folder / "config_sentence_transformers.json"
    for path, target in ((options, folder / model_folder), (general, folder)):
        if path.is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.name)
    for module in modules[1:]:
        if (encoder.folder / module["path"]).is_dir():  # Normalize may have no folder
            shutil.copytree(encoder.folder / module["path"], folder / module["path"])


def _read_modules(folder: Path) -> list[dict[str, Any]]:
    """What modules.json lists, each with its folder, if it has one, inside `folder`."""
    path = folder / "modules.json"
    modules = _read_json(path, list)
    for module in modules:
        if not isinstance(module, dict) or not all(
            isinstance(module.get(key, ""), str) for key in ("type", "path")
        ):
            raise UserError(f"{path} must list modules, each an object with a type and a path")
        place = Path(os.path.realpath(folder / module.get("path", "")))
        if not place.is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{path} names a module at {module['path']!r}, which is outside of {folder}")
    return modules


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        raise UserError(f"there is no {path}: give the folder of a sentence_transformers model")
    content = read_json(path)
    if not isinstance(content, kind):
        raise UserError(f"{path} must hold a JSON {'list' if kind is list else 'object'}")
    return content
