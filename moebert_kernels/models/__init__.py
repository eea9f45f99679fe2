"""MoEBERT for transformers: models, surgery, costs; each is imported when it is first used.

For every family in `families.FAMILIES` there are, here by name, `MoE<Family>Config`, `MoE<Family>Model` and
`MoE<Family>For...` with SequenceClassification, TokenClassification, QuestionAnswering and MaskedLM.
"""

from typing import TYPE_CHECKING, Any

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.models.config import GATE_ROUTINGS as GATE_ROUTINGS
    from moebert_kernels.models.config import HASH_ROUTINGS as HASH_ROUTINGS
    from moebert_kernels.models.config import ROUTINGS as ROUTINGS
    from moebert_kernels.models.config import MoEConfig as MoEConfig
    from moebert_kernels.models.config import is_moe as is_moe
    from moebert_kernels.models.costs import count_parameters as count_parameters
    from moebert_kernels.models.costs import encoder_flops_per_token as encoder_flops_per_token
    from moebert_kernels.models.costs import ffn_flops_per_token as ffn_flops_per_token
    from moebert_kernels.models.costs import parameters_used_per_token as parameters_used_per_token
    from moebert_kernels.models.families import FAMILIES as FAMILIES
    from moebert_kernels.models.families import DenseFFN as DenseFFN
    from moebert_kernels.models.families import find_ffns as find_ffns
    from moebert_kernels.models.families import max_tokens as max_tokens
    from moebert_kernels.models.modeling import MoEPreTrainedModel as MoEPreTrainedModel
    from moebert_kernels.models.pack import Pack as Pack
    from moebert_kernels.models.packing import packed as packed
    from moebert_kernels.models.packing import why_not_packed as why_not_packed
    from moebert_kernels.models.shrink import evenly_spaced_layers as evenly_spaced_layers
    from moebert_kernels.models.shrink import keep_layers as keep_layers
    from moebert_kernels.models.shrink import layers_of_equal_cost as layers_of_equal_cost
    from moebert_kernels.models.shrink import narrow_ffns as narrow_ffns
    from moebert_kernels.models.surgery import replace_ffns as replace_ffns
    from moebert_kernels.models.surgery import to_moe as to_moe

__all__, _get = exports(
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
