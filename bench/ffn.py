"""The expert FFN: forward and backward, with the dispatch given, and with it inside."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moebert_kernels import RoutingPlan, moe_ffn

from .baselines import authors, dense, scattermoe, torch_gemms, triton_kernels
from .baselines.implementation import (
    NORM_EPS,
    PASSES,
    FFNInputs,
    Implementation,
    Make,
    bind,
    norm_of,
    weights_of,
    with_norm,
)
from .baselines.transformers_experts import implementations
from .cases import (
    DTYPES,
    TIMED_ROUTINGS,
    TIMED_TOKENS,
    FFNCase,
    Request,
    cpu_dtypes,
    expert_ids,
    num_shared,
    tensors,
)
from .ceilings import Ceiling
from .options import TAKES
from .reference import specification
from .registry import Entry, Op, Work
from .verify import check_close

OURS, TIED = "moebert_kernels", "moebert_kernels tied"
DENSE, BOUND = "dense FFN replaced", "bound: one expert"
# torch's LayerNorm on the CPU sums its parameters' bfloat16 gradients in bfloat16: 16 % off at 16384 tokens.
_NORM_SLACK = 3.0


def cases(request: Request, device_type: str) -> list[FFNCase]:
    """All token counts balanced; of other routings, if they are asked for, the middle ones.

    Raises:
        ValueError: more experts are asked for each token than there are.
    """
    gpu = device_type == "cuda"
    tokens = request.T or (TIMED_TOKENS if gpu else (64, 512, 2048))
    dtypes = request.dtypes or (("bfloat16",) if gpu else cpu_dtypes())
    middle = tokens[len(tokens) // 2 :][:2] if gpu else tokens[len(tokens) // 2 :][:1]
    chosen = []
    for sizes in request.sizes("D", "F", "E", "K", "norm"):
        for dtype in dtypes:
            for routing in request.routings or TIMED_ROUTINGS[:1]:
                skewed = routing != "balanced" and request.T is None
                for count in middle if skewed else tokens:
                    chosen.append(FFNCase(count, **sizes, dtype=dtype, routing=routing))
    if many := [case for case in chosen if case.K > case.E]:
        raise ValueError(f"top_k must be at most the number of experts, {many[0].E}, got {many[0].K}")
    return list(dict.fromkeys(chosen))


def make_inputs(case: FFNCase, device: torch.device, seed: int) -> FFNInputs:
    """The data of a case, as the tests draw it."""
    dtype = DTYPES[case.dtype]
    made = {name: tensor.to(dtype).to(device) for name, tensor in tensors(case, seed=seed).items()}
    return FFNInputs(
        case=case,
        x_TD=made["x"],
        dy_TD=made["dy"],
        w1_EFD=made["w1"],
        b1_EF=made["b1"],
        w2_EDF=made["w2"],
        b2_ED=made["b2"],
        expert_ids_TK=expert_ids(case, seed=seed).to(device),
        gate_TK=torch.full((case.T, case.K), 1 / case.K, device=device, dtype=dtype),
        ln_w_ED=made.get("ln_w"),
        ln_b_ED=made.get("ln_b"),
    )


def ours(inputs: FFNInputs) -> Implementation:
    """`moe_ffn` with the plan of `RoutingPlan.from_expert_ids`."""
    leaves, norm = weights_of(inputs), norm_of(inputs)
    scale_and_shift = (norm["ln_w"], norm["ln_b"]) if norm else None

    def dispatch() -> RoutingPlan:
        return RoutingPlan.from_expert_ids(inputs.expert_ids_TK, inputs.case.E)

    def compute(x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        weights = (leaves["w1"], leaves["b1"], leaves["w2"], leaves["b2"])
        return moe_ffn(x_TD, plan, *weights, norm=scale_and_shift, norm_eps=NORM_EPS)

    return Implementation({**leaves, **norm}, dispatch, compute)


def tied(inputs: FFNInputs) -> Implementation:
    """`moe_ffn` with two thirds of each expert the first expert's, stored once."""
    plain, C = ours(inputs), num_shared(inputs.case.F)
    leaves: dict[str, Any] = plain.parameters
    own = {"w1": leaves["w1"][:, C:], "b1": leaves["b1"][:, C:], "w2": leaves["w2"][:, :, C:]}
    shared = {"shared_w1": leaves["w1"][0, :C], "shared_b1": leaves["b1"][0, :C]}
    shared["shared_w2"] = leaves["w2"][0, :, :C]
    leaves = {**leaves, **{name: leaf.contiguous() for name, leaf in (own | shared).items()}}

    def compute(x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        w1, b1, w2, b2, *rest = leaves.values()
        *norm, shared_w1, shared_b1, shared_w2 = rest
        scale_and_shift, shared = tuple(norm) or None, (shared_w1, shared_b1, shared_w2)
        how: Any = {"norm": scale_and_shift, "norm_eps": NORM_EPS, "shared": shared}
        return moe_ffn(x_TD, plan, w1, b1, w2, b2, **how)

    return Implementation(leaves, plain.dispatch, compute)


def entries(peer_path: str | None) -> list[Entry]:
    """Ours, the networks it is measured by, and the peers."""

    def entry(name: str, make: Make, **options) -> Entry:
        return Entry(name, functools.partial(bind, make), **options)

    def peer(name: str, make: Make, **options) -> Entry:
        return entry(name, with_norm(make), **options)

    return [
        entry(OURS, ours),
        entry(TIED, tied, work="tied"),
        entry(DENSE, dense.replaced, work="dense"),
        entry(BOUND, dense.bound, work="bound"),
        entry("authors' loop", authors.authors_loop, dispatch="inside"),
        peer("GEMM per expert", torch_gemms.expert_gemms),
        peer("F.grouped_mm", torch_gemms.grouped_mm),
        *(peer(name, make, dispatch="inside") for name, make in implementations().items()),
        peer("masked dense", dense.masked, restore=dense.restore_masked),
        peer("triton_kernels", functools.partial(triton_kernels.triton_kernels, peer_path=peer_path)),
        peer("scattermoe", functools.partial(scattermoe.scattermoe, peer_path=peer_path)),
    ]


_EXPERTS = ("experts", "tied")  # works
_SHARED = ("shared_w1", "shared_b1", "shared_w2")
_COMPARED = {"dense": dense.replaced, "bound": dense.bound, "tied": tied}


def reference(inputs: FFNInputs, pass_: str, kind: str) -> dict[str, Tensor]:
    """The pass in float64 by `python_ref`."""
    ref = specification("ffn")
    if kind == "experts":
        leaves = weights_of(inputs) | norm_of(inputs)
    else:
        made = _COMPARED[kind](inputs)
        leaves = {name: leaf for name, leaf in made.parameters.items() if isinstance(leaf, Tensor)}
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    x_TD = inputs.x_TD.double().requires_grad_()
    weights = (leaves["w1"], leaves["b1"], leaves["w2"], leaves["b2"])
    ln_w, ln_b = leaves.get("ln_w"), leaves.get("ln_b")
    if kind in _EXPERTS:
        norm = {"ln_w_ED": ln_w, "ln_b_ED": ln_b, "ln_eps": NORM_EPS}
        shared = tuple(leaves[name] for name in _SHARED) if kind == "tied" else None
        y_TD = ref.moe_ffn(x_TD, inputs.expert_ids_TK, *weights, **norm, shared=shared)
    else:
        y_TD = ref.dense_ffn(x_TD, *weights)
        if ln_w is not None:
            y_TD = functional.layer_norm(y_TD + x_TD, x_TD.shape[1:], ln_w, ln_b, NORM_EPS)
    outputs = {"y": y_TD.detach()}
    if pass_.endswith("backward"):
        grads = torch.autograd.grad(y_TD, [x_TD, *leaves.values()], inputs.dy_TD.double())
        outputs |= dict(zip(("dx", *(f"d{name}" for name in leaves)), grads, strict=True))
    return outputs


def check(
    outputs: dict[str, Tensor], expected: dict[str, Tensor], inputs: FFNInputs, kind: str
) -> dict[str, float]:
    """Every output, and every expert's share of it, against the reference."""
    first_T = inputs.expert_ids_TK[:, 0]

    def parts(name: str, tensor: Tensor) -> list[Tensor]:
        if name in ("y", "dx"):
            return [tensor[first_T == e] for e in range(inputs.case.E)]
        return list(tensor) if kind in _EXPERTS and name[1:] not in _SHARED else [tensor]

    norms = {name: expected[name] for name in expected if name in ("dln_w", "dln_b")}
    others = {name: expected[name] for name in expected if name not in norms}
    dtype, sums = inputs.x_TD.dtype, ("dw1", "db1", "dw2", "db2", *norms, *(f"d{name}" for name in _SHARED))
    errors = check_close(outputs, others, dtype, parts, sums=sums)
    slack = 1.0 if kind in _EXPERTS else _NORM_SLACK  # what is torch's, and not what has experts
    return errors | check_close(outputs, norms, dtype, parts, sums=sums, slack=slack)


def work(inputs: FFNInputs, pass_: str, kind: str) -> Work:
    """Multiply-adds of the two projections, three times as many with backward; weights and rows moved once.

    Forward: the weights of the experts that have tokens, x and y. With backward: these weights again, their
    gradients, and dy, x and dx beside the pre-activations written and read; with a norm its input as well.
    """
    case, size = inputs.case, inputs.x_TD.element_size()
    T, D, F, K = case.T, case.D, case.F, case.K
    if kind in _EXPERTS:
        networks, neurons = int(inputs.expert_ids_TK.unique().numel()), K * F
    else:
        networks, neurons = 1, (case.E if kind == "dense" else K) * F
    stored = networks * (F if kind in _EXPERTS else neurons)
    if kind == "tied":
        stored -= (networks - 1) * num_shared(F)
    weights = (stored * (2 * D + 1) + networks * (3 * D if case.norm else D)) * size
    if pass_.endswith("backward"):
        normed = 2 * D * (K if kind in _EXPERTS else 1) if case.norm else 0
        return Work(12 * T * neurons * D, 3 * weights + T * (5 * D + 2 * neurons + normed) * size)
    return Work(4 * T * neurons * D, weights + 2 * T * D * size)


def predict(case: FFNCase, pass_: str, card: str, ceiling: Ceiling) -> float | None:
    """What the model of the machine expects of ours."""
    from .predictions import pass_us  # it knows of kernels, and what those import

    return pass_us(case, card, ceiling, pass_)


def footprint(inputs: FFNInputs) -> int:
    """Weights and tokens."""
    tensors = (inputs.x_TD, inputs.w1_EFD, inputs.w2_EDF)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


FFN = Op(
    name="ffn",
    takes=TAKES["ffn"],
    passes=PASSES,
    default_passes=PASSES[:2],
    cases=cases,
    make_inputs=make_inputs,
    entries=entries,
    reference=reference,
    check=check,
    work=work,
    footprint=footprint,
    baselines=(DENSE, BOUND),
    predict=predict,
)
