"""Which expert a token uses: routers decide, a `RoutingPlan` is the decision sorted for the kernels."""

from moebert_kernels.routing.plan import RoutingPlan
from moebert_kernels.routing.routers import (
    HashRouter,
    RouterOutput,
    SentenceGate,
    TokenGate,
    load_balance_loss,
)
from moebert_kernels.routing.tables import hash_balance_tables, hash_random_tables

__all__ = [
    "HashRouter",
    "RouterOutput",
    "RoutingPlan",
    "SentenceGate",
    "TokenGate",
    "hash_balance_tables",
    "hash_random_tables",
    "load_balance_loss",
]
