"""transformers' experts implementations, chosen as a model's configuration chooses them."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..registry import DidNotRun
from .implementation import FFNInputs, Implementation, Make, no_dispatch, weights_of

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_GATHERED_LIMIT = 3 * 2**29  # bytes on the CPU


@functools.cache
def _experts_class() -> type[nn.Module]:
    """The module whose implementation transformers chooses; imported when it is first asked for.

    Raises:
        DidNotRun: transformers is not installed, or too old.
    """
    try:
        from transformers.integrations.moe import use_experts_implementation
    except ImportError as error:
        raise DidNotRun(f"needs transformers: {error}") from error

    @use_experts_implementation(has_gate=False, has_bias=True)
    class _Experts(nn.Module):
        """Non-gated experts with biases, named as transformers reads them; its own forward is "eager"."""

        def __init__(self, config: SimpleNamespace, leaves: dict[str, Tensor]):
            super().__init__()
            self.num_experts = leaves["w1"].shape[0]
            self.act_fn = functional.gelu
            self.up_proj, self.up_proj_bias = leaves["w1"], leaves["b1"]
            self.down_proj, self.down_proj_bias = leaves["w2"], leaves["b2"]

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            """As transformers' models write it: a loop over the experts that were hit, added up by index."""
            y_TD = torch.zeros_like(hidden_states)
            with torch.no_grad():
                hits_EKT = functional.one_hot(top_k_index, self.num_experts).permute(2, 1, 0)
                hit = hits_EKT.sum((1, 2)).nonzero().flatten()
            for expert in hit:
                k, tokens = torch.where(hits_EKT[expert])
                h = functional.linear(hidden_states[tokens], self.up_proj[expert], self.up_proj_bias[expert])
                z = functional.linear(self.act_fn(h), self.down_proj[expert], self.down_proj_bias[expert])
                y_TD.index_add_(0, tokens, (z * top_k_weights[tokens, k, None]).to(y_TD.dtype))
            return y_TD

    return _Experts


def _make(name: str, inputs: FFNInputs) -> Implementation:
    if name == "batched_mm":
        _check_memory(inputs)
    leaves = weights_of(inputs)
    experts = _experts_class()(SimpleNamespace(_experts_implementation=name), leaves)

    def compute(x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        return experts(x_TD, expert_ids_TK, inputs.gate_TK)

    return Implementation(dict(leaves), no_dispatch(inputs), compute)


def _check_memory(inputs: FFNInputs) -> None:
    """`batched_mm` gathers both weight matrices of every slot: too much is refused before it is tried."""
    slots = inputs.expert_ids_TK.numel()
    gathered = 2 * slots * inputs.w1_EFD[0].numel() * inputs.w1_EFD.element_size()
    device = inputs.x_TD.device
    limit = torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else _GATHERED_LIMIT
    if gathered > limit:
        raise DidNotRun(
            f"gathers {gathered / 2**30:.1f} GiB of weights per pass (limit here {limit / 2**30:.1f})"
        )


def implementations() -> dict[str, Make]:
    """One entry for each of transformers' implementations."""
    return {f"transformers {name}": functools.partial(_make, name) for name in IMPLEMENTATIONS}
