"""Checkpoints from before parameters had today's names."""

from torch import Tensor


def under_former_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of when a `MoEFFN` called its biases and LayerNorms as `moe_ffn` does."""
    former = {"bias1_EF": "b1_EF", "bias2_ED": "b2_ED"}
    former |= {"layernorm_weight_ED": "ln_w_ED", "layernorm_bias_ED": "ln_b_ED"}
    renamed = {}
    for name, tensor in state.items():
        path, dot, last = name.rpartition(".")
        renamed[path + dot + former.get(last, last)] = tensor
    return renamed
