"""A teacher's feed-forward networks become experts: which neurons go to which, which token to which expert,
and the least squares that fit each to its tokens.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.experts.adaptation import adapt as adapt
    from moebert_kernels.compress.experts.adaptation import default_sizes as default_sizes
    from moebert_kernels.compress.experts.adaptation import random_scores as random_scores
    from moebert_kernels.compress.experts.adaptation import split_neurons as split_neurons
    from moebert_kernels.compress.experts.fitting import Fitted as Fitted
    from moebert_kernels.compress.experts.fitting import fit as fit

__all__, __getattr__ = exports(
    __name__,
    {
        "adaptation": ["adapt", "default_sizes", "random_scores", "split_neurons"],
        "fitting": ["Fitted", "fit"],
    },
)
