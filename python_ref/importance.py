"""Importance: what a neuron of a feed-forward layer is worth to the task."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def importance_by_sample_gradients(
    loss_of_sample: Callable[[int], Tensor],
    num_samples: int,
    ffn_weights: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Eq. 4: I_j = sum over samples of | <w1_j, dL/dw1_j> + <w2_j, dL/dw2_j> |.

    w1_j is row j of W1 and w2_j column j of W2, as nn.Linear stores them. The absolute value is taken per
    sample, of the sum of both products. Biases are not in it.

    Args:
        loss_of_sample: the loss L of sample i alone, a scalar with a graph back to every weight.
        num_samples: i runs from 0 to num_samples - 1.
        ffn_weights: (w1_FD, w2_DF) of each layer, the tensors that the loss was computed from.

    Returns:
        importance_LF.
    """
    importance_LF = torch.stack([w1_FD.new_zeros(w1_FD.shape[0]) for w1_FD, _ in ffn_weights])
    for i in range(num_samples):
        gradients = torch.autograd.grad(loss_of_sample(i), [w for pair in ffn_weights for w in pair])
        for layer, (w1_FD, w2_DF) in enumerate(ffn_weights):
            g1_FD, g2_DF = gradients[2 * layer : 2 * layer + 2]
            importance_LF[layer] += ((w1_FD * g1_FD).sum(dim=1) + (w2_DF * g2_DF).sum(dim=0)).detach().abs()
    return importance_LF


def importance_by_activations(
    h_TF: Tensor,
    dLdh_TF: Tensor,
    a_TF: Tensor,
    dLda_TF: Tensor,
    b1_F: Tensor | None,
    sample_of_token: Tensor,
) -> Tensor:
    """Eq. 4 for one layer from one backward pass over a batch, with L the sum of the samples' losses.

    With h = W1 x + b1, a = sigma(h), y = W2 a + b2 the chain rule gives, for a sample's own tokens t,

        dL/dw1_j = sum_t dL/dh_tj x_t,  so  <w1_j, dL/dw1_j> = sum_t dL/dh_tj (h_tj - b1_j)
        dL/dw2_j = sum_t dL/dy_t a_tj,  so  <w2_j, dL/dw2_j> = sum_t dL/da_tj a_tj

    and a token of one sample has no gradient from another sample's loss. Not in the paper or the authors'
    code, which takes two backward passes per layer and sample; equal to the definition above.

    Args:
        h_TF: before the activation, bias included.
        dLdh_TF: gradient of the summed loss at h.
        a_TF: after the activation.
        dLda_TF: gradient of the summed loss at a.
        b1_F: first bias, or None.
        sample_of_token: [T] integers, tokens with the same one belong to one sample.

    Returns:
        importance_F, this batch's share of the sum over samples.
    """
    w1x_TF = h_TF if b1_F is None else h_TF - b1_F
    product_TF = w1x_TF * dLdh_TF + a_TF * dLda_TF
    importance_F = h_TF.new_zeros(h_TF.shape[1])
    for sample in sample_of_token.unique():
        importance_F += product_TF[sample_of_token == sample].sum(dim=0).abs()
    return importance_F
