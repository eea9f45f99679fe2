"""Fitting: a cut student's experts made to do, on the tokens that reach them, what the teacher's layers do.

The cut leaves every expert the output weights it had when all neurons were there. Ridge least squares chooses
them anew, layer by layer: `python_ref.fitting` has the formula. There is no training, no label is read, and
one pass of the teacher and one of the student is all that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels.activations import activate
from moebert_kernels.checks import check_number
from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.batching import LABEL_COLUMNS, row_lengths, sample_rows
from moebert_kernels.compress.experts.joint_ridge import solve
from moebert_kernels.compress.experts.layerwise import Layerwise, evaluating, forward_replaced
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models.families import DenseFFN, find_base, find_ffns
from moebert_kernels.models.modeling import MoELayer, MoEModel
from moebert_kernels.routing import RouterOutput

RIDGE = 0.03
RARE = 0.03
DEFAULT_LIMIT_BYTES = 2 << 30

_BLOCK_TOKENS = 16384


class Fitted(NamedTuple):
    """How much of each layer's output was wrong on the rows that were fitted to; what json can write.

    An error is the weighted sum of squares that is made small, in units of the variance of the teacher's
    output before its LayerNorm: 0.1 says that a tenth of what the LayerNorm puts out is error.

    Attributes:
        num_tokens: how many were fitted to, padding left out.
        cut_L: the errors of the experts as they were cut, on what the fitted layers before them give.
        fitted_L: of the fitted ones.
    """

    num_tokens: int
    cut_L: list[float]
    fitted_L: list[float]

    def told(self, num_rows: int) -> str:
        """What the fit has brought, in a sentence."""
        cut, fitted = (sum(error_L) / len(error_L) for error_L in (self.cut_L, self.fitted_L))
        return (
            f"fitted to {self.num_tokens:,} tokens of {num_rows:,} rows: the share of a layer's output that "
            f"is wrong was {cut:.1%} and is {fitted:.1%}"
        )


def rows_to_fit(
    rows: Dataset, count: int, seed: int, hidden_size: int, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> Dataset:
    """Draw rows at random whose hidden states take no more than `limit_bytes`.

    Student and teacher keep 4 D bytes each for a token of every row: 2 GiB hold 349,525 tokens of BERT-base's
    768, or 699,050 of MiniLM's 384. Beside them there are the two models, 8 E (F + 1) (F + 1 + D) bytes of
    sums, and blocks of 16,384 tokens that are worked on.

    Args:
        rows: tokenized.
        count: the most rows.
        seed: of the draw.
        hidden_size: D.
        limit_bytes: of the hidden states.

    Returns:
        At least one row.
    """
    order = np.random.default_rng(seed).permutation(len(rows))[:count]  # as sample_rows draws them
    ends = np.cumsum(np.asarray(row_lengths(rows))[order])
    return sample_rows(rows, max(int((8 * hidden_size * ends <= limit_bytes).sum()), 1), seed)


def fit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    ridge: float = RIDGE,
    rare: float = RARE,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Choose w2 and b2 of every expert anew, in place; see `python_ref.fitting` for the formula.

    A MoE's configuration records it, as `is_fitted`.

    Layer by layer, on the hidden states that the student itself has there: what earlier layers could not mend
    is mended by later ones. Under a learned gate, which makes hidden states smaller, the LayerNorms of a
    layer's experts are scaled too, by one number. Of a token's several experts each is fitted to do alone
    what the teacher does.

    Neurons that experts share are fitted for all of them together. On the rows it saw, no expert's weighted
    error is larger than before, or with shared neurons no layer's, summed over experts. The same batches
    give the same student to the last bit on one machine. Several processes (torchrun) take the batches in
    turn, add up their sums, collectively, and get one process's student but for rounding. Under autocast the
    models' products are computed in that dtype, and what is summed up and solved here in float32 or wider.

    Args:
        student: a MoE, or an encoder with narrower networks, made of the teacher: with as many layers, and
            any head on both, or none.
        teacher: dense; left as it is.
        batches: rows as the models take them, labels ignored, on any device; all of them in every process.
        ridge: how strongly weights are held to what they were, in units of the neurons' mean squared
            activation.
        rare: by how much more an expert's are that has few tokens: times neurons over tokens.
        progress: called with (batches done, batches in all), a batch counted once for every layer.

    Raises:
        ValueError: the student does not fit the teacher, there are no tokens, or a number is negative or 0.
    """
    for name, value in (("ridge", ridge), ("rare", rare)):
        check_number(name, value)
        if not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}")
    theirs, ours = find_ffns(teacher), _find_experts(student)
    if len(ours) != len(theirs):
        raise ValueError(
            f"student and teacher must have the same number of layers, got {len(ours)} and {len(theirs)}"
        )
    device = theirs[0].w1.weight.device
    mine = [
        {name: value.to(device) for name, value in batch.items() if name not in LABEL_COLUMNS}
        for batch in batches[distributed.rank() :: distributed.world_size()]
    ]
    layers = []
    with evaluating(student, teacher):
        teacher_run = Layerwise(find_base(teacher)[0], [ffn.layer for ffn in theirs], mine)
        student_run = Layerwise(_base_of(student), [experts.layer for experts in ours], mine)
        for index, (dense, experts) in enumerate(zip(theirs, ours, strict=True)):

            def report(done: int, index: int = index) -> None:
                if progress is not None:  # of what all processes do alike
                    done = min(done * distributed.world_size(), len(batches))
                    progress(index * len(batches) + done, len(theirs) * len(batches))

            layers.append(
                _fit_layer(index, dense, experts, teacher_run, student_run, mine, ridge, rare, report)
            )
    num_tokens, cut_L, fitted_L = zip(*layers, strict=True)
    if num_tokens[0] == 0:
        raise ValueError("batches hold no tokens: experts are fitted to rows of text")
    if isinstance(base := _base_of(student), MoEModel):
        base.config.is_fitted = True
    return Fitted(num_tokens[0], list(cut_L), list(fitted_L))


def _fit_layer(
    index: int,
    dense: DenseFFN,
    experts: _Experts,
    teacher_run: Layerwise,
    student_run: Layerwise,
    batches: Sequence[Mapping[str, Tensor]],
    ridge: float,
    rare: float,
    report: Callable[[int], None],
) -> tuple[int, float, float]:
    """Fit one layer and take all states past it; return the tokens, and the errors as cut and as fitted."""
    sums = _Sums(experts, dense.norm.eps)
    finish: list[Callable[[], Tensor]] = []
    for block in _blocks(batches):
        tokens = []
        for number in block:
            mask_BS = _mask(batches[number])
            with _caught_sums(dense.norm) as caught:
                teacher_run.states[number] = teacher_run.run(index, number)
            given = experts.inputs(student_run, index, number, mask_BS)
            student_run.states[number] = given.x_BSD
            finish.append(given.finish)
            tokens.append((given, torch.cat(caught, 1), mask_BS))
        with torch.autocast(dense.w1.weight.device.type, enabled=False):
            sums.add(tokens)
        report(block[-1] + 1)
    sums.add_up()
    with torch.autocast(dense.w1.weight.device.type, enabled=False):
        errors = sums.solve(ridge, rare)
    for number, compute in enumerate(finish):
        student_run.states[number] = compute()
    if experts.is_gated:
        _scale_outputs(experts, student_run.states, teacher_run.states, [_mask(batch) for batch in batches])
    return errors


def _scale_outputs(
    experts: _Experts,
    ours: list[Tensor | None],
    theirs: list[Tensor | None],
    masks: list[Tensor | None],
) -> None:
    """Undo what a gate's probabilities do to the size of a layer's output, on the whole."""
    products_2 = torch.zeros(2, dtype=torch.float64, device=experts.w2_EDF.device)
    for y_BSD, teacher_BSD, mask_BS in zip(ours, theirs, masks, strict=True):
        assert y_BSD is not None
        assert teacher_BSD is not None
        real = slice(None) if mask_BS is None else mask_BS != 0
        y_TD, teacher_TD = y_BSD[real].double(), teacher_BSD[real].double()
        products_2 += torch.stack([(y_TD * teacher_TD).sum(), y_TD.square().sum()])
    distributed.all_reduce(products_2)
    along, length = products_2.tolist()
    factor = along / length if along > 0 else 1.0
    experts.scale_norms(factor)
    for y_BSD, mask_BS in zip(ours, masks, strict=True):
        assert y_BSD is not None
        if mask_BS is None:
            y_BSD.mul_(factor)
        else:  # what uses no expert passes none of their LayerNorms
            y_BSD[mask_BS != 0] *= factor


class _Inputs(NamedTuple):
    """What a student's layer gives its experts, and how it goes on from there.

    Attributes:
        x_BSD: their input, and the residual.
        expert_TK: which of them each token uses; -1 for none.
        gate_TK: their probabilities; None if there are none.
        finish: gives the layer's hidden states with the weights as they are when it is called.
    """

    x_BSD: Tensor
    expert_TK: Tensor
    gate_TK: Tensor | None
    finish: Callable[[], Tensor]


class _Experts:
    """A student's layer as experts; a narrow dense network is the one expert of every token.

    An expert has N = C + F neurons, those that all share first. Without any, C is 0.
    """

    w1_EFD: Tensor
    b1_EF: Tensor
    w2_EDF: Tensor
    b2_ED: Tensor
    shared_w1_CD: Tensor
    shared_b1_C: Tensor
    shared_w2_DC: Tensor

    def __init__(self, layer: nn.Module, part: MoEFFN | DenseFFN):
        self.layer = layer
        self._part = part
        if isinstance(part, MoEFFN):
            if part.norm_eps is None or part.bias1_EF is None or part.bias2_ED is None:
                raise ValueError("student must have experts with biases and LayerNorms, as adapt makes them")
            self.w1_EFD, self.b1_EF = part.w1_EFD, part.bias1_EF
            self.w2_EDF, self.b2_ED = part.w2_EDF, part.bias2_ED
        else:  # views: what is written to them is written to the layer
            self.w1_EFD, self.b1_EF = part.w1.weight[None], part.w1.bias[None]
            self.w2_EDF, self.b2_ED = part.w2.weight[None], part.w2.bias[None]
        D = self.w1_EFD.shape[2]
        shared: Any = (self.w1_EFD.new_empty(0, D), self.w1_EFD.new_empty(0), self.w1_EFD.new_empty(D, 0))
        if isinstance(part, MoEFFN) and part.num_shared:
            shared = (part.shared_w1_CD, part.shared_bias1_C, part.shared_w2_DC)
        self.shared_w1_CD, self.shared_b1_C, self.shared_w2_DC = shared

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E, D, F and C."""
        E, D, F_ = self.w2_EDF.shape
        return E, D, F_, self.shared_w2_DC.shape[1]

    @property
    def is_gated(self) -> bool:
        """Whether a learned gate multiplies what they put out."""
        return isinstance(self._part, MoEFFN) and self._part.router is not None

    def hidden(self, expert: int, x_TD: Tensor) -> Tensor:
        """An expert's activations [T, N]."""
        h_TN = F.linear(x_TD, self.w1_EFD[expert], self.b1_EF[expert])
        if len(self.shared_b1_C):
            h_TN = torch.cat([F.linear(x_TD, self.shared_w1_CD, self.shared_b1_C), h_TN], 1)
        return activate(self._part.activation, h_TN)

    def output(self, expert: int) -> Tensor:
        """An expert's second map [D, N]."""
        w2_DF = self.w2_EDF[expert]
        return torch.cat([self.shared_w2_DC, w2_DF], 1) if len(self.shared_b1_C) else w2_DF

    def inputs(self, run: Layerwise, index: int, number: int, mask_BS: Tensor | None) -> _Inputs:
        """Run layer `index`, this one, on a batch as far as its experts."""
        if isinstance(self._part, MoEFFN):
            return self._routed_inputs(self._part, run, index, number)
        return self._dense_inputs(self._part, run, index, number, mask_BS)

    def _routed_inputs(self, part: MoEFFN, run: Layerwise, index: int, number: int) -> _Inputs:
        caught = []

        def catch(x_BSD: Tensor, *, routing: RouterOutput) -> Tensor:
            caught.append((x_BSD, routing))
            return x_BSD

        with forward_replaced(part, catch):
            run.run(index, number)
        ((x_BSD, routing),) = caught
        plan, gate_TK, _ = routing
        return _Inputs(x_BSD, plan.expert_ids_TK, gate_TK, lambda: part(x_BSD, routing=routing))

    def _dense_inputs(
        self, part: DenseFFN, run: Layerwise, index: int, number: int, mask_BS: Tensor | None
    ) -> _Inputs:
        caught: list[Tensor] = []  # more than one if the network runs in chunks
        hook = part.w1.register_forward_pre_hook(lambda w1, args: caught.append(args[0]))
        try:
            run.run(index, number)
        finally:
            hook.remove()
        x_BSD = torch.cat(caught, 1)
        expert_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int32, device=x_BSD.device)
        if mask_BS is not None:
            expert_BS.masked_fill_(mask_BS == 0, -1)

        def finish() -> Tensor:
            return part.norm(part.w2(activate(part.activation, part.w1(x_BSD))) + x_BSD)

        return _Inputs(x_BSD, expert_BS.view(-1, 1), None, finish)

    def scale_norms(self, factor: float) -> None:
        """Multiply the output of every expert."""
        part = cast(MoEFFN, self._part)
        for parameter in (part.layernorm_weight_ED, part.layernorm_bias_ED):
            assert parameter is not None
            parameter.mul_(factor)


class _Sums:
    """What the normal equations of a layer's experts are made of, sums over tokens; G = N + 1, with the bias.

    Products of a block of tokens are taken in float32 or wider, and added up in float64. The wanted ones are
    of what the experts as they are lack: where that is nothing, nothing is changed.
    """

    def __init__(self, experts: _Experts, norm_eps: float):
        E, D, F_, C = experts.sizes
        N = C + F_
        self._experts, self._norm_eps = experts, norm_eps
        device = experts.w2_EDF.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._products_EGG = zeros(E, N + 1, N + 1)
        self._lacking_EDG = zeros(E, D, N + 1)
        self._counts_E = zeros(E)  # of tokens
        self._error_E = zeros(E)  # of the experts as they are
        self._whole = zeros(1)  # what an output that is wrong altogether would have

    def add(self, batches: list[tuple[_Inputs, Tensor, Tensor | None]]) -> None:
        """Add a block: of each of its batches the student's inputs, the teacher's sum [B, S, D], the mask."""
        experts = self._experts
        wide = torch.promote_types(experts.w2_EDF.dtype, torch.float32)
        x_TD = torch.cat([given.x_BSD.flatten(0, 1) for given, _, _ in batches])
        s_TD = torch.cat([s_BSD.flatten(0, 1) for _, s_BSD, _ in batches]).to(wide)
        expert_TK = torch.cat([given.expert_TK for given, _, _ in batches])
        gates = [given.gate_TK for given, _, _ in batches if given.gate_TK is not None]
        gate_TK = torch.cat(gates) if gates else None
        variance_T = s_TD.var(1, correction=0)
        weight_T = 1 / (variance_T + self._norm_eps)
        for e in range(len(self._counts_E)):
            tokens, choices = (expert_TK == e).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            weight_t = weight_T[tokens]
            if gate_TK is not None:
                weight_t = weight_t * gate_TK[tokens, choices].to(wide).square()
            root_t1 = weight_t.sqrt().unsqueeze(1)
            x_tD = x_TD[tokens]
            a_tN = experts.hidden(e, x_tD).to(wide)
            z_tD = F.linear(a_tN, experts.output(e).to(wide), experts.b2_ED[e].to(wide))
            lacking_tD = s_TD[tokens].sub_(x_tD).sub_(z_tD).mul_(root_t1)
            a_tG = torch.cat([a_tN.mul_(root_t1), root_t1], 1)
            self._products_EGG[e] += a_tG.T @ a_tG
            self._lacking_EDG[e] += lacking_tD.T @ a_tG
            self._counts_E[e] += len(tokens)
            self._error_E[e] += lacking_tD.square().sum().double()
            self._whole += (weight_t * variance_T[tokens]).sum().double() * s_TD.shape[1]

    def add_up(self) -> None:
        """Add the sums of all processes; collective."""
        for sums in vars(self).values():
            if isinstance(sums, Tensor):
                distributed.all_reduce(sums)

    def solve(self, ridge: float, rare: float) -> tuple[int, float, float]:
        """Give the experts their new weights; return the tokens, and the errors before and after."""
        experts = self._experts
        C, N = experts.sizes[3], self._products_EGG.shape[1] - 1
        strength_E = []
        for count, products_GG in zip(self._counts_E.tolist(), self._products_EGG, strict=True):
            energy = float(products_GG.diagonal()[:N].mean())
            strength_E.append(energy * (ridge + rare * N / count) if count else 0.0)
        change_EDG = solve(self._products_EGG, self._lacking_EDG, strength_E, C)
        gained_E = {
            e: float((change_DG * (2 * self._lacking_EDG[e] - change_DG @ self._products_EGG[e])).sum())
            for e, change_DG in change_EDG.items()
        }
        if C:  # all or none
            gained_E = gained_E if sum(gained_E.values()) > 0 else {}
        else:
            gained_E = {e: gained for e, gained in gained_E.items() if gained > 0}
        for number, e in enumerate(gained_E):
            change_DG = change_EDG[e]
            experts.w2_EDF[e] += change_DG[:, C:N].to(experts.w2_EDF.dtype)
            experts.b2_ED[e] += change_DG[:, N].to(experts.b2_ED.dtype)
            if C and number == 0:  # the same in all
                experts.shared_w2_DC += change_DG[:, :C].to(experts.shared_w2_DC.dtype)
        before, whole = float(self._error_E.sum()), float(self._whole) or 1.0
        after = max(before - sum(gained_E.values()), 0.0)
        return round(float(self._counts_E.sum())), before / whole, after / whole


@contextmanager
def _caught_sums(norm: nn.LayerNorm) -> Iterator[list[Tensor]]:
    """Collect what a layer of the teacher normalises, [B, S, D]; in pieces if its network runs in chunks."""
    caught: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        yield caught
    finally:
        hook.remove()


def _find_experts(student: PreTrainedModel) -> list[_Experts]:
    layers = [module for module in student.modules() if isinstance(module, MoELayer)]
    if layers:
        return [_Experts(layer, layer.ffn) for layer in layers]
    return [_Experts(ffn.layer, ffn) for ffn in find_ffns(student)]


def _base_of(student: PreTrainedModel) -> nn.Module:
    for module in student.modules():
        if isinstance(module, MoEModel):
            return module
    return find_base(student)[0]


def _mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    return batch.get("attention_mask")


def _blocks(batches: Sequence[Mapping[str, Tensor]]) -> Iterator[list[int]]:
    """Cut the batches' numbers into runs of some `_BLOCK_TOKENS` tokens, so that experts get many at once."""
    block: list[int] = []
    tokens = 0
    for number, batch in enumerate(batches):
        block.append(number)
        tokens += batch["input_ids"].numel()
        if tokens >= _BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block
