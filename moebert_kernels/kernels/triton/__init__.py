"""The operator in Triton.

    blocks.py    which rows a tile has, the K loop, the activation: what all GEMMs share
    grouped.py   gather-and-multiply, multiply-and-scatter: forward and data gradients
    hopper/      the same in warp-specialised form
    wgrad.py     weight gradients
    steps.py     how streamed ones share the work
    norm.py      residual sum and per-expert LayerNorm
    rows.py      the sum over a token's experts, the gate's gradient
    ffn.py       what the experts' passes launch
    backend.py   experts and norm together: the backend
    launch.py    how kernels are started
    replay.py    calls whose shapes come again
    direct.py    what Triton's launcher calls in the end
    configs.py   the tuning table

Importing this needs Triton and no GPU.
"""

from moebert_kernels.kernels.triton.backend import backward, forward
from moebert_kernels.kernels.triton.ffn import expert_ffn_backward, expert_ffn_forward
from moebert_kernels.kernels.triton.norm import expert_norm_backward, expert_norm_forward

__all__ = [
    "backward",
    "expert_ffn_backward",
    "expert_ffn_forward",
    "expert_norm_backward",
    "expert_norm_forward",
    "forward",
]
