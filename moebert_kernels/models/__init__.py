"""MoEBERT for transformers: models, surgery, costs. Importing this registers the Auto classes.

For every family in `families.FAMILIES` there are, here by name, `MoE<Family>Config`, `MoE<Family>Model` and
`MoE<Family>For...` with SequenceClassification, TokenClassification, QuestionAnswering and MaskedLM.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from moebert_kernels.models.config import GATE_ROUTINGS, HASH_ROUTINGS, ROUTINGS, MoEConfig, is_moe
from moebert_kernels.models.costs import (
    count_parameters,
    encoder_flops_per_token,
    ffn_flops_per_token,
    parameters_used_per_token,
)
from moebert_kernels.models.families import FAMILIES, DenseFFN, find_ffns, max_tokens
from moebert_kernels.models.modeling import MOE_CLASSES, MoEPreTrainedModel
from moebert_kernels.models.parameters import decay_parameters
from moebert_kernels.models.shrink import (
    evenly_spaced_layers,
    keep_layers,
    layers_of_equal_cost,
    narrow_ffns,
)
from moebert_kernels.models.surgery import replace_ffns, to_moe

__all__ = [
    "FAMILIES",
    "GATE_ROUTINGS",
    "HASH_ROUTINGS",
    "ROUTINGS",
    "DenseFFN",
    "MoEConfig",
    "MoEPreTrainedModel",
    "count_parameters",
    "decay_parameters",
    "encoder_flops_per_token",
    "evenly_spaced_layers",
    "ffn_flops_per_token",
    "find_ffns",
    "is_moe",
    "keep_layers",
    "layers_of_equal_cost",
    "max_tokens",
    "narrow_ffns",
    "parameters_used_per_token",
    "replace_ffns",
    "to_moe",
]

_AUTO_CLASSES = (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMaskedLM,
)

for _family, _classes in MOE_CLASSES.items():
    AutoConfig.register(_classes.config.model_type, _classes.config, exist_ok=True)
    AutoTokenizer.register(_classes.config, tokenizer_class=TOKENIZER_MAPPING[_family.config], exist_ok=True)
    for _auto, _model in zip(_AUTO_CLASSES, _classes.models.values(), strict=True):
        _auto.register(_classes.config, _model, exist_ok=True)
    globals().update(_classes.named())
    __all__ += list(_classes.named())

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The classes made by name above."""
