"""The encoders that are timed: MoEBERT, dense BERTs, a DistilBERT shape, MoEBERT with others' experts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.layer import MoEFFN
from moebert_kernels.routing import RouterOutput

from .baselines.authors import AuthorsExpert, AuthorsExperts
from .cases import ModelCase, num_shared
from .reference import specification

_UNMASKED = "sdpa_without_mask"


def build(case: ModelCase, kind: str) -> Any:
    """An encoder without a pooler, in float32 on the CPU, the same weights every time.

    Args:
        case: the sizes.
        kind: "experts" for MoEBERT, "tied" for one that stores what experts share once, "dense" for the BERT
            it replaces, "bound" for a BERT with a dense network of one expert's size, "half" for a DistilBERT
            with half the layers.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _BUILDERS[kind](case)
        spread_weights(model)
    return model.eval()


def attend_without_mask(model: Any) -> None:
    """For batches without padding: in a CUDA graph transformers would make them a mask of ones.

    With one PyTorch does not take its fastest attention, and a graph is slower than eager calls.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(_UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register(_UNMASKED, lambda *arguments, **options: None)
    model.set_attn_implementation(_UNMASKED)


def bert_sizes(case: Any, width: int) -> dict[str, Any]:
    """A `BertConfig`'s arguments."""
    return {
        "vocab_size": case.V,
        "hidden_size": case.D,
        "num_hidden_layers": case.L,
        "num_attention_heads": max(1, case.D // case.head_size),
        "intermediate_size": width,
        "max_position_embeddings": max(512, case.sequence),
    }


def _moebert(case: ModelCase, *, tied: bool = False) -> nn.Module:
    from moebert_kernels.models import MoEBertConfig, MoEBertModel

    sizes = bert_sizes(case, case.E * case.F)
    shared = {"num_shared_neurons": num_shared(case.F) if tied else 0, "tie_shared": tied}
    config = MoEBertConfig(**sizes, num_experts=case.E, expert_size=case.F, **shared)
    return MoEBertModel(config, add_pooling_layer=False)


def _bert(case: ModelCase, width: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**bert_sizes(case, width)), add_pooling_layer=False)


def _distilbert(case: ModelCase) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    sizes = bert_sizes(case, case.E * case.F)
    config = DistilBertConfig(
        vocab_size=case.V,
        dim=case.D,
        n_layers=max(1, case.L // 2),
        n_heads=sizes["num_attention_heads"],
        hidden_dim=sizes["intermediate_size"],
        max_position_embeddings=sizes["max_position_embeddings"],
    )
    return DistilBertModel(config)


_BUILDERS: dict[str, Callable[[ModelCase], nn.Module]] = {
    "experts": _moebert,
    "tied": functools.partial(_moebert, tied=True),
    "dense": lambda case: _bert(case, case.E * case.F),
    "bound": lambda case: _bert(case, case.F),
    "half": _distilbert,
}


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Weights of unit gain, varied biases and scales: with the initial ones a wrong layer would not show."""
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if parameter.dim() == 1 or kind.startswith(("bias", "layernorm")):
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        elif "embeddings" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _swap_experts(model: Any, make: Callable[[Any], nn.Module]) -> Any:
    """A copy of a MoEBERT whose layers' experts are computed otherwise."""
    swapped = copy.deepcopy(model)
    for layer in swapped.encoder.layer:
        layer.ffn = make(layer.ffn)
    return swapped


def _authors_experts(ffn: Any) -> AuthorsExperts:
    experts = []
    for e in range(ffn.num_experts):
        norm = nn.LayerNorm(ffn.hidden_size, eps=ffn.norm_eps)
        norm.weight, norm.bias = (
            nn.Parameter(ffn.layernorm_weight_ED[e].detach()),
            nn.Parameter(ffn.layernorm_bias_ED[e].detach()),
        )
        w1_FD, b1_F, w2_DF, b2_D = (
            w[e].detach() for w in (ffn.w1_EFD, ffn.bias1_EF, ffn.w2_EDF, ffn.bias2_ED)
        )
        experts.append(AuthorsExpert(w1_FD, b1_F, w2_DF, b2_D, norm))
    return AuthorsExperts(experts)


class _ReferenceFFN(nn.Module):
    """The experts of a layer by the executable specification."""

    def __init__(self, ffn: MoEFFN):
        super().__init__()
        self.num_experts = ffn.num_experts
        self.ffn = ffn

    def forward(self, x_BSD: Tensor, *, routing: RouterOutput) -> Tensor:
        ffn = self.ffn
        y_TD = specification("ffn").moe_ffn(
            x_BSD.flatten(0, 1),
            routing.plan.expert_ids_TK,
            ffn.w1_EFD,
            ffn.bias1_EF,
            ffn.w2_EDF,
            ffn.bias2_ED,
            activation=ffn.activation,
            ln_w_ED=ffn.layernorm_weight_ED,
            ln_b_ED=ffn.layernorm_bias_ED,
            ln_eps=ffn.norm_eps,
            shared=(ffn.shared_w1_CD, ffn.shared_bias1_C, ffn.shared_w2_DC) if ffn.num_shared else None,
        )
        return y_TD.view(x_BSD.shape)


class _AuthorsEncoder(nn.Module):
    """The authors look experts up and sort in every layer; the plans that MoEBERT makes once are not used."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.layer, self.tables_LV = encoder.layer, encoder.tables_LV

    def forward(self, hidden_states: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        ids_T = kwargs["routing_ids"].flatten()
        for layer, table_V in zip(self.layer, self.tables_LV, strict=True):
            x_BSD, _ = layer.attention(hidden_states, attention_mask)
            y_TD = layer.ffn(x_BSD.flatten(0, 1), table_V[ids_T].long())
            hidden_states = y_TD.view(x_BSD.shape)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def with_authors_dispatch(model: Any) -> Any:
    """A copy of a MoEBERT that looks up, sorts and computes its experts as the published code does."""
    swapped = _swap_experts(model, _authors_experts)
    swapped.encoder = _AuthorsEncoder(swapped.encoder)
    return swapped


def with_reference_experts(model: Any) -> Any:
    """A copy of a MoEBERT with its experts computed by `python_ref`."""
    return _swap_experts(model, _ReferenceFFN)
