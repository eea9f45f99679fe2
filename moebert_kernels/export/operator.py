"""The one operator of an exported encoder: experts on rows that are sorted by expert.

Its fake output has the shape of its rows, so that no size which data decide is met when it is traced; its
translation is standard ONNX without If or Loop, each expert's matrices left as tensors of their own, which
runtimes prepack and quantizers recognise. `moe_ffn`, which trains, keeps all experts in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from moebert_kernels.activations import activate


@library.custom_op(
    "moebert_kernels::sorted_experts",
    mutates_args=(),
    schema=(
        "(Tensor x_SD, Tensor counts_E, Tensor[] w1_DF, Tensor[] b1_F, Tensor[] w2_FD, Tensor[] b2_D, "
        "Tensor[] ln_w_D, Tensor[] ln_b_D, Tensor[] shared, str activation, float norm_eps) -> Tensor"
    ),
)
def sorted_experts(
    x_SD: Tensor,
    counts_E: Tensor,
    w1_DF: Sequence[Tensor],
    b1_F: Sequence[Tensor],
    w2_FD: Sequence[Tensor],
    b2_D: Sequence[Tensor],
    ln_w_D: Sequence[Tensor],
    ln_b_D: Sequence[Tensor],
    shared: Sequence[Tensor],
    activation: str,
    norm_eps: float,
) -> Tensor:
    """`LayerNorm_e(act(x w1_e + b1_e) w2_e + b2_e + r)` for the rows of each expert e.

    r is x, plus the same of neurons that all experts share: one dense product over all rows.

    Args:
        x_SD: rows, those of expert 0 first, then those of expert 1, and so on.
        counts_E: int64, how many rows each expert has; they add up to S.
        w1_DF: of each expert.
        b1_F: of each expert.
        w2_FD: of each expert.
        b2_D: of each expert.
        ln_w_D: weight of each expert's LayerNorm.
        ln_b_D: its bias.
        shared: w1 [D, C], b1 [C], w2 [C, D] of the shared neurons; empty without any.
        activation: as `MoEFFN` names it.
        norm_eps: added to the variance.

    Returns:
        [S, D], in the order of x.
    """
    rows: list[Tensor] = []
    counts, r_SD = counts_E.tolist(), x_SD
    if shared:
        w1_DC, b1_C, w2_CD = shared
        r_SD = torch.addmm(x_SD, activate(activation, torch.addmm(b1_C, x_SD, w1_DC)), w2_CD)
    tensors = (w1_DF, b1_F, w2_FD, b2_D, ln_w_D, ln_b_D)
    for x, r, w1, b1, w2, b2, ln_w, ln_b in zip(
        x_SD.split(counts), r_SD.split(counts), *tensors, strict=True
    ):
        z = torch.addmm(b2, activate(activation, torch.addmm(b1, x, w1)), w2) + r
        rows.append(F.layer_norm(z, b2.shape, ln_w, ln_b, norm_eps))
    return torch.cat(rows)


@sorted_experts.register_fake
def _(x_SD, *_):
    return x_SD.new_empty(x_SD.shape)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`."""
    from onnxscript import opset18

    op: Any = opset18

    def translate(x_SD, counts_E, w1_DF, b1_F, w2_FD, b2_D, ln_w_D, ln_b_D, shared, activation, norm_eps):
        num_experts = len(w1_DF)

        def parts(rows_SD):
            # With its lengths given, Split has no num_outputs in ONNX; `graph.build` takes it off the node.
            if num_experts == 1:
                return [rows_SD]
            return op.Split(rows_SD, counts_E, axis=0, num_outputs=num_experts)

        xs = rs = parts(x_SD)
        if shared:
            w1_DC, b1_C, w2_CD = shared
            hidden = _activation(op, activation, op.Add(op.MatMul(x_SD, w1_DC), b1_C))
            rs = parts(op.Add(op.MatMul(hidden, w2_CD), x_SD))
        rows = []
        for x, r, w1, b1, w2, b2, ln_w, ln_b in zip(
            xs, rs, w1_DF, b1_F, w2_FD, b2_D, ln_w_D, ln_b_D, strict=True
        ):
            hidden = _activation(op, activation, op.Add(op.MatMul(x, w1), b1))
            z = op.Add(op.Add(op.MatMul(hidden, w2), b2), r)
            rows.append(op.LayerNormalization(z, ln_w, ln_b, axis=-1, epsilon=norm_eps)[0])
        return rows[0] if num_experts == 1 else op.Concat(*rows, axis=0)

    def gelu(self, approximate: str = "none"):
        return _activation(op, "gelu" if approximate == "none" else "gelu_tanh", self)

    def index_select(self, dim: int, index):
        return op.Gather(self, index, axis=dim)

    def unbind(self, dim: int = 0):
        if dim or len(self.shape) != 2:
            raise NotImplementedError(f"unbind of {self.shape} along {dim}")
        flat = op.Reshape(self, op.Constant(value_ints=[-1]))
        return op.Split(flat, axis=0, num_outputs=self.shape[0]) if self.shape[0] > 1 else [flat]

    aten = torch.ops.aten
    return {
        torch.ops.moebert_kernels.sorted_experts.default: translate,
        # Where the exporter's own forms are not fused by runtimes, or take more operators than are needed.
        aten.gelu.default: gelu,
        aten.index_select.default: index_select,
        aten.unbind.int: unbind,
    }


def _activation(op: Any, name: str, h: Any) -> Any:
    """In the forms that runtimes know to fuse."""
    if name == "gelu":
        erf = op.Erf(op.Div(h, op.Constant(value_float=2**0.5)))
        return op.Mul(op.Mul(h, op.Add(erf, op.Constant(value_float=1.0))), op.Constant(value_float=0.5))
    if name == "gelu_tanh":
        cube = op.Mul(op.Mul(h, op.Mul(h, h)), op.Constant(value_float=0.044715))
        inner = op.Tanh(op.Mul(op.Add(h, cube), op.Constant(value_float=(2 / torch.pi) ** 0.5)))
        return op.Mul(op.Mul(h, op.Add(inner, op.Constant(value_float=1.0))), op.Constant(value_float=0.5))
    if name == "relu":
        return op.Relu(h)
    return op.Mul(h, op.Sigmoid(h))
