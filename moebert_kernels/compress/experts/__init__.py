"""A teacher's feed-forward networks become experts: which neurons go to which, which token to which expert,
and the least squares that fit each to its tokens.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.experts.adaptation import adapt, default_sizes, random_scores, split_neurons
    from moebert_kernels.compress.experts.fitting import Fitted, fit

__all__ = ["Fitted", "adapt", "default_sizes", "fit", "random_scores", "split_neurons"]

__getattr__ = getter(
    __name__,
    {
        "adaptation": ["adapt", "default_sizes", "random_scores", "split_neurons"],
        "fitting": ["Fitted", "fit"],
    },
)
