"""MoEBERT: fine-tuned encoders whose feed-forward networks become fast, importance-guided experts."""

import importlib.util

from moebert_kernels.layer import MoEFFN
from moebert_kernels.ops import moe_ffn
from moebert_kernels.routing import (
    HashRouter,
    RouterOutput,
    RoutingPlan,
    SentenceGate,
    TokenGate,
    hash_balance_tables,
    hash_random_tables,
)

if importlib.util.find_spec("transformers") is not None:  # without it, the layer and its kernels remain
    from moebert_kernels import models  # registers the models with transformers' Auto classes

__version__ = "0.1.0"

__all__ = [
    "HashRouter",
    "MoEFFN",
    "RouterOutput",
    "RoutingPlan",
    "SentenceGate",
    "TokenGate",
    "hash_balance_tables",
    "hash_random_tables",
    "models",
    "moe_ffn",
]
