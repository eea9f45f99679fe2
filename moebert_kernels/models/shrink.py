"""A dense encoder made smaller and left dense: narrower feed-forward networks, or fewer layers.

What a MoE has to be better than at the same cost. Both are ordinary models of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels.models.costs import encoder_flops_per_token
from moebert_kernels.models.families import find_base, find_ffns

Model = TypeVar("Model", bound=PreTrainedModel)


def narrow_ffns(teacher: Model, index_LF: Tensor) -> Model:
    """A copy whose feed-forward networks hold the given neurons alone; the teacher stays as it is.

    Args:
        teacher: a base model of a family in `families.FAMILIES` or any head on one.
        index_LF: integer [L, F], the neurons that each layer keeps.

    Returns:
        A model of the teacher's class whose configuration has F as the width, on its device and in its mode;
        all parameters require gradients, also if the teacher was frozen.

    Raises:
        ValueError: there is no encoder to be found, or `index_LF` does not fit it.
    """
    ffns = find_ffns(teacher)
    width = min(ffn.w1.out_features for ffn in ffns)
    if index_LF.is_floating_point() or index_LF.dim() != 2 or index_LF.shape[0] != len(ffns):
        raise ValueError(
            f"index_LF must be integer [L={len(ffns)}, F], got {index_LF.dtype} {tuple(index_LF.shape)}"
        )
    if not index_LF.numel() or index_LF.min() < 0 or index_LF.max() >= width:
        raise ValueError(f"index_LF must name neurons in [0, {width}), at least one of each layer")
    if (index_LF.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError("index_LF names a neuron of a layer twice, which would count it double")
    narrow = copy.deepcopy(teacher).requires_grad_()
    base, family = find_base(narrow)
    with torch.no_grad():
        for ffn, index_F in zip(find_ffns(narrow), index_LF.to(teacher.device), strict=True):
            ffn.w1.weight = nn.Parameter(ffn.w1.weight[index_F])
            ffn.w1.bias = nn.Parameter(ffn.w1.bias[index_F])
            ffn.w2.weight = nn.Parameter(ffn.w2.weight[:, index_F].contiguous())
            ffn.w1.out_features = ffn.w2.in_features = index_LF.shape[1]
    setattr(base.config, family.width_name, index_LF.shape[1])
    return narrow


def keep_layers(teacher: Model, kept: Sequence[int]) -> Model:
    """A copy that holds the given layers alone; the teacher stays as it is.

    Args:
        teacher: as for `narrow_ffns`.
        kept: their indices, counted from 0, rising.

    Returns:
        A model of the teacher's class, on its device and in its mode; all parameters require gradients.

    Raises:
        ValueError: there is no encoder to be found, or `kept` does not fit it.
    """
    num_layers = len(find_ffns(teacher))
    kept = list(kept)
    if not kept or kept != sorted(set(kept) & set(range(num_layers))):
        raise ValueError(f"kept must be rising indices of layers in [0, {num_layers}), got {kept}")
    fewer = copy.deepcopy(teacher).requires_grad_()
    base, family = find_base(fewer)
    encoder = getattr(base, family.encoder_name)
    encoder.layer = nn.ModuleList(encoder.layer[index] for index in kept)
    base.config.num_hidden_layers = len(kept)
    return fewer


def evenly_spaced_layers(num_layers: int, num_kept: int) -> list[int]:
    """Indices, counted from 0, of so many layers at even distances; the last one is among them."""
    return [(i + 1) * num_layers // num_kept - 1 for i in range(num_kept)]


def layers_of_equal_cost(teacher: PreTrainedModel, flops_per_token: int) -> list[int]:
    """Which layers to keep so that the encoder's work is as near as can be to the given one.

    Args:
        teacher: as for `narrow_ffns`.
        flops_per_token: to be reached, as `encoder_flops_per_token` counts them.

    Returns:
        Evenly spaced indices, at least one.
    """
    num_layers = len(find_ffns(teacher))
    each = encoder_flops_per_token(teacher) / num_layers
    num_kept = min(range(1, num_layers + 1), key=lambda n: abs(n * each - flops_per_token))
    return evenly_spaced_layers(num_layers, num_kept)
