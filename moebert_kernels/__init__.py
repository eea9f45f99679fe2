"""MoEBERT: fine-tuned encoders whose feed-forward networks become fast, importance-guided experts.

Importing it takes no time: PyTorch is imported when a name below is used, transformers when `models` is. Its
Auto classes know our models from then on, whichever of the two packages is imported first.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports
from moebert_kernels.registration import register_when_imported

if TYPE_CHECKING:
    from moebert_kernels import compress as compress
    from moebert_kernels import export as export
    from moebert_kernels import models as models
    from moebert_kernels.compress.data.sentences import load_sentences as load_sentences
    from moebert_kernels.compress.data.tasks import load_task as load_task
    from moebert_kernels.compress.data.tasks.texts import load_texts as load_texts
    from moebert_kernels.compress.experts.adaptation import adapt as adapt
    from moebert_kernels.compress.experts.fitting import fit as fit
    from moebert_kernels.compress.runs.settings import CompressSettings as CompressSettings
    from moebert_kernels.compress.scoring.importance import compute_importance as compute_importance
    from moebert_kernels.compress.training.trainer import DistillationTrainer as DistillationTrainer
    from moebert_kernels.layer import MoEFFN as MoEFFN
    from moebert_kernels.ops import moe_ffn as moe_ffn
    from moebert_kernels.routing import HashRouter as HashRouter
    from moebert_kernels.routing import RouterOutput as RouterOutput
    from moebert_kernels.routing import RoutingPlan as RoutingPlan
    from moebert_kernels.routing import SentenceGate as SentenceGate
    from moebert_kernels.routing import TokenGate as TokenGate
    from moebert_kernels.routing import hash_balance_tables as hash_balance_tables
    from moebert_kernels.routing import hash_random_tables as hash_random_tables

__version__ = "0.1.0"

__all__, __getattr__ = exports(
    __name__,
    {
        "compress": ["compress"],
        "compress.experts.adaptation": ["adapt"],
        "compress.experts.fitting": ["fit"],
        "compress.scoring.importance": ["compute_importance"],
        "compress.data.sentences": ["load_sentences"],
        "compress.runs.settings": ["CompressSettings"],
        "compress.data.tasks": ["load_task"],
        "compress.data.tasks.texts": ["load_texts"],
        "compress.training.trainer": ["DistillationTrainer"],
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
