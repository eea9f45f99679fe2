"""MoEBERT for transformers: models, surgery, costs; each is imported when it is first used.

For every family in `families.FAMILIES` there are, here by name, `MoE<Family>Config`, `MoE<Family>Model` and
`MoE<Family>For...` with SequenceClassification, TokenClassification, QuestionAnswering and MaskedLM.
"""

from typing import TYPE_CHECKING, Any

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.models.config import GATE_ROUTINGS, HASH_ROUTINGS, ROUTINGS, MoEConfig, is_moe
    from moebert_kernels.models.costs import (
        count_parameters,
        encoder_flops_per_token,
        ffn_flops_per_token,
        parameters_used_per_token,
    )
    from moebert_kernels.models.families import FAMILIES, DenseFFN, find_ffns, max_tokens
    from moebert_kernels.models.modeling import MoEPreTrainedModel
    from moebert_kernels.models.pack import Pack
    from moebert_kernels.models.packing import packed, why_not_packed
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
    "Pack",
    "count_parameters",
    "encoder_flops_per_token",
    "evenly_spaced_layers",
    "ffn_flops_per_token",
    "find_ffns",
    "is_moe",
    "keep_layers",
    "layers_of_equal_cost",
    "max_tokens",
    "narrow_ffns",
    "packed",
    "parameters_used_per_token",
    "replace_ffns",
    "to_moe",
    "why_not_packed",
]

_get = getter(
    __name__,
    {
        "config": ["GATE_ROUTINGS", "HASH_ROUTINGS", "ROUTINGS", "MoEConfig", "is_moe"],
        "costs": [
            "count_parameters",
            "encoder_flops_per_token",
            "ffn_flops_per_token",
            "parameters_used_per_token",
        ],
        "families": ["FAMILIES", "DenseFFN", "find_ffns", "max_tokens"],
        "modeling": ["MoEPreTrainedModel"],
        "pack": ["Pack"],
        "packing": ["packed", "why_not_packed"],
        "shrink": ["evenly_spaced_layers", "keep_layers", "layers_of_equal_cost", "narrow_ffns"],
        "surgery": ["replace_ffns", "to_moe"],
    },
)


def __getattr__(name: str) -> Any:
    if name.startswith("MoE") and name not in __all__:
        from moebert_kernels.models import modeling

        return getattr(modeling, name)
    return _get(name)
