"""The encoders of transformers that can be given experts, and where each keeps what experts replace.

They share a layer's shape: self-attention with residual and LayerNorm, then
`norm(dropout(w2(activation(w1(x)))) + x)`, the half that a `MoEFFN` computes. Encoders that normalise before
the network (XLM-R-XL, RoBERTa-PreLayerNorm, ModernBERT), share one layer's weights between all (ALBERT) or
gate their network are others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from moebert_kernels.layer import MoEFFN
from moebert_kernels.models.config import expert_activation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


@dataclass(frozen=True)
class LayerShape:
    """Where a layer keeps the parts of its feed-forward half, and how its other half is called.

    Attributes:
        w1, w2, norm, activation, dropout: paths from the layer, as `get_submodule` takes them.
        attend: takes the layer and its arguments; gives the feed-forward half's input [B, S, D] and what the
            layer returns beside its hidden states, None if it returns those alone.
    """

    w1: str
    w2: str
    norm: str
    activation: str
    dropout: str
    attend: Callable[..., tuple[Tensor, tuple | None]]

    @property
    def replaced(self) -> set[str]:
        """The children that make up the feed-forward half."""
        return {path.partition(".")[0] for path in (self.w1, self.w2, self.norm)}


def _bert_attend(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    x_BSD, _ = layer.attention(hidden_states, *args, **kwargs)
    return x_BSD, None


def _mpnet_attend(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple]:
    x_BSD, *attentions = layer.attention(hidden_states, *args, **kwargs)
    return x_BSD, tuple(attentions)


def _distilbert_attend(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    x_BSD, _ = layer.attention(hidden_states, *args, **kwargs)
    return layer.sa_layer_norm(x_BSD + hidden_states), None


_BERT_PARTS = {
    "w1": "intermediate.dense",
    "w2": "output.dense",
    "norm": "output.LayerNorm",
    "activation": "intermediate.intermediate_act_fn",
    "dropout": "output.dropout",
}
_BERT_LAYER = LayerShape(**_BERT_PARTS, attend=_bert_attend)
_MPNET_LAYER = LayerShape(**_BERT_PARTS, attend=_mpnet_attend)
_DISTILBERT_LAYER = LayerShape(
    w1="ffn.lin1",
    w2="ffn.lin2",
    norm="output_layer_norm",
    activation="ffn.activation",
    dropout="ffn.dropout",
    attend=_distilbert_attend,
)


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture: where its classes are in transformers, which imports them when asked, and its shape.

    Attributes:
        name: what its class names begin with.
        module: of its models, below `transformers.models`.
        moe_type: the `model_type` of its configuration with experts.
        shape: of a layer.
        skips_positions: whether the first token's position is the one after the padding token's id.
        attends_by_interface: whether its attention is called through transformers' AttentionInterface, with
            queries, keys and values alone: if so, batches can be packed. The others add relative positions.
        layer_class: one layer's class.
        encoder_class: the class of what holds the layers, as `layer`.
        encoder_name: the encoder's name in the base model.
        width_name: what the configuration calls the width of the feed-forward networks.
    """

    name: str
    module: str
    moe_type: str
    shape: LayerShape = _BERT_LAYER
    skips_positions: bool = False
    attends_by_interface: bool = True
    layer_class: str = ""
    encoder_class: str = ""
    encoder_name: str = "encoder"
    width_name: str = "intermediate_size"

    def __post_init__(self):
        for field, suffix in (("layer_class", "Layer"), ("encoder_class", "Encoder")):
            if not getattr(self, field):
                object.__setattr__(self, field, self.name + suffix)

    @property
    def moe_names(self) -> tuple[str, ...]:
        """What its classes with experts are called: the public ones first."""
        named = (f"MoE{self.name}{suffix}" for suffix in ("Config", "Model", *HEADS))
        return (*named, f"MoE{self.encoder_class}", f"MoE{self.layer_class}")

    @property
    def is_loaded(self) -> bool:
        """Whether its code has been imported; otherwise there is no model of it."""
        return f"transformers.models.{self.module}" in sys.modules

    @cached_property
    def _modeling(self) -> ModuleType:
        return import_module(f"transformers.models.{self.module}")

    @cached_property
    def config(self) -> type[PreTrainedConfig]:
        """The configuration class; its models stay unloaded."""
        return getattr(
            import_module(f"transformers.models.{self.module.partition('.')[0]}"), f"{self.name}Config"
        )

    @cached_property
    def model(self) -> type[PreTrainedModel]:
        """The base model."""
        return getattr(self._modeling, f"{self.name}Model")

    @cached_property
    def heads(self) -> tuple[type[PreTrainedModel], ...]:
        """Of sequence and token classification, question answering and masked language modelling."""
        return tuple(getattr(self._modeling, self.name + head) for head in HEADS)

    @cached_property
    def encoder(self) -> type[nn.Module]:
        """What holds the layers."""
        return getattr(self._modeling, self.encoder_class)

    @cached_property
    def layer(self) -> type[nn.Module]:
        """One layer."""
        return getattr(self._modeling, self.layer_class)

    @property
    def base_name(self) -> str:
        """The base model's name in its heads."""
        return self.model.base_model_prefix


FAMILIES = (
    Family("Bert", "bert.modeling_bert", "moebert"),
    Family("Roberta", "roberta.modeling_roberta", "moe-roberta", skips_positions=True),
    Family("XLMRoberta", "xlm_roberta.modeling_xlm_roberta", "moe-xlm-roberta", skips_positions=True),
    Family("Camembert", "camembert.modeling_camembert", "moe-camembert", skips_positions=True),
    Family("Data2VecText", "data2vec.modeling_data2vec_text", "moe-data2vec-text", skips_positions=True),
    Family("Electra", "electra.modeling_electra", "moe-electra"),
    Family("Ernie", "ernie.modeling_ernie", "moe-ernie"),
    Family(
        "MPNet",
        "mpnet.modeling_mpnet",
        "moe-mpnet",
        _MPNET_LAYER,
        skips_positions=True,
        attends_by_interface=False,
    ),
    Family(
        "DebertaV2",
        "deberta_v2.modeling_deberta_v2",
        "moe-deberta-v2",
        _MPNET_LAYER,
        attends_by_interface=False,
    ),
    Family(
        "DistilBert",
        "distilbert.modeling_distilbert",
        "moe-distilbert",
        _DISTILBERT_LAYER,
        layer_class="TransformerBlock",
        encoder_class="Transformer",
        encoder_name="transformer",
        width_name="hidden_dim",
    ),
)


def shape_of_layers() -> dict[type[nn.Module], LayerShape]:
    """The shapes of all dense layers that there can be now, by class."""
    return {family.layer: family.shape for family in FAMILIES if family.is_loaded}


@dataclass(frozen=True, eq=False)
class DenseFFN:
    """One dense post-LN feed-forward network, `norm(dropout(w2(activation(w1(x)))) + x)`.

    Attributes:
        w1: [D -> width].
        w2: [width -> D].
        norm: over D.
        activation: as `MoEFFN` names it.
        dropout: probability.
        layer: the layer it belongs to.
    """

    w1: nn.Linear
    w2: nn.Linear
    norm: nn.LayerNorm
    activation: str
    dropout: float
    layer: nn.Module


def dense_ffn(layer: nn.Module, shape: LayerShape) -> DenseFFN:
    """The feed-forward network of a dense layer of this shape.

    Raises:
        ValueError: a part of it is not what it is in transformers, or its activation has no experts.
    """
    found: dict[str, Any] = {}
    for part, kind in (("w1", nn.Linear), ("w2", nn.Linear), ("norm", nn.LayerNorm)):
        path = getattr(shape, part)
        found[part] = layer.get_submodule(path)
        if not isinstance(found[part], kind):
            raise ValueError(
                f"{type(layer).__name__}.{path} must be a torch.nn.{kind.__name__}, "
                f"got {type(found[part]).__name__}"
            )
    activation = expert_activation(layer.get_submodule(shape.activation))
    dropout = cast(nn.Dropout, layer.get_submodule(shape.dropout))
    return DenseFFN(**found, activation=activation, dropout=dropout.p, layer=layer)


def find_ffns(model: nn.Module) -> list[DenseFFN]:
    """The dense feed-forward networks of an encoder under any head, in layer order.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is none, one is not built of plain linear maps, or its activation has no experts.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__} {model!r:.60}")
    shape_of = shape_of_layers()
    ffns = [dense_ffn(layer, shape_of[type(layer)]) for layer in model.modules() if type(layer) in shape_of]
    if not ffns:
        raise ValueError(
            f"{type(model).__name__} has no dense feed-forward network to find: looked for layers that add "
            f"their input to a network's output and then normalise, {', '.join(_known_layers())}; "
            f"found {_describe_layers(model)}"
        )
    return ffns


def find_base(model: nn.Module) -> tuple[PreTrainedModel, Family]:
    """The one base model under any head, or `model` itself, and its family.

    Raises:
        ValueError: there is none or more than one.
    """
    family_of = {family.model: family for family in FAMILIES if family.is_loaded}
    bases = [module for module in model.modules() if type(module) in family_of]
    if len(bases) != 1:
        known = ", ".join(f"{family.name}Model" for family in FAMILIES)
        raise ValueError(f"model must hold exactly one of {known}; {type(model).__name__} holds {len(bases)}")
    return bases[0], family_of[type(bases[0])]  # type: ignore[index, return-value]


def max_tokens(config: PreTrainedConfig) -> int:
    """How many tokens, special ones included, a model of this configuration takes in one row.

    RoBERTa and its kin number positions from the padding token's id + 1 on: 512 of 514 are left.

    Args:
        config: of a dense or a MoE encoder; of any other model, its `max_position_embeddings` is believed.

    Raises:
        ValueError: it has none.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        raise ValueError(
            f"{type(config).__name__} does not say how many tokens fit: no max_position_embeddings"
        )
    for family in FAMILIES:
        if isinstance(config, family.config) and family.skips_positions:
            # MPNet's embeddings have 1 for the padding token's id whatever the configuration says.
            padding_id = 1 if family.name == "MPNet" else config.pad_token_id
            return most - padding_id - 1
    return most


def _known_layers() -> list[str]:
    return [
        f"{family.layer_class} ({family.shape.w1}, {family.shape.w2}, {family.shape.norm})"
        for family in FAMILIES
    ]


def _describe_layers(model: nn.Module) -> str:
    """What stands in a model's longest list of modules, and where."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not any(len(layers) for _, layers in lists):
        return "no list of layers"
    name, layers = max(lists, key=lambda item: len(item[1]))
    kind = type(layers[0]).__name__
    has_experts = any(isinstance(module, MoEFFN) for module in layers.modules())
    experts = ", which hold experts already" if has_experts else ""
    return f"{len(layers)} x {kind} at {name}{experts}"
