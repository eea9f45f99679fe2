"""MoEBertConfig: a BertConfig that also says how many experts there are and how tokens reach them."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

HASH_ROUTINGS = ("hash-random", "hash-balance", "hash-affinity")
GATE_ROUTINGS = ("gate-token", "gate-sentence")
ROUTINGS = HASH_ROUTINGS + GATE_ROUTINGS

_ACTIVATION_OF_HIDDEN_ACT = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def expert_activation(hidden_act: Any) -> str:
    """The `MoEFFN` activation that computes what transformers calls `hidden_act`.

    Raises:
        ValueError: there is none.
    """
    try:
        return _ACTIVATION_OF_HIDDEN_ACT[hidden_act]
    except (KeyError, TypeError):
        known = ", ".join(_ACTIVATION_OF_HIDDEN_ACT)
        raise ValueError(f"hidden_act must be one of {known} to run in experts, got {hidden_act!r}") from None


@strict
class MoEBertConfig(BertConfig):
    """Configuration of the MoEBERT models; everything of `BertConfig`, and:

    Args:
        num_experts: E, per layer.
        expert_size: F, the neurons of one expert. `intermediate_size` keeps the width of the dense
            feed-forward network the experts were cut from.
        num_shared_neurons: how many neurons every expert started with; a record, nothing reads it.
        routing: "hash-random", "hash-balance", "hash-affinity", "gate-token" or "gate-sentence".
        top_k: K, experts per token; a hash has 1.
        balance_loss_weight: of the load-balance loss that heads add to theirs while a gate is trained.
        hash_seed: of the random tables of a model made from scratch.

    Raises:
        ValueError: a value is out of range, or asks for a decoder or for a chunked feed-forward.
    """

    model_type = "moebert"

    num_experts: int = 4
    expert_size: int = 768
    num_shared_neurons: int = 512
    routing: str = "hash-random"
    top_k: int = 1
    balance_loss_weight: float | int = 0.01
    hash_seed: int = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("num_experts", "expert_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.num_shared_neurons <= self.expert_size:
            raise ValueError(
                f"num_shared_neurons must lie in [0, expert_size={self.expert_size}], "
                f"got {self.num_shared_neurons}"
            )
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must lie in [1, num_experts={self.num_experts}], got {self.top_k}")
        if self.top_k > 1 and not self.is_gated:
            raise ValueError(f"{self.routing} gives each token one expert: top_k must be 1, got {self.top_k}")
        if self.balance_loss_weight < 0:
            raise ValueError(f"balance_loss_weight must not be negative, got {self.balance_loss_weight}")
        expert_activation(self.hidden_act)
        if self.chunk_size_feed_forward:
            raise ValueError(
                "chunk_size_feed_forward must be 0: a routing plan sorts all tokens of a batch at once, "
                f"got {self.chunk_size_feed_forward}"
            )
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("MoEBERT is an encoder: is_decoder and add_cross_attention must be False")

    @property
    def is_gated(self) -> bool:
        """Whether routing is learned; otherwise it is a hash of the token id."""
        return self.routing in GATE_ROUTINGS

    @classmethod
    def from_bert(cls, config: BertConfig, **experts: Any) -> MoEBertConfig:
        """A dense BERT's configuration with `experts`, the arguments of this class, added.

        Labels, problem type, dropout, attention implementation and all else are kept.
        """
        dense = config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "dtype"):
            dense.pop(name, None)
        moe = cls(**{**dense, **experts})
        moe.dtype = config.dtype
        moe.name_or_path = config.name_or_path
        moe._attn_implementation = config._attn_implementation
        return moe
