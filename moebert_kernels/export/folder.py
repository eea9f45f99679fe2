"""The folder that an exported model becomes: what serving tools look for beside the graph.

`onnx/model.onnx` and `onnx/model_quantized.onnx`, the tokenizer, the modules of a sentence encoder, and a
`config.json` of the dense family: tools know what to do by its `model_type` and `architectures`, and none of
them knows ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moebert_kernels.compress.data.tasks import auto_model_of
from moebert_kernels.compress.storage.checkpoint import load_weights, read_config
from moebert_kernels.compress.storage.loading import load_tokenizer
from moebert_kernels.compress.storage.sentence_encoder import (
    SentenceEncoder,
    copy_modules,
    load_sentence_encoder,
)
from moebert_kernels.errors import ArgumentError, UserError, naming
from moebert_kernels.export.encoder import base_of
from moebert_kernels.export.heads import SEQUENCE, TOKENS, head_of
from moebert_kernels.models import is_moe
from moebert_kernels.models.config import MoEConfig

GRAPH, QUANTIZED = Path("onnx") / "model.onnx", Path("onnx") / "model_quantized.onnx"


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported.

    Attributes:
        model: with its head, or a base model.
        tokenizer: the model's; None if there is none to write.
        sentences: how a base model embeds sentences; None if it does not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    sentences: SentenceEncoder | None = None

    @property
    def takes_token_types(self) -> bool:
        """Whether its tokenizer tells the texts of a pair apart, and the model looks at it."""
        config: Any = base_of(self.model)[0].config
        names = ["token_type_ids"] if self.tokenizer is None else self.tokenizer.model_input_names
        return getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in names


def open_source(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Source:
    """Take a model, or read it from a folder that transformers or sentence_transformers saved.

    Raises:
        UserError: the folder holds no such model.
    """
    if isinstance(model, SentenceEncoder):
        return Source(model.model, tokenizer or model.tokenizer, model)
    if isinstance(model, PreTrainedModel):
        return Source(model, tokenizer)
    if not isinstance(model, str | Path):
        raise ArgumentError(
            "model",
            f"must be a model, a SentenceEncoder or a folder, got {type(model).__name__} {model!r:.60}",
        )
    folder = Path(model)
    with naming("model"):
        if (folder / "modules.json").is_file():
            encoder = load_sentence_encoder(folder)
            return Source(encoder.model, tokenizer or encoder.tokenizer, encoder)
        config = read_config(folder)
        loaded = load_weights(folder, config, _auto_model(folder, config))
        return Source(loaded, tokenizer or load_tokenizer(folder, loaded.config))


def _auto_model(folder: Path, config: PreTrainedConfig) -> Any:
    names = config.architectures or []
    auto_model = auto_model_of(names)
    if auto_model is not None:
        return auto_model
    if any(name.endswith("ForMaskedLM") for name in names):
        return AutoModelForMaskedLM
    if not names or any(name.endswith("Model") for name in names):
        return AutoModel
    raise UserError(
        f"{folder} holds a {' or '.join(names)}, not a base model or one for classification, question "
        "answering or masked language modelling"
    )


def dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration by which tools that do not know our models take this one for its dense family's."""
    _, family = base_of(model)
    content = model.config.to_dict()
    if is_moe(model.config):
        for name in (*(field.name for field in fields(MoEConfig)), "model_type"):
            content.pop(name, None)
    config = family.config(**content)
    config.architectures = [family.name + (head_of(model) or "Model")]
    return config


def write_beside(source: Source, folder: Path) -> None:
    """Write everything but the graphs."""
    config = dense_config(source.model)
    config.save_pretrained(folder)
    if head_of(source.model) in (SEQUENCE, TOKENS):
        _name_labels(folder / "config.json", config)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    if source.sentences is not None:
        copy_modules(source.sentences, folder)


def _name_labels(path: Path, config: PreTrainedConfig) -> None:
    """Write labels' names also where they are LABEL_0 and so on, which transformers leaves out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["id2label"] = {str(number): name for number, name in (config.id2label or {}).items()}
    content["label2id"] = config.label2id
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
