"""Surgery: a loaded encoder's feed-forward networks replaced by experts cut from them."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels.checks import check_tensor, check_whole
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models.families import DenseFFN, find_base, find_ffns
from moebert_kernels.models.modeling import (
    MoEPreTrainedModel,
    become_moe,
    moe_classes,
    new_experts,
    set_class,
)
from moebert_kernels.routing import hash_random_tables
from moebert_kernels.routing.tables import check_seed

__all__ = ["DenseFFN", "find_ffns", "replace_ffns", "to_moe"]


def replace_ffns(
    model: PreTrainedModel,
    index_LEF: Tensor,
    *,
    num_shared_neurons: int | None = None,
    tie_shared: bool = False,
    routing: str = "hash-random",
    tables_LV: Tensor | None = None,
    top_k: int = 1,
    seed: int = 0,
) -> None:
    """Cut every dense feed-forward network of an encoder, under any head, into experts; in place.

    Expert e of layer l starts as the neurons `index_LEF[l, e]` of that layer's network with their biases; the
    output bias and the LayerNorm are copied to every expert. The weights are the experts' own from then on.
    The model is called as before; its base model becomes a `MoE<Family>Model`, which also takes
    `router_outputs`, its configuration a `MoE<Family>Config`, and a head that `to_moe` knows becomes its MoE
    class. Any other head keeps its class and so its loss: under a gate, add the balance losses of
    `router_outputs` to it.

    Args:
        model: a base model of a family in `families.FAMILIES` or any head on one.
        index_LEF: integer [L, E, F], from `split_neurons` or of your own making; E neurons' sets of each
            layer's network, which may overlap.
        num_shared_neurons: how many neurons all experts of a layer were given on purpose; recorded in the
            configuration. By default as many as they have in common.
        tie_shared: store these once: they stay the same in all experts. Of more neurons in common, those that
            come first in expert 0.
        routing: "hash-random", "hash-balance", "hash-affinity", "gate-token" or "gate-sentence".
        tables_LV: integer [L, V], the expert of every token id, for a hash. By default drawn at random
            for "hash-random"; the others have none and need them: "hash-balance" from `hash_balance_tables`,
            "hash-affinity" together with index_LEF from `compress.affinity.split_by_affinity`.
        top_k: K, for a gate.
        seed: of the random tables or of the gates' weights. Torch's global random state is left alone.

    Raises:
        ValueError: there is no encoder to be found, or an argument does not fit it; nothing is changed then.
    """
    dense_ffns = find_ffns(model)
    base, family = find_base(model)
    dense_config, classes = base.config, moe_classes(family)
    index_LEF = _checked_index(index_LEF, dense_ffns)
    num_shared = _checked_shared(num_shared_neurons, index_LEF)
    check_seed(seed)
    num_layers, num_experts, expert_size = index_LEF.shape
    config: Any = classes.config.from_dense(  # type: ignore[attr-defined]
        dense_config,
        num_experts=num_experts,
        expert_size=expert_size,
        num_shared_neurons=num_shared,
        tie_shared=tie_shared,
        routing=routing,
        top_k=top_k,
        hash_seed=seed,
    )
    table_shape = (num_layers, cast(nn.Embedding, base.get_input_embeddings()).num_embeddings)
    tables_LV = _checked_tables(tables_LV, table_shape, config)

    generator = torch.Generator().manual_seed(seed)
    ffns = [
        _cut(dense, index_EF, config, generator)
        for dense, index_EF in zip(dense_ffns, index_LEF, strict=True)
    ]
    become_moe(base, family, ffns, None if tables_LV is None else tables_LV.to(base.device))
    if type(model) in classes.models:
        set_class(model, classes.models[type(model)])
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = config


def to_moe(
    teacher: PreTrainedModel,
    index_LEF: Tensor,
    *,
    num_shared_neurons: int,
    tie_shared: bool = False,
    routing: str = "hash-random",
    tables_LV: Tensor | None = None,
    top_k: int = 1,
    seed: int = 0,
) -> MoEPreTrainedModel:
    """A MoE model with the same head, cut from `teacher` as `replace_ffns` does; the teacher stays as it is.

    Args:
        teacher: a base model of a family in `families.FAMILIES` or its head for sequence classification,
            token classification, question answering or masked language modelling.
        index_LEF: see `replace_ffns`.
        num_shared_neurons: see `replace_ffns`.
        tie_shared: see `replace_ffns`.
        routing: see `replace_ffns`.
        tables_LV: see `replace_ffns`.
        top_k: see `replace_ffns`.
        seed: see `replace_ffns`.

    Returns:
        `MoE<Family>...`, on the teacher's device and in its dtype and mode, with its labels and problem type;
        all parameters require gradients, also if the teacher was frozen.

    Raises:
        ValueError: as `replace_ffns`, or there is no MoE class for the teacher's.
    """
    find_ffns(teacher)
    known = moe_classes(find_base(teacher)[1]).models
    if type(teacher) not in known:
        raise ValueError(
            f"teacher must be one of {', '.join(cls.__name__ for cls in known)}, got "
            f"{type(teacher).__name__}; replace_ffns changes any other head in place"
        )
    moe: Any = copy.deepcopy(teacher).requires_grad_()
    replace_ffns(
        moe,
        index_LEF,
        num_shared_neurons=num_shared_neurons,
        tie_shared=tie_shared,
        routing=routing,
        tables_LV=tables_LV,
        top_k=top_k,
        seed=seed,
    )
    return moe


def _checked_index(index_LEF: Tensor, dense_ffns: list[DenseFFN]) -> Tensor:
    check_tensor("index_LEF", index_LEF)
    if index_LEF.is_floating_point() or index_LEF.dim() != 3:
        raise ValueError(
            f"index_LEF must be integer [L={len(dense_ffns)}, E, F], got {index_LEF.dtype} "
            f"{tuple(index_LEF.shape)}"
        )
    if index_LEF.shape[0] != len(dense_ffns):
        raise ValueError(
            f"index_LEF must be for the model's {len(dense_ffns)} layers, got {index_LEF.shape[0]} layers, "
            f"shape {tuple(index_LEF.shape)}"
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


def _checked_tables(tables_LV: Tensor | None, shape: tuple[int, int], config: Any) -> Tensor | None:
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
    check_tensor("tables_LV", tables_LV)
    if tables_LV.shape != shape or tables_LV.is_floating_point():
        raise ValueError(
            f"tables_LV must be integer [L, V] = {shape}, got {tables_LV.dtype} {tuple(tables_LV.shape)}"
        )
    low, high = (int(v) for v in tables_LV.aminmax())
    if low < 0 or high >= config.num_experts:
        raise ValueError(f"tables_LV must name experts in [0, {config.num_experts}), found {low} to {high}")
    return tables_LV.to(torch.int32)


def _checked_shared(num_shared: int | None, index_LEF: Tensor) -> int:
    common = min(int(_in_common(index_EF).sum()) for index_EF in index_LEF)
    if num_shared is None:
        return common
    check_whole("num_shared_neurons", num_shared)
    if not 0 <= num_shared <= common:
        raise ValueError(
            f"num_shared_neurons must lie in [0, {common}], the neurons that all experts of every layer have "
            f"in index_LEF, got {num_shared}"
        )
    return num_shared


def _in_common(index_EF: Tensor) -> Tensor:
    """Which of the dense neurons all experts have."""
    return index_EF.flatten().bincount() == index_EF.shape[0]


def _cut(dense: DenseFFN, index_EF: Tensor, config: Any, generator: torch.Generator) -> MoEFFN:
    """The experts of one layer, with weights copied from the dense network."""
    weight = dense.w1.weight
    shared_C = index_EF[0][_in_common(index_EF)[index_EF[0]]][: config.num_tied_neurons]
    index_EF = torch.stack([index_F[~torch.isin(index_F, shared_C)] for index_F in index_EF])
    shared_C = shared_C.to(weight.device)
    with torch.device("meta"):  # every weight is given below: none is drawn here
        ffn = new_experts(dense, config)
    index_EF = index_EF.to(weight.device)
    num_experts = config.num_experts
    state = {
        "w1_EFD": weight[index_EF],
        "bias1_EF": dense.w1.bias[index_EF],
        "w2_EDF": dense.w2.weight[:, index_EF].transpose(0, 1).contiguous(),
        "bias2_ED": dense.w2.bias.repeat(num_experts, 1),
        "layernorm_weight_ED": dense.norm.weight.repeat(num_experts, 1),
        "layernorm_bias_ED": dense.norm.bias.repeat(num_experts, 1),
    }
    if len(shared_C):
        state |= {
            "shared_w1_CD": weight[shared_C],
            "shared_bias1_C": dense.w1.bias[shared_C],
            "shared_w2_DC": dense.w2.weight[:, shared_C].contiguous(),
        }
    if config.is_gated:
        gate_ED = torch.empty(num_experts, dense.w1.in_features)
        gate_ED.normal_(std=config.initializer_range, generator=generator)
        state["router.gate.weight"] = gate_ED.to(weight)
    ffn.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    return ffn
