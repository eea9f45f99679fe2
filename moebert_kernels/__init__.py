"""MoEBERT: fine-tuned encoders whose feed-forward networks become fast, importance-guided experts."""

from moebert_kernels import models  # registers the models with transformers' Auto classes
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
