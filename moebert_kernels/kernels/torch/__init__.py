"""The operator in plain PyTorch: the path of everything that has no kernels of its own."""

from moebert_kernels.kernels.torch.backend import backward, forward

__all__ = ["backward", "forward"]
