"""Calls of `moe_ffn` with every part it has, and the same by python_ref in float64."""

import torch

from moebert_kernels import moe_ffn
from python_ref import ffn as ref

INPUTS = ("x", "w1", "b1", "w2", "b2", "gate", "ln_w", "ln_b", "residual")


def make_inputs(T, D, F, E, K, *, seed=0, dtype=torch.float64, low=-1):
    """Data of unit scale: a wrong activation or bias cannot hide."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    tensors = {
        "x": randn(T, D),
        "w1": randn(E, F, D, scale=D**-0.5),
        "b1": randn(E, F),
        "w2": randn(E, D, F, scale=F**-0.5),
        "b2": randn(E, D),
        "gate": randn(T, K),
        "ln_w": randn(E, D),
        "ln_b": randn(E, D),
        "residual": randn(T, D),
    }
    return tensors, torch.randint(low, E, (T, K), generator=g)


def ours(t, plan, *, norm, gate, activation="gelu", **options):
    if norm:
        options |= {"norm": (t["ln_w"], t["ln_b"]), "residual_TD": t["residual"], "norm_eps": 1e-12}
    return moe_ffn(
        t["x"],
        plan,
        t["w1"],
        t["b1"],
        t["w2"],
        t["b2"],
        gate_TK=t["gate"] if gate else None,
        activation=activation,
        **options,
    )


def reference(t, ids, *, norm, gate, activation="gelu"):
    t = {k: None if v is None else v.double() for k, v in t.items()}
    norms = {"ln_w_ED": t["ln_w"], "ln_b_ED": t["ln_b"], "residual_TD": t["residual"]} if norm else {}
    gate_TK = t["gate"] if gate else None
    return ref.moe_ffn(
        t["x"], ids, t["w1"], t["b1"], t["w2"], t["b2"], gate_TK=gate_TK, activation=activation, **norms
    )


def used(norm, gate):
    return [n for n in INPUTS if (norm or n not in ("ln_w", "ln_b", "residual")) and (gate or n != "gate")]
