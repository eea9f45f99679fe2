"""Surgery: a loaded BERT's feed-forward networks, found, and replaced by experts cut from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLayer,
    BertModel,
)

from moebert_kernels.layer import MoEFFN
from moebert_kernels.models.config import MoEBertConfig, expert_activation
from moebert_kernels.models.modeling import (
    MoEBertEncoder,
    MoEBertForMaskedLM,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertLayer,
    MoEBertModel,
    MoEBertPreTrainedModel,
    hand_over_routing_inputs,
    new_router,
)
from moebert_kernels.routing import hash_random_tables

_MOE_CLASS_OF: dict[type[PreTrainedModel], type[MoEBertPreTrainedModel]] = {
    BertModel: MoEBertModel,
    BertForSequenceClassification: MoEBertForSequenceClassification,
    BertForTokenClassification: MoEBertForTokenClassification,
    BertForQuestionAnswering: MoEBertForQuestionAnswering,
    BertForMaskedLM: MoEBertForMaskedLM,
}


@dataclass(frozen=True, eq=False)
class DenseFFN:
    """One dense post-LN feed-forward network, `norm(dropout(w2(activation(w1(x)))) + x)`.

    Attributes:
        w1: [D -> width].
        w2: [width -> D].
        norm: over D.
        activation: as `MoEFFN` names it.
        dropout: probability.
        layer: the `BertLayer` it belongs to.
    """

    w1: nn.Linear
    w2: nn.Linear
    norm: nn.LayerNorm
    activation: str
    dropout: float
    layer: BertLayer


def find_ffns(model: nn.Module) -> list[DenseFFN]:
    """The dense feed-forward networks of a transformers BERT under any head, in layer order.

    Raises:
        ValueError: there is none, one is not built of plain linear maps, or its activation has no experts.
    """
    layers = [module for module in model.modules() if isinstance(module, BertLayer)]
    dense = [layer for layer in layers if not isinstance(layer, MoEBertLayer)]
    if not dense:
        found = "its BertLayers hold experts already" if layers else "it has none"
        raise ValueError(
            f"{type(model).__name__} has no dense feed-forward network to find: looked for transformers' "
            f"BertLayer with intermediate.dense, output.dense and output.LayerNorm, but {found}"
        )
    return [_dense_ffn(layer) for layer in dense]


def _dense_ffn(layer: BertLayer) -> DenseFFN:
    w1, w2 = layer.intermediate.dense, layer.output.dense
    for name, module in (("intermediate.dense", w1), ("output.dense", w2)):
        if not isinstance(module, nn.Linear):
            raise ValueError(f"BertLayer.{name} must be a torch.nn.Linear, got {type(module).__name__}")
    activation = expert_activation(layer.attention.self.config.hidden_act)
    return DenseFFN(w1, w2, layer.output.LayerNorm, activation, layer.output.dropout.p, layer)


def replace_ffns(
    model: PreTrainedModel,
    index_LEF: Tensor,
    *,
    routing: str = "hash-random",
    tables_LV: Tensor | None = None,
    top_k: int = 1,
    seed: int = 0,
) -> None:
    """Cut every dense feed-forward network of a BERT, under any head, into experts; in place.

    Expert e of layer l starts as the neurons `index_LEF[l, e]` of that layer's network with their biases; the
    output bias and the LayerNorm are copied to every expert. The weights are the experts' own from then on.
    The model is called as before and also takes `router_outputs`, as `MoEBertModel` does; its configuration
    becomes a `MoEBertConfig`. Its class stays, and so does its loss: under a gate, add the balance losses of
    `router_outputs` to it, or use `to_moe`, whose heads do so.

    Args:
        model: `BertModel` or a head on one.
        index_LEF: integer [L, E, F], from `split_neurons` or of your own making; E neurons' sets of each
            layer's network, which may overlap.
        routing: "hash-random", "hash-balance", "hash-affinity", "gate-token" or "gate-sentence".
        tables_LV: integer [L, V], the expert of every token id, for a hash. By default drawn at random
            for "hash-random"; the others have none and need them: "hash-balance" from `hash_balance_tables`,
            "hash-affinity" together with index_LEF from `compress.affinity.split_by_affinity`.
        top_k: K, for a gate.
        seed: of the random tables or of the gates' weights. Torch's global random state is left alone.

    Raises:
        ValueError: there is no BERT to be found, or an argument does not fit it; nothing is changed then.
    """
    dense_ffns = find_ffns(model)
    base = _only_bert(model)
    dense_config = cast(BertConfig, base.config)
    index_LEF = _checked_index(index_LEF, dense_ffns)
    num_layers, num_experts, expert_size = index_LEF.shape
    config = MoEBertConfig.from_bert(
        dense_config,
        num_experts=num_experts,
        expert_size=expert_size,
        num_shared_neurons=_count_shared(index_LEF),
        routing=routing,
        top_k=top_k,
        hash_seed=seed,
    )
    table_shape = (num_layers, base.get_input_embeddings().num_embeddings)
    tables_LV = _checked_tables(tables_LV, table_shape, config)

    generator = torch.Generator().manual_seed(seed)
    ffns = [
        _cut(dense, index_EF, config, generator)
        for dense, index_EF in zip(dense_ffns, index_LEF, strict=True)
    ]
    layers = [_become_moe(dense.layer, ffn) for dense, ffn in zip(dense_ffns, ffns, strict=True)]
    tables_LV = None if tables_LV is None else tables_LV.to(base.device)
    base.encoder = MoEBertEncoder(layers, tables_LV).train(base.encoder.training)  # type: ignore[assignment]
    base.register_forward_pre_hook(hand_over_routing_inputs, with_kwargs=True)
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = config  # type: ignore[assignment]


def to_moe(
    teacher: PreTrainedModel,
    index_LEF: Tensor,
    *,
    num_shared_neurons: int,
    routing: str = "hash-random",
    tables_LV: Tensor | None = None,
    top_k: int = 1,
    seed: int = 0,
) -> MoEBertPreTrainedModel:
    """A MoEBERT with the same head, cut from `teacher` as `replace_ffns` does; the teacher is left as it is.

    Args:
        teacher: `BertModel` or its head for sequence classification, token classification, question
            answering or masked language modelling.
        index_LEF: see `replace_ffns`.
        num_shared_neurons: how many neurons all experts of a layer were given on purpose; recorded in the
            configuration.
        routing: see `replace_ffns`.
        tables_LV: see `replace_ffns`.
        top_k: see `replace_ffns`.
        seed: see `replace_ffns`.

    Returns:
        `MoEBertFor...`, on the teacher's device and in its dtype and mode, with its labels and problem type.

    Raises:
        ValueError: as `replace_ffns`, or there is no MoEBERT class for the teacher's.
    """
    moe_class = _MOE_CLASS_OF.get(type(teacher))
    if moe_class is None:
        raise ValueError(
            f"teacher must be one of {', '.join(cls.__name__ for cls in _MOE_CLASS_OF)}, got "
            f"{type(teacher).__name__}; replace_ffns changes any other head in place"
        )
    moe = copy.deepcopy(teacher)
    replace_ffns(moe, index_LEF, routing=routing, tables_LV=tables_LV, top_k=top_k, seed=seed)
    config = cast(MoEBertConfig, moe.config)
    if not 0 <= num_shared_neurons <= config.num_shared_neurons:
        raise ValueError(
            f"num_shared_neurons must lie in [0, {config.num_shared_neurons}], the neurons that all experts "
            f"of every layer have in index_LEF, got {num_shared_neurons}"
        )
    config.num_shared_neurons = num_shared_neurons
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        if isinstance(moe, BertModel):
            student: MoEBertPreTrainedModel = MoEBertModel(config, add_pooling_layer=moe.pooler is not None)
        else:
            student = moe_class(config)
    student.to(device=teacher.device, dtype=teacher.dtype)  # type: ignore[call-arg]
    student.load_state_dict(moe.state_dict())
    return student.train(teacher.training)


def _only_bert(model: nn.Module) -> BertModel:
    bases = [module for module in model.modules() if isinstance(module, BertModel)]
    if len(bases) != 1:
        raise ValueError(f"model must hold exactly one BertModel, {type(model).__name__} holds {len(bases)}")
    return bases[0]


def _checked_index(index_LEF: Tensor, dense_ffns: list[DenseFFN]) -> Tensor:
    index_LEF = torch.as_tensor(index_LEF)
    if index_LEF.is_floating_point() or index_LEF.dim() != 3 or index_LEF.shape[0] != len(dense_ffns):
        raise ValueError(
            f"index_LEF must be integer [L={len(dense_ffns)}, E, F], got {index_LEF.dtype} "
            f"{tuple(index_LEF.shape)}"
        )
    if 0 in index_LEF.shape:
        raise ValueError(f"index_LEF must give every expert a neuron, got shape {tuple(index_LEF.shape)}")
    index_LEF = index_LEF.long().cpu()
    width = min(dense.w1.out_features for dense in dense_ffns)
    low, high = (int(v) for v in index_LEF.aminmax())
    if low < 0 or high >= width:
        raise ValueError(
            f"index_LEF must name neurons in [0, {width}), the width of the dense network, "
            f"found {low} to {high}"
        )
    if (index_LEF.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError("index_LEF names a neuron twice in one expert, which would count it double")
    return index_LEF


def _checked_tables(tables_LV: Tensor | None, shape: tuple[int, int], config: MoEBertConfig) -> Tensor | None:
    if config.is_gated:
        if tables_LV is not None:
            raise ValueError(f"tables_LV is for hash routing, and routing is {config.routing!r}")
        return None
    if tables_LV is None:
        if config.routing == "hash-balance":
            raise ValueError(
                "routing='hash-balance' needs tables_LV: hash_balance_tables(num_layers, token_counts_V, "
                "num_experts) makes them from the training data's token counts"
            )
        if config.routing == "hash-affinity":
            raise ValueError(
                "routing='hash-affinity' needs tables_LV: split_by_affinity makes them with index_LEF"
            )
        return hash_random_tables(*shape, config.num_experts, seed=config.hash_seed)
    if tables_LV.shape != shape or tables_LV.is_floating_point():
        raise ValueError(
            f"tables_LV must be integer [L, V] = {shape}, got {tables_LV.dtype} {tuple(tables_LV.shape)}"
        )
    low, high = (int(v) for v in tables_LV.aminmax())
    if low < 0 or high >= config.num_experts:
        raise ValueError(f"tables_LV must name experts in [0, {config.num_experts}), found {low} to {high}")
    return tables_LV.to(torch.int32)


def _count_shared(index_LEF: Tensor) -> int:
    """The neurons that all experts of a layer have in common; of the layer that has fewest."""
    num_experts = index_LEF.shape[1]
    return min(int((index_EF.flatten().bincount() == num_experts).sum()) for index_EF in index_LEF)


def _cut(dense: DenseFFN, index_EF: Tensor, config: MoEBertConfig, generator: torch.Generator) -> MoEFFN:
    """The experts of one layer, with weights copied from the dense network."""
    weight = dense.w1.weight
    with torch.device("meta"):  # every weight is given below: none is drawn here
        ffn = MoEFFN(
            dense.w1.in_features,
            config.expert_size,
            config.num_experts,
            router=new_router(config),
            activation=dense.activation,
            norm_eps=dense.norm.eps,
            dropout=dense.dropout,
        )
    index_EF = index_EF.to(weight.device)
    num_experts = config.num_experts
    state = {
        "w1_EFD": weight[index_EF],
        "b1_EF": dense.w1.bias[index_EF],
        "w2_EDF": dense.w2.weight[:, index_EF].transpose(0, 1).contiguous(),
        "b2_ED": dense.w2.bias.repeat(num_experts, 1),
        "ln_w_ED": dense.norm.weight.repeat(num_experts, 1),
        "ln_b_ED": dense.norm.bias.repeat(num_experts, 1),
    }
    if config.is_gated:
        gate_ED = torch.empty(num_experts, dense.w1.in_features)
        gate_ED.normal_(std=config.initializer_range, generator=generator)
        state["router.gate.weight"] = gate_ED.to(weight)
    ffn.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    return ffn


def _become_moe(layer: BertLayer, ffn: MoEFFN) -> MoEBertLayer:
    """Turn a layer into a MoE layer while it keeps its hooks, its checkpointing and its place.

    By changing its class, as torch.nn.utils.parametrize does: transformers installs the hooks that capture
    hidden states once, and a new layer would not have them.
    """
    del layer.intermediate, layer.output
    layer.__class__ = MoEBertLayer
    moe = cast(MoEBertLayer, layer)
    moe.ffn = ffn.train(layer.training)
    return moe
