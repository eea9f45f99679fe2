"""MoEFFN: the expert feed-forward network as a layer for any model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels.activations import check_activation
from moebert_kernels.checks import check_mask, check_number, check_tensor, check_whole
from moebert_kernels.ops import moe_ffn
from moebert_kernels.routing.plan import RoutingPlan
from moebert_kernels.routing.routers import RouterOutput, SentenceGate, TokenGate

# What parameters were once called: state dicts with these names still load.
FORMER_NAMES = {
    "b1_EF": "bias1_EF",
    "b2_ED": "bias2_ED",
    "ln_w_ED": "layernorm_weight_ED",
    "ln_b_ED": "layernorm_bias_ED",
}


class MoEFFN(nn.Module):
    """E feed-forward networks of F neurons, of which each token uses K.

    Plain, it replaces `Linear -> activation -> Linear -> Dropout`. With `norm_eps` it replaces a post-LN
    block's whole second half, `LayerNorm(dropout(ffn(x)) + x)`, each expert with a LayerNorm of its own, as
    in the authors' code. See `moe_ffn` for the formula.

    Example:
        >>> table = hash_random_tables(1, vocab_size=30522, num_experts=4)[0]
        >>> ffn = MoEFFN(768, 768, 4, router=HashRouter(table, num_experts=4))
        >>> y = ffn(x, input_ids=input_ids, mask=attention_mask)  # x: [batch, sequence, 768]

    Args:
        hidden_size: D.
        expert_size: F, the neurons of one expert.
        num_experts: E.
        num_shared: C of an expert's neurons that are the same in all experts and stored once; 0 for none.
        router: decides which expert a token uses: `HashRouter`, `TokenGate`, `SentenceGate` or a module
            called like them. None if every call brings a plan.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        bias: whether the two linear maps have biases.
        norm_eps: add the input and normalise, per expert, with this epsilon; None for the plain form.
        dropout: probability, applied to the experts' output in training.
        device: of the parameters, as for `nn.Linear`.
        dtype: of the parameters, as for `nn.Linear`.

    Attributes:
        w1_EFD, bias1_EF, w2_EDF, bias2_ED: the experts, rows as in `nn.Linear`; no biases are None. F counts
            the neurons that are an expert's own, `expert_size - num_shared`.
        shared_w1_CD, shared_bias1_C, shared_w2_DC: the neurons of all experts; None where there are none.
        layernorm_weight_ED, layernorm_bias_ED: their LayerNorms; None in the plain form.

    Rules that tell by names what weight decay is for, as that of transformers' `Trainer`, find the matrices
    alone. State dicts from before the biases and LayerNorms had these names load, too.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a size or probability is out of range, the activation unknown, or the router is for
            another number of experts or another hidden size.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        num_shared: int = 0,
        router: nn.Module | None = None,
        activation: str = "gelu",
        bias: bool = True,
        norm_eps: float | None = None,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (
            ("hidden_size", hidden_size),
            ("expert_size", expert_size),
            ("num_experts", num_experts),
        ):
            check_whole(name, size, least=1)
        check_whole("num_shared", num_shared, least=0)
        if num_shared >= expert_size:
            raise ValueError(
                f"num_shared must be less than expert_size={expert_size}, for experts to have neurons of "
                f"their own, got {num_shared}"
            )
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        check_activation(activation)
        if norm_eps is not None:
            check_number("norm_eps", norm_eps)
            if not norm_eps >= 0:
                raise ValueError(f"norm_eps must not be negative, got {norm_eps}")
        if router is not None and not isinstance(router, nn.Module):
            raise TypeError(
                "router must be a module such as HashRouter, TokenGate or SentenceGate, got "
                f"{type(router).__name__} {router!r}"
            )
        routed = getattr(router, "num_experts", num_experts)
        if routed != num_experts:
            raise ValueError(f"router is for {routed} experts, but num_experts is {num_experts}")
        if isinstance(router, TokenGate | SentenceGate) and router.hidden_size != hidden_size:
            raise ValueError(
                f"router is for hidden_size={router.hidden_size}, but hidden_size is {hidden_size}"
            )
        self.hidden_size = hidden_size
        self.expert_size = expert_size
        self.num_experts = num_experts
        self.num_shared = num_shared
        self.activation = activation
        self.norm_eps = norm_eps
        self.dropout = dropout
        self.router = router

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        E, C, D = num_experts, num_shared, hidden_size
        F_ = expert_size - C
        self.w1_EFD = parameter(E, F_, D)
        self.w2_EDF = parameter(E, D, F_)
        self.bias1_EF = parameter(E, F_) if bias else None
        self.bias2_ED = parameter(E, D) if bias else None
        self.layernorm_weight_ED = parameter(E, D) if norm_eps is not None else None
        self.layernorm_bias_ED = parameter(E, D) if norm_eps is not None else None
        self.shared_w1_CD = parameter(C, D) if C else None
        self.shared_bias1_C = parameter(C) if C and bias else None
        self.shared_w2_DC = parameter(D, C) if C else None
        self.register_load_state_dict_pre_hook(_rename_former)
        self._kept: tuple[torch.dtype, list[tuple[tuple[int, int], Tensor] | None]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every expert as `nn.Linear` and `nn.LayerNorm` initialise themselves."""
        with torch.no_grad():
            for inputs, weights in (
                (self.hidden_size, (self.w1_EFD, self.bias1_EF, self.shared_w1_CD, self.shared_bias1_C)),
                (self.expert_size, (self.w2_EDF, self.bias2_ED, self.shared_w2_DC)),
            ):
                for weight in weights:
                    if weight is not None:
                        weight.uniform_(-(inputs**-0.5), inputs**-0.5)
            if self.layernorm_weight_ED is not None and self.layernorm_bias_ED is not None:
                self.layernorm_weight_ED.fill_(1)
                self.layernorm_bias_ED.zero_()

    def forward(
        self,
        x: Tensor,
        *,
        input_ids: Tensor | None = None,
        mask: Tensor | None = None,
        routing: RouterOutput | RoutingPlan | None = None,
    ) -> Tensor:
        """Apply to `x` [..., D]; leading axes are flattened to T tokens and restored.

        Args:
            x: the input, and the residual when there is a norm.
            input_ids: leading shape of x; read by a `HashRouter`.
            mask: leading shape of x, nonzero at real tokens; the others use no expert.
            routing: a decision already made, such as a plan shared by layers, in the place of `input_ids` and
                `mask`: the router is not asked.

        Raises:
            TypeError: `routing` is neither a `RoutingPlan` nor a `RouterOutput`, or something else no tensor.
            ValueError: neither `routing` nor a router is at hand, or something for the router beside
                `routing`; shapes do not fit; or `x` has no values, on the meta device.
        """
        check_tensor("x", x)
        shape = x.shape
        if not shape or shape[-1] != self.hidden_size:
            raise ValueError(f"x must end in hidden_size={self.hidden_size}, got shape {tuple(shape)}")
        if x.is_meta:
            raise ValueError("x must have values to be computed with, got a tensor on the meta device")
        if routing is None:
            routing = self.route(x, input_ids=input_ids, mask=mask)
        else:
            _check_routing(routing, input_ids, mask)
        plan, gate_TK = (routing, None) if isinstance(routing, RoutingPlan) else routing[:2]
        dropout_p = self.dropout if self.training else 0.0
        weight_ED, bias_ED = self.layernorm_weight_ED, self.layernorm_bias_ED
        norm = None if weight_ED is None or bias_ED is None else (weight_ED, bias_ED)
        *of_experts, w1_CD, b1_C, w2_DC = self._experts(x)
        y_TD = moe_ffn(
            x.reshape(-1, self.hidden_size),
            plan,
            *of_experts,
            gate_TK=gate_TK,
            activation=self.activation,
            norm=norm,
            norm_eps=self.norm_eps or 0.0,
            dropout_p=0.0 if norm is None else dropout_p,
            shared=None if w1_CD is None else (w1_CD, b1_C, w2_DC),
        )
        if norm is None and dropout_p:
            y_TD = F.dropout(y_TD, dropout_p)
        return y_TD.view_as(x)

    def route(
        self, x: Tensor, *, input_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> RouterOutput:
        """Ask the router alone: for callers who need the load-balance loss beside the output.

        The arguments are those of `forward`.

        Example:
            >>> routing = ffn.route(x, mask=attention_mask)
            >>> loss = task_loss(ffn(x, routing=routing)) + 0.01 * routing.balance_loss

        Raises:
            ValueError: there is no router, or `input_ids` or `mask` do not have the leading shape of x.
        """
        if self.router is None:
            raise ValueError("this MoEFFN has no router: pass routing=, a RoutingPlan or a RouterOutput")
        for name, tensor in (("input_ids", input_ids), ("mask", mask)):
            if tensor is None:
                continue
            (check_mask if name == "mask" else check_tensor)(name, tensor)
            if tensor.shape != x.shape[:-1]:
                leading = tuple(x.shape[:-1])
                raise ValueError(
                    f"{name} must have the leading shape of x, {leading}, got {tuple(tensor.shape)}"
                )
        return self.router(x, input_ids, mask)

    def keep_casts(self, dtype: torch.dtype | None) -> None:
        """Cast the experts' weights and biases once, for calls without gradients under autocast to `dtype`.

        Autocast casts them in every call, as it does for `nn.Linear`; with few tokens that costs more than
        the layer, and a CUDA graph does it again at every replay. The casts take memory beside the
        parameters. A parameter that is replaced or written to later is cast in every call again; a write
        through `.data`, and any between replays of a graph, cannot be seen: call this after it, and capture
        the graph anew. Compiled code does not use the casts.

        Args:
            dtype: torch.bfloat16 or torch.float16; None gives the casts up.

        Example:
            >>> ffn.keep_casts(torch.bfloat16)
            >>> with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            ...     y = ffn(x, input_ids=input_ids)
        """
        self._kept = None
        if dtype is None:
            return
        casts = [
            None if p is None or p.dtype == torch.float64 else (_state(p), p.detach().to(dtype))
            for p in self._parameters_to_cast()
        ]
        self._kept = (dtype, casts)

    def _experts(self, x: Tensor) -> list[Any]:
        """w1, b1, w2 and b2, and the shared three, each by its kept cast where that can be used with x."""
        parameters = self._parameters_to_cast()
        if self._kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return parameters
        dtype, casts = self._kept
        device = x.device.type
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != dtype:
            return parameters
        return [
            cast[1] if p is not None and cast is not None and cast[0] == _state(p) else p
            for p, cast in zip(parameters, casts, strict=True)
        ]

    def _parameters_to_cast(self) -> list[Any]:
        shared = (self.shared_w1_CD, self.shared_bias1_C, self.shared_w2_DC)
        return [self.w1_EFD, self.bias1_EF, self.w2_EDF, self.bias2_ED, *shared]

    def extra_repr(self) -> str:
        """Sizes, as in the constructor."""
        return (
            f"hidden_size={self.hidden_size}, expert_size={self.expert_size}, "
            f"num_experts={self.num_experts}, num_shared={self.num_shared}, activation={self.activation!r}, "
            f"norm_eps={self.norm_eps}, dropout={self.dropout}"
        )


def _state(parameter: Tensor) -> tuple[int, int]:
    """Changes when a parameter gets other memory, or is written to by what autograd can see."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _rename_former(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: object) -> None:
    """Before a state dict is loaded, give what it has under former names those of today."""
    for former, name in FORMER_NAMES.items():
        if prefix + former in state_dict and prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + former)


def _check_routing(routing: object, input_ids: Tensor | None, mask: Tensor | None) -> None:
    """Refuse what is no decision about one layer, and what its router would have been asked with."""
    if not isinstance(routing, RoutingPlan) and not isinstance(routing, RouterOutput):
        found, hint = type(routing).__name__, ""
        if isinstance(routing, tuple | list) and any(isinstance(part, RoutingPlan) for part in routing):
            found = f"a {found} of length {len(routing)}"
            hint = "; RoutingPlan.from_input_ids gives one plan per layer: pass this layer's"
        raise TypeError(f"routing must be a RoutingPlan or a RouterOutput, got {found}{hint}")
    for name, value in (("input_ids", input_ids), ("mask", mask)):
        if value is not None:
            raise ValueError(f"{name} goes to the router, which routing replaces: pass one of the two")
