"""MoEBERT for transformers: models, surgery, costs. Importing this registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
)

from moebert_kernels.models.config import GATE_ROUTINGS, HASH_ROUTINGS, ROUTINGS, MoEBertConfig
from moebert_kernels.models.costs import (
    count_parameters,
    encoder_flops_per_token,
    ffn_flops_per_token,
    parameters_used_per_token,
)
from moebert_kernels.models.modeling import (
    MoEBertForMaskedLM,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
    MoEBertPreTrainedModel,
)
from moebert_kernels.models.parameters import decay_parameters
from moebert_kernels.models.surgery import DenseFFN, find_ffns, replace_ffns, to_moe

AutoConfig.register(MoEBertConfig.model_type, MoEBertConfig, exist_ok=True)
AutoTokenizer.register(MoEBertConfig, tokenizer_class=BertTokenizer, exist_ok=True)
for _auto, _model in (
    (AutoModel, MoEBertModel),
    (AutoModelForSequenceClassification, MoEBertForSequenceClassification),
    (AutoModelForTokenClassification, MoEBertForTokenClassification),
    (AutoModelForQuestionAnswering, MoEBertForQuestionAnswering),
    (AutoModelForMaskedLM, MoEBertForMaskedLM),
):
    _auto.register(MoEBertConfig, _model, exist_ok=True)

__all__ = [
    "GATE_ROUTINGS",
    "HASH_ROUTINGS",
    "ROUTINGS",
    "DenseFFN",
    "MoEBertConfig",
    "MoEBertForMaskedLM",
    "MoEBertForQuestionAnswering",
    "MoEBertForSequenceClassification",
    "MoEBertForTokenClassification",
    "MoEBertModel",
    "MoEBertPreTrainedModel",
    "count_parameters",
    "decay_parameters",
    "encoder_flops_per_token",
    "ffn_flops_per_token",
    "find_ffns",
    "parameters_used_per_token",
    "replace_ffns",
    "to_moe",
]
