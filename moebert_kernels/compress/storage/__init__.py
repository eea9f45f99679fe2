"""What is written and read again: models whole or not at all, sentence encoders as sentence_transformers has
them, stages' records, locks. Nothing is unpickled, and nobody's files are removed.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.storage.artifacts import fingerprint, write_json
    from moebert_kernels.compress.storage.loading import load_model, load_teacher, save_encoder
    from moebert_kernels.compress.storage.sentence_encoder import (
        SentenceEncoder,
        load_sentence_encoder,
        save_sentence_encoder,
    )

__all__ = [
    "SentenceEncoder",
    "fingerprint",
    "load_model",
    "load_sentence_encoder",
    "load_teacher",
    "save_encoder",
    "save_sentence_encoder",
    "write_json",
]

__getattr__ = getter(
    __name__,
    {
        "loading": ["load_model", "load_teacher", "save_encoder"],
        "sentence_encoder": ["SentenceEncoder", "load_sentence_encoder", "save_sentence_encoder"],
        "artifacts": ["fingerprint", "write_json"],
    },
)
