"""What a model costs, counted from its modules: parameters stored, parameters used, multiply-adds."""

from __future__ import annotations

from torch import nn

from moebert_kernels.layer import MoEFFN
from moebert_kernels.models.families import shape_of_layers
from moebert_kernels.routing import TokenGate


def count_parameters(model: nn.Module) -> int:
    """Parameters stored; one that is used in two places, such as a tied embedding, counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_used_per_token(model: nn.Module) -> int:
    """Parameters that take part in one token's forward pass: of E experts, K.

    Everything else counts whole, embeddings included, as in the paper's tables.
    """
    unused = 0
    for ffn in _expert_ffns(model):
        named = ffn.named_parameters(recurse=False)
        experts = sum(parameter.numel() for name, parameter in named if not name.startswith("shared"))
        unused += experts // ffn.num_experts * (ffn.num_experts - _top_k(ffn))
    return count_parameters(model) - unused


def ffn_flops_per_token(model: nn.Module) -> int:
    """Floating-point operations, 2 per multiply-add, of the feed-forward networks of all layers.

    Their linear maps and token gates are counted, the elementwise rest is not.
    """
    multiply_adds = 0
    for ffn in _expert_ffns(model):
        multiply_adds += 2 * _top_k(ffn) * ffn.expert_size * ffn.hidden_size
        if isinstance(ffn.router, TokenGate):
            multiply_adds += ffn.num_experts * ffn.hidden_size
    shape_of = shape_of_layers()
    for layer in model.modules():
        if type(layer) in shape_of:  # a dense one
            shape = shape_of[type(layer)]
            multiply_adds += sum(_weights(layer.get_submodule(path)) for path in (shape.w1, shape.w2))
    return 2 * multiply_adds


def encoder_flops_per_token(model: nn.Module) -> int:
    """`ffn_flops_per_token` and the projections of every self-attention.

    The attention scores, whose cost grows with the sequence, are left out.
    """
    layers = tuple(shape_of_layers())
    projections = 0
    for layer in model.modules():
        if isinstance(layer, layers):
            projections += _weights(layer.get_submodule("attention"))
    return ffn_flops_per_token(model) + 2 * projections


def _weights(module: nn.Module) -> int:
    """Of all linear maps in it."""
    return sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))


def _expert_ffns(model: nn.Module) -> list[MoEFFN]:
    return [module for module in model.modules() if isinstance(module, MoEFFN)]


def _top_k(ffn: MoEFFN) -> int:
    """A gate knows its K; a hash has 1."""
    return getattr(ffn.router, "top_k", 1)
