"""Fitting: after the cut, an expert's second map is chosen anew by ridge least squares. Not in the paper.

Most of a layer's neurons are gone, and the second map W2 is still what it was with them. Given what a
student's expert has for a token t, its hidden activations a_t and its residual input x_t, and what the
teacher's layer has for it, the sum s_t = z(x^tea_t) + x^tea_t before its LayerNorm, the best W, b make

    sum_t weight_t | W a_t + b + x_t - s_t |^2  +  lambda (| W - W2 |^2 + | b - b2 |^2)

smallest, over the tokens t that go to the expert. The LayerNorm divides s_t by its standard deviation, so an
error counts as after it if weight_t = 1 / (variance of s_t + eps).
"""

import torch
from torch import Tensor


def token_weights(s_TD: Tensor, ln_eps: float) -> Tensor:
    """What a squared error of s_t is worth after the LayerNorm; [T]."""
    return 1 / (s_TD.var(dim=1, unbiased=False) + ln_eps)


def strength(a_TF: Tensor, weight_T: Tensor, ridge: float, rare: float) -> float:
    """lambda: the mean squared activation of a neuron, over all tokens, times ridge + rare F / T.

    With many tokens it grows with them and ridge alone decides; an expert with few, for its F neurons, leans
    on what it was.
    """
    num_tokens, num_neurons = a_TF.shape
    energy = (weight_T[:, None] * a_TF**2).sum() / num_neurons
    return float(energy) * (ridge + rare * num_neurons / num_tokens)


def fit_output(
    a_TF: Tensor, r_TD: Tensor, weight_T: Tensor, w2_DF: Tensor, b2_D: Tensor, lambda_: float
) -> tuple[Tensor, Tensor]:
    """The W, b of the module's formula, with r_t = s_t - x_t, by the normal equations.

    Args:
        a_TF: hidden activations of the expert's tokens.
        r_TD: what W a_t + b should be.
        weight_T: see `token_weights`; under a gate, times its probability squared.
        w2_DF: the second map as it is.
        b2_D: its bias.
        lambda_: see `strength`.

    Returns:
        w2_DF and b2_D, fitted.
    """
    a_TG = torch.cat([a_TF, torch.ones_like(a_TF[:, :1])], dim=1)  # G = F + 1: the bias is a neuron that is 1
    w2_DG = torch.cat([w2_DF, b2_D[:, None]], dim=1)
    products_GG = a_TG.T @ (weight_T[:, None] * a_TG)
    wanted_DG = r_TD.T @ (weight_T[:, None] * a_TG)
    eye_GG = torch.eye(len(products_GG), dtype=a_TF.dtype)
    fitted_DG = torch.linalg.solve(products_GG + lambda_ * eye_GG, (wanted_DG + lambda_ * w2_DG).T).T
    return fitted_DG[:, :-1], fitted_DG[:, -1]


def fit_tied_output(
    a_TF: Tensor,
    expert_T: Tensor,
    r_TD: Tensor,
    weight_T: Tensor,
    shared_w2_DC: Tensor,
    w2_EDF: Tensor,
    b2_ED: Tensor,
    lambda_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """All experts of a layer at once, where they share C neurons: the module's formula, summed over experts.

    Every expert's W begins with the same C columns, which so are held by the sum of all lambda. One without
    tokens stays as it is.

    Args:
        a_TF: hidden activations of all tokens, each its expert's: the shared C, then the expert's own.
        expert_T: of each token.
        r_TD: as for `fit_output`.
        weight_T: as for `fit_output`.
        shared_w2_DC: columns of the second map that are the same in all experts, as they are.
        w2_EDF: each expert's own columns, as they are.
        b2_ED: biases, as they are.
        lambda_E: see `strength`; C + F neurons in all.

    Returns:
        shared_w2_DC, w2_EDF and b2_ED, fitted.
    """
    (E, _, F), C = w2_EDF.shape, shared_w2_DC.shape[1]
    of_expert_TE = (expert_T[:, None] == torch.arange(E)).to(a_TF.dtype)
    own_TEF = of_expert_TE[:, :, None] * a_TF[:, None, C:]
    a_TN = torch.cat([a_TF[:, :C], own_TEF.flatten(1), of_expert_TE], dim=1)  # N = C + E F + E
    w_DN = torch.cat([shared_w2_DC, w2_EDF.transpose(0, 1).flatten(1), b2_ED.T], dim=1)
    has_tokens_E = of_expert_TE.any(0)
    shared_lambda, own_lambda_E = lambda_E[has_tokens_E].sum(), torch.where(has_tokens_E, lambda_E, 1)
    held_N = torch.cat([shared_lambda.expand(C), own_lambda_E.repeat_interleave(F), own_lambda_E])
    products_NN = a_TN.T @ (weight_T[:, None] * a_TN) + held_N.diag()
    wanted_DN = r_TD.T @ (weight_T[:, None] * a_TN) + held_N * w_DN
    fitted_DN = torch.linalg.solve(products_NN, wanted_DN.T).T
    own_DEF = fitted_DN[:, C:-E].unflatten(1, (E, F))
    return fitted_DN[:, :C], own_DEF.transpose(0, 1), fitted_DN[:, -E:].T


def weighted_error(a_TF: Tensor, r_TD: Tensor, weight_T: Tensor, w2_DF: Tensor, b2_D: Tensor) -> Tensor:
    """The first sum of the module's formula."""
    return (weight_T * (a_TF @ w2_DF.T + b2_D - r_TD).square().sum(dim=1)).sum()


def gate_scale(y_TD: Tensor, teacher_TD: Tensor) -> Tensor:
    """The c for which c y_t is nearest to the teacher's layer output, over all tokens.

    A learned gate multiplies an expert's output by a probability, which makes a student's hidden states a
    fraction of the teacher's: c, put into the LayerNorms of a layer's experts, undoes that.
    """
    return (y_TD * teacher_TD).sum() / y_TD.square().sum()
