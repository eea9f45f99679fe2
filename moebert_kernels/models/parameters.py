"""Which parameters weight decay is for."""

from __future__ import annotations

from torch import nn

from moebert_kernels.layer import MoEFFN

_EXPERT_MATRICES = ("w1_EFD", "w2_EDF")


def decay_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay is for: all but biases and LayerNorms.

    A rule that goes by "bias" in a name or by the class of a norm, as `transformers.Trainer`'s, misses those
    of the experts, `b1_EF`, `b2_ED`, `ln_w_ED` and `ln_b_ED`. Names are those of `model.named_parameters()`.
    """
    decayed = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix, recurse=False):
            own_name = name.rpartition(".")[2]
            if isinstance(module, MoEFFN):
                is_matrix = own_name in _EXPERT_MATRICES
            else:
                is_matrix = not isinstance(module, nn.LayerNorm) and own_name != "bias"
            if is_matrix:
                decayed.add(name)
    return [name for name, _ in model.named_parameters() if name in decayed]
