"""Warp-specialised kernels for Hopper, in Gluon, the dialect of Triton in which a kernel
places warps and data itself.

    ring.py      tiles, layouts, barriers, the loop of products
    kernels.py   gather, scatter, gather_backward
    launches.py  which calls they fit, and how they are started

Gluon is experimental: it is asked for in the versions of Triton that were checked, and in no other.
"""

from moebert_kernels.kernels.triton.hopper.launches import (
    TILE,
    fits,
    gather,
    gather_backward,
    scatter,
    takes,
)

__all__ = ["TILE", "fits", "gather", "gather_backward", "scatter", "takes"]
