"""What is written and read again: models whole or not at all, sentence encoders as sentence_transformers has
them, stages' records, locks. Nothing is unpickled, and nobody's files are removed.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.storage.artifacts import fingerprint as fingerprint
    from moebert_kernels.compress.storage.artifacts import write_json as write_json
    from moebert_kernels.compress.storage.loading import load_model as load_model
    from moebert_kernels.compress.storage.loading import load_teacher as load_teacher
    from moebert_kernels.compress.storage.loading import save_encoder as save_encoder
    from moebert_kernels.compress.storage.sentence_encoder import SentenceEncoder as SentenceEncoder
    from moebert_kernels.compress.storage.sentence_encoder import (
        load_sentence_encoder as load_sentence_encoder,
    )
    from moebert_kernels.compress.storage.sentence_encoder import (
        save_sentence_encoder as save_sentence_encoder,
    )

__all__, __getattr__ = exports(
    __name__,
    {
        "loading": ["load_model", "load_teacher", "save_encoder"],
        "sentence_encoder": ["SentenceEncoder", "load_sentence_encoder", "save_sentence_encoder"],
        "artifacts": ["fingerprint", "write_json"],
    },
)
