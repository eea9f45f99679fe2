"""What a MoE encoder's configuration adds: how many experts there are and how tokens reach them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from moebert_kernels.checks import check_number, check_whole

HASH_ROUTINGS = ("hash-random", "hash-balance", "hash-affinity")
GATE_ROUTINGS = ("gate-token", "gate-sentence")
ROUTINGS = HASH_ROUTINGS + GATE_ROUTINGS
IGNORED_LABEL = -100  # of tokens that are in no loss, as transformers has it

_ACTIVATION_OF_HIDDEN_ACT = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
Config = TypeVar("Config", bound="MoEConfig")


def expert_activation(hidden_act: Any) -> str:
    """The `MoEFFN` activation that computes `hidden_act`, transformers' name of a function or its module.

    Raises:
        ValueError: there is none.
    """
    try:
        if isinstance(hidden_act, str):
            return _ACTIVATION_OF_HIDDEN_ACT[hidden_act]
        return _activation_of_class()[type(hidden_act)]
    except KeyError:
        found = repr(hidden_act) if isinstance(hidden_act, str) else type(hidden_act).__name__
        known = ", ".join(_ACTIVATION_OF_HIDDEN_ACT)
        raise ValueError(f"hidden_act must be one of {known} to run in experts, got {found}") from None


@cache
def _activation_of_class() -> dict[type, str]:
    from transformers.activations import ACT2FN

    return {type(ACT2FN[name]): ours for name, ours in _ACTIVATION_OF_HIDDEN_ACT.items()}


@dataclass(kw_only=True)
class MoEConfig:
    """What the configurations of all MoE encoders have beyond their dense family's.

    `MoE<Family>Config` is this and the family's own configuration, such as `RobertaConfig`. Whatever sets the
    width of the dense feed-forward network there keeps the width that the experts were cut from.

    Args:
        num_experts: E, per layer.
        expert_size: F, the neurons of one expert.
        num_shared_neurons: how many neurons every expert started with; a record, unless `tie_shared`.
        tie_shared: whether these are stored once and stay the same in all experts.
        routing: "hash-random", "hash-balance", "hash-affinity", "gate-token" or "gate-sentence".
        top_k: K, experts per token; a hash has 1.
        balance_loss_weight: of the load-balance loss that heads add to theirs while a gate is trained.
        hash_seed: of the random tables of a model made from scratch.
        is_fitted: whether the experts were fitted to the layers that they are cut from; a record, by which
            training is chosen.

    Raises:
        ValueError: a value is out of range, or asks for a decoder or for a chunked feed-forward.
    """

    num_experts: int = 4
    expert_size: int = 768
    num_shared_neurons: int = 512
    tie_shared: bool = False
    routing: str = "hash-random"
    top_k: int = 1
    balance_loss_weight: float | int = 0.01
    hash_seed: int = 0
    is_fitted: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # type: ignore[misc]  # that of the dense family's configuration
        for name in ("num_experts", "expert_size"):
            check_whole(name, getattr(self, name), least=1)
        for name in ("num_shared_neurons", "top_k", "hash_seed"):
            check_whole(name, getattr(self, name))
        check_number("balance_loss_weight", self.balance_loss_weight)
        if not 0 <= self.num_shared_neurons <= self.expert_size:
            raise ValueError(
                f"num_shared_neurons must lie in [0, expert_size={self.expert_size}], "
                f"got {self.num_shared_neurons}"
            )
        if self.tie_shared and self.num_shared_neurons == self.expert_size:
            raise ValueError(
                f"num_shared_neurons must be less than expert_size={self.expert_size} with tie_shared: every "
                f"expert needs a neuron of its own, got {self.num_shared_neurons}"
            )
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must lie in [1, num_experts={self.num_experts}], got {self.top_k}")
        if self.top_k > 1 and not self.is_gated:
            raise ValueError(f"{self.routing} gives each token one expert: top_k must be 1, got {self.top_k}")
        if self.balance_loss_weight < 0:
            raise ValueError(f"balance_loss_weight must not be negative, got {self.balance_loss_weight}")
        for name in ("hidden_act", "activation"):  # the latter in DistilBERT
            if hasattr(self, name):
                expert_activation(getattr(self, name))
        if getattr(self, "chunk_size_feed_forward", 0):
            raise ValueError(
                "chunk_size_feed_forward must be 0: a routing plan sorts all tokens of a batch at once, "
                f"got {self.chunk_size_feed_forward}"  # type: ignore[attr-defined]
            )
        if getattr(self, "is_decoder", False) or getattr(self, "add_cross_attention", False):
            raise ValueError("MoEBERT is an encoder: is_decoder and add_cross_attention must be False")

    @property
    def num_tied_neurons(self) -> int:
        """Neurons of a layer's experts that are stored once."""
        return self.num_shared_neurons if self.tie_shared else 0

    @property
    def is_gated(self) -> bool:
        """Whether routing is learned; otherwise it is a hash of the token id."""
        return self.routing in GATE_ROUTINGS

    @classmethod
    def from_dense(cls: type[Config], config: PreTrainedConfig, **experts: Any) -> Config:
        """The dense model's configuration with `experts`, the arguments of `MoEConfig`, added.

        Labels, problem type, dropout, attention implementation and all else are kept.
        """
        dense = config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "dtype"):
            dense.pop(name, None)
        moe = cls(**{**dense, **experts})
        moe.dtype = config.dtype  # type: ignore[attr-defined]
        moe.name_or_path = config.name_or_path  # type: ignore[attr-defined]
        moe._attn_implementation = config._attn_implementation  # type: ignore[attr-defined]
        return moe


def is_moe(config: object) -> bool:
    """Whether `config` is that of a MoE encoder, and so has `num_experts`, `routing` and so on."""
    return isinstance(config, MoEConfig)
