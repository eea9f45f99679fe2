"""What every backend is called with and what it answers: the terms that operator and backends share.

Notation: T tokens, K experts per token, S = T*K slots (slot s = t*K + k), D hidden size, F neurons of one
expert, C neurons that all experts share beside, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of the operator: `moe_ffn`'s arguments, the plan's tables among them, after any autocast.

    The norm's two are None without norm, `residual_TD` where it is x itself, `seed` (int64 [1], which fixes
    the dropout mask) without dropout, the last three where experts share no neurons.
    """

    x_TD: Tensor
    expert_ids_TK: Tensor
    order_S: Tensor
    inverse_S: Tensor
    offsets_E1: Tensor
    w1_EFD: Tensor
    b1_EF: Tensor | None
    w2_EDF: Tensor
    b2_ED: Tensor | None
    gate_TK: Tensor | None = None
    ln_w_ED: Tensor | None = None
    ln_b_ED: Tensor | None = None
    residual_TD: Tensor | None = None
    seed: Tensor | None = None
    shared_w1_CD: Tensor | None = None
    shared_b1_C: Tensor | None = None
    shared_w2_DC: Tensor | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout_p: float = 0.0

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Those that come first, None for each that there is not."""
        return self[:NUM_TENSORS]

    @property
    def top_k(self) -> int:
        """K, the experts a token may use."""
        return self.expert_ids_TK.shape[1]

    @property
    def num_shared(self) -> int:
        """C, the neurons that all experts have; F counts none of them."""
        return 0 if self.shared_w1_CD is None else self.shared_w1_CD.shape[0]

    @property
    def residual(self) -> Tensor:
        """What the norm adds to the experts' output."""
        return self.x_TD if self.residual_TD is None else self.residual_TD

    @property
    def norm_dtype(self) -> torch.dtype:
        """In which the norm is computed and its statistics are kept: the residual's, float32 at least."""
        return torch.promote_types(self.residual.dtype, torch.float32)


NUM_TENSORS = Call._fields.index("activation")


class Saved(NamedTuple):
    """What a backend's forward leaves for its own backward, in rows of its own order; None where unused.

    `hidden` are pre-activations, or activations and slopes: [*, F], and of shared neurons `shared` [*, C], or
    both in `hidden`, [*, C + F]; with norm `z` [*, D] the experts' outputs, `stats_2S` mean and 1/std of each
    slot, float32 or wider.
    """

    hidden: Tensor | None
    z: Tensor | None
    stats_2S: Tensor | None
    shared: Tensor | None = None


class Gradients(NamedTuple):
    """One thing for each argument that has a gradient: the gradient or None, or whether it is wanted.

    Where the residual is x, its gradient is part of `x_TD`'s.
    """

    x_TD: Any
    w1_EFD: Any
    b1_EF: Any
    w2_EDF: Any
    b2_ED: Any
    gate_TK: Any
    ln_w_ED: Any
    ln_b_ED: Any
    residual_TD: Any
    shared_w1_CD: Any
    shared_b1_C: Any
    shared_w2_DC: Any
