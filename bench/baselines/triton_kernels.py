"""triton_kernels, of Triton's repository: ragged GEMMs with everything fused but the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import DidNotRun
from .from_source import load
from .implementation import FFNInputs, Implementation, weights_of


class _Ragged(NamedTuple):
    metadata: Any
    order_S: Tensor
    tokens_S: Tensor


def triton_kernels(inputs: FFNInputs, peer_path: str | None) -> Implementation:
    """Its `matmul` twice. The sort is torch's, for its own begins at a gate's logits; biases are float32."""
    device = inputs.x_TD.device
    matmul = load("triton_kernels", "triton_kernels.matmul", peer_path, device, interpreted=False)
    tensor = load("triton_kernels", "triton_kernels.tensor", peer_path, device, interpreted=False)
    activation = matmul.FusedActivation(matmul.FnSpecs("gelu", _gelu(), ()), ())
    precision = matmul.PrecisionConfig(allow_tf32=torch.backends.cuda.matmul.fp32_precision == "tf32")
    E, K = inputs.case.E, inputs.case.K
    leaves = weights_of(inputs)
    b1_EF, b2_ED = leaves["b1"].float(), leaves["b2"].float()

    def dispatch() -> _Ragged:
        experts_S, order_S = inputs.expert_ids_TK.flatten().sort(stable=True)
        order_S = order_S.int()
        bounds_E1 = torch.arange(E + 1, device=experts_S.device)
        counts_E = torch.searchsorted(experts_S, bounds_E1, out_int32=True).diff()
        metadata = tensor.make_ragged_tensor_metadata(counts_E, experts_S.shape[0])
        return _Ragged(metadata, order_S, order_S // K)

    def compute(x_TD: Tensor, ragged: _Ragged) -> Tensor:
        if torch.is_grad_enabled():
            raise DidNotRun("has no backward pass")
        a_SF = matmul.matmul(
            x_TD,
            leaves["w1"].mT,
            b1_EF,
            a_ragged_metadata=ragged.metadata,
            gather_indx=ragged.tokens_S,
            precision_config=precision,
            fused_activation=activation,
        )
        z_SD = matmul.matmul(
            a_SF,
            leaves["w2"].mT,
            b2_ED,
            a_ragged_metadata=ragged.metadata,
            scatter_indx=ragged.order_S,
            precision_config=precision,
        )
        return z_SD if K == 1 else z_SD.view(-1, K, z_SD.shape[1]).mean(1)

    return Implementation(dict(leaves), dispatch, compute)


def _gelu() -> Any:
    from .triton_gelu import gelu

    return gelu
