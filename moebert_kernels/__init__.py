"""MoEBERT: fine-tuned encoders whose feed-forward networks become fast, importance-guided experts.

Importing it takes no time: PyTorch is imported when a name below is used, transformers when `models` is. Its
Auto classes know our models from then on, whichever of the two packages is imported first.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter
from moebert_kernels.registration import register_when_imported

if TYPE_CHECKING:
    from moebert_kernels import export, models
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
    "export",
    "hash_balance_tables",
    "hash_random_tables",
    "models",
    "moe_ffn",
]

__getattr__ = getter(
    __name__,
    {
        "export": ["export"],
        "layer": ["MoEFFN"],
        "models": ["models"],
        "ops": ["moe_ffn"],
        "routing": [
            "HashRouter",
            "RouterOutput",
            "RoutingPlan",
            "SentenceGate",
            "TokenGate",
            "hash_balance_tables",
            "hash_random_tables",
        ],
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
