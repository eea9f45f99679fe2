"""A tiny encoder of every family, dense, with weights large enough that no layer is near the identity."""

from __future__ import annotations

import torch

from moebert_kernels.models import FAMILIES
from moebert_kernels.models.families import Family
from tests.tiny_bert import HIDDEN, LAYERS, VOCAB, WIDTH

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": WIDTH,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
_CHANGES = {
    "DistilBert": {"hidden_dim": WIDTH},
    "Electra": {"embedding_size": 16},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
}
FAMILY = {family.name: family for family in FAMILIES}
each_family = list(FAMILY)


def class_of(family: Family, head: str | None) -> type:
    """The dense class with that head, "ForMaskedLM" for example; None for the base model."""
    return family.model if head is None else next(c for c in family.heads if c.__name__.endswith(head))


def build(name: str, head: str | None = None, seed: int = 0, **changes):
    """A dense model of the family in eval mode."""
    family = FAMILY[name]
    torch.manual_seed(seed)
    model = class_of(family, head)(family.config(**{**_SIZES, **_CHANGES.get(name, {}), **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, away from 0 and 1
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model
