"""`moe_ffn`, the expert feed-forward network as one operator, and the choice of what computes it."""

from moebert_kernels.ops.operator import moe_ffn

__all__ = ["moe_ffn"]
