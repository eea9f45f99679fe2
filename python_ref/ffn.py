"""The feed-forward layer: dense, and as a mixture of experts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _gelu(h: Tensor) -> Tensor:
    """Hendrycks & Gimpel, arXiv 1606.08415: h Phi(h), Phi the normal distribution function."""
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def _gelu_tanh(h: Tensor) -> Tensor:
    """The same paper's tanh approximation, as the first BERT had it."""
    return h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def _silu(h: Tensor) -> Tensor:
    return h * torch.sigmoid(h)


_ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": torch.relu, "silu": _silu}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return sigma of Eq. 1 by name: "gelu" (with erf, BERT's own), "gelu_tanh", "relu" or "silu".

    Raises:
        ValueError: the name is none of these.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_activation_by_name = activation  # below, the argument `activation` hides the function


def dense_ffn(
    x_TD: Tensor,
    w1_FD: Tensor,
    b1_F: Tensor | None,
    w2_DF: Tensor,
    b2_D: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """Eq. 1: X = W2 sigma(W1 A + b1) + b2 for every token; weights have the rows of nn.Linear.

    Returns:
        [T, D], in the dtype of the arguments.
    """
    h_TF = functional.linear(x_TD, w1_FD, b1_F)
    a_TF = _activation_by_name(activation)(h_TF)
    return functional.linear(a_TF, w2_DF, b2_D)


def moe_ffn(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    *,
    gate_TK: Tensor | None = None,
    activation: str = "gelu",
    residual_TD: Tensor | None = None,
    ln_w_ED: Tensor | None = None,
    ln_b_ED: Tensor | None = None,
    ln_eps: float = 1e-12,
    shared: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:
    """Eq. 2: y_t = sum over k of g_tk o_tk, where o_tk is what expert e = expert_ids[t, k] makes of token t.

    Plain, the expert is Eq. 1 with its own weights: o_tk = z_e(x_t). With ln_w_ED it has the residual and its
    own LayerNorm inside, o_tk = LN_e(z_e(x_t) + r_t), as in the authors' code (moebert/utils.py,
    FeedForward), and the gate multiplies the result after the norm (moebert/moe_layer.py). r is residual_TD,
    or else x.

    Expert -1 means no expert: the slot adds nothing, whatever its gate, and the other slots keep their
    weight. A token with no expert at all gives 0, or with the norm its r_t unchanged. (The authors' code has
    no such tokens: it sends padding through an expert.) Without gate_TK every slot weighs 1/K, as Eq. 2 has
    it for hash routing (Roller et al., arXiv 2106.04426).

    With `shared`, w1_CD, b1_C and w2_DC, every expert has C neurons more, the same ones in all: its z_e(x_t)
    is W2 sigma(W1 x_t + b1) of these plus that of its own. In the paper experts only begin so.

    Args:
        x_TD: tokens.
        expert_ids_TK: integers from -1 to E - 1.
        w1_EFD: first weight of each expert.
        b1_EF: first bias of each expert, or None.
        w2_EDF: second weight of each expert.
        b2_ED: second bias of each expert, or None.
        gate_TK: weight of each slot, or None for 1/K.
        activation: a name that `activation` knows.
        residual_TD: what is added before the norm; None for x_TD.
        ln_w_ED: LayerNorm weight of each expert, or None for the plain form.
        ln_b_ED: LayerNorm bias of each expert, or None.
        ln_eps: added to the variance; BERT's default.
        shared: neurons of all experts, or None.

    Returns:
        [T, D].

    Raises:
        ValueError: an expert id is E or more; a residual or a norm bias comes without a norm weight.
    """
    num_experts = w1_EFD.shape[0]
    norm = ln_w_ED is not None
    if not norm and (residual_TD is not None or ln_b_ED is not None):
        raise ValueError("ln_w_ED is None, expected a LayerNorm weight with residual_TD or ln_b_ED")
    if (expert_ids_TK >= num_experts).any():
        raise ValueError(f"expert_ids_TK has {int(expert_ids_TK.max())}, expected -1 to {num_experts - 1}")
    r_TD = x_TD if residual_TD is None else residual_TD
    top_k = expert_ids_TK.shape[1]

    def expert(e: int, tokens: Tensor) -> Tensor:
        b1_F = None if b1_EF is None else b1_EF[e]
        b2_D = None if b2_ED is None else b2_ED[e]
        z_tD = dense_ffn(x_TD[tokens], w1_EFD[e], b1_F, w2_EDF[e], b2_D, activation)
        if shared is not None:
            shared_w1_CD, shared_b1_C, shared_w2_DC = shared
            z_tD = z_tD + dense_ffn(x_TD[tokens], shared_w1_CD, shared_b1_C, shared_w2_DC, None, activation)
        if ln_w_ED is None:
            return z_tD
        ln_b_D = None if ln_b_ED is None else ln_b_ED[e]
        return functional.layer_norm(z_tD + r_TD[tokens], z_tD.shape[1:], ln_w_ED[e], ln_b_D, ln_eps)

    y_TD = torch.zeros_like(x_TD)
    for k in range(top_k):
        for e in range(num_experts):
            tokens = (expert_ids_TK[:, k] == e).nonzero()[:, 0]
            o_tD = expert(e, tokens)
            g_t = o_tD.new_full(tokens.shape, 1 / top_k) if gate_TK is None else gate_TK[tokens, k]
            y_TD = y_TD.index_add(0, tokens, g_t[:, None] * o_tD)

    if norm:
        has_no_expert_T = (expert_ids_TK < 0).all(dim=1)
        y_TD = torch.where(has_no_expert_T[:, None], r_TD, y_TD)
    return y_TD
