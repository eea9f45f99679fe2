"""Importance: scoring one batch by one backward pass, and by the published code's procedure."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cases import DTYPES, ImportanceCase, Request, check_sequences, token_ids
from .encoders import bert_sizes, spread_weights
from .options import TAKES
from .reference import specification
from .registry import Entry, Op, Outputs, Thunk, Work
from .verify import check_close

OURS = "moebert_kernels"
AUTHORS = "authors: 2 L B backward passes"


@dataclass(frozen=True, eq=False)
class ImportanceInputs:
    """A batch with its labels, and the classifier to be scored.

    Attributes:
        case: the sizes.
        ids_BS: token ids.
        labels_B: classes.
        model: `BertForSequenceClassification` in evaluation mode.
    """

    case: ImportanceCase
    ids_BS: Tensor
    labels_B: Tensor
    model: Any


def cases(request: Request, device_type: str) -> list[ImportanceCase]:
    """One small batch: the published procedure takes a backward pass per layer, matrix and sample.

    On a CPU so small that twenty of its samples take a minute.
    """
    sequence, batch = (128, 32) if device_type == "cuda" else (32, 2)
    sequence = request.sequence or sequence
    check_sequences(request.T, sequence)
    chosen = []
    for sizes in request.sizes("D", "F", "E", "L", "V", "head_size"):
        sizes["F"] = sizes.pop("E", 4) * sizes.get("F", 768)
        for dtype in request.dtypes or ("float32",):
            for count in request.T or (batch * sequence,):
                chosen.append(ImportanceCase(count, sequence, **sizes, dtype=dtype))
    return list(dict.fromkeys(chosen))


def make_inputs(case: ImportanceCase, device: torch.device, seed: int) -> ImportanceInputs:
    """Zipf's token ids, labels in turn, drawn weights."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**bert_sizes(case, case.F), id2label={0: "a", 1: "b", 2: "c"})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        spread_weights(model)
    ids_BS = token_ids(case.batch, case.sequence, case.V, seed).to(device)
    labels_B = (torch.arange(case.batch) % 3).to(device)
    return ImportanceInputs(case, ids_BS, labels_B, model.eval().to(device, DTYPES[case.dtype]))


def _weights(model: Any) -> list[tuple[Tensor, Tensor]]:
    layers = model.bert.encoder.layer
    return [(layer.intermediate.dense.weight, layer.output.dense.weight) for layer in layers]


def _sample_losses(model: Any, inputs: ImportanceInputs) -> Tensor:
    logits = model(input_ids=inputs.ids_BS).logits
    return functional.cross_entropy(logits.float(), inputs.labels_B, reduction="none")


def _ours(inputs: ImportanceInputs, pass_: str) -> Thunk:
    from moebert_kernels.compress.scoring.importance import compute_importance

    batch = {"input_ids": inputs.ids_BS, "labels": inputs.labels_B}
    return lambda: {"scores": compute_importance(inputs.model, [batch]).scores_LF}


def _authors(inputs: ImportanceInputs, pass_: str) -> Thunk:
    """One forward pass; then per sample, layer and matrix a backward pass, the graph kept."""
    weights = _weights(inputs.model)

    def thunk() -> Outputs:
        losses_B = _sample_losses(inputs.model, inputs)
        scores_LF = [w1_FD.new_zeros(w1_FD.shape[0]) for w1_FD, _ in weights]
        for loss in losses_B:
            for layer, (w1_FD, w2_DF) in enumerate(weights):
                (g1_FD,) = torch.autograd.grad(loss, w1_FD, retain_graph=True)
                (g2_DF,) = torch.autograd.grad(loss, w2_DF, retain_graph=True)
                products_F = (w1_FD * g1_FD).sum(1) + (w2_DF * g2_DF).sum(0)
                scores_LF[layer] += products_F.detach().abs()
        return {"scores": scores_LF}

    return thunk


def _by_definition(model: Any, inputs: ImportanceInputs) -> Tensor:
    def loss_of_sample(sample: int) -> Tensor:
        one = replace(
            inputs, ids_BS=inputs.ids_BS[sample : sample + 1], labels_B=inputs.labels_B[sample : sample + 1]
        )
        return _sample_losses(model, one)[0]

    scores = specification("importance").importance_by_sample_gradients
    return scores(loss_of_sample, inputs.case.batch, _weights(model))


def _sample_by_sample(inputs: ImportanceInputs, pass_: str) -> Thunk:
    return lambda: {"scores": _by_definition(inputs.model, inputs)}


def entries(peer_path: str | None) -> list[Entry]:
    """One backward pass per batch, per sample, and per sample, layer and matrix."""
    return [Entry(OURS, _ours), Entry("a pass per sample", _sample_by_sample), Entry(AUTHORS, _authors)]


def reference(inputs: ImportanceInputs, pass_: str, kind: str) -> dict[str, Tensor]:
    """`python_ref`'s definition in float64."""
    return {"scores": _by_definition(copy.deepcopy(inputs.model).double(), inputs)}


def check(
    outputs: dict[str, Tensor], expected: dict[str, Tensor], inputs: ImportanceInputs, kind: str
) -> dict[str, float]:
    """Every layer's scores by themselves; rounding adds up over layers and samples."""
    scores = {"scores": outputs["scores"].to(expected["scores"].device)}
    slack = 10.0 * inputs.case.L
    return check_close(
        scores, expected, DTYPES[inputs.case.dtype], lambda _, tensor: list(tensor), slack=slack
    )


def work(inputs: ImportanceInputs, pass_: str, kind: str) -> Work:
    """One forward pass and one backward pass to the activations; parameters read twice."""
    case = inputs.case
    parameters = case.L * (4 * case.D**2 + 2 * case.D * case.F)
    attention = case.L * 2 * case.sequence * case.D
    flops = 4 * (parameters + attention) * case.batch * case.sequence
    return Work(flops, 2 * parameters * DTYPES[case.dtype].itemsize)


def footprint(inputs: ImportanceInputs) -> int:
    """The model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in inputs.model.parameters())


IMPORTANCE = Op(
    name="importance",
    takes=TAKES["importance"],
    passes=("importance",),
    cases=cases,
    make_inputs=make_inputs,
    entries=entries,
    reference=reference,
    check=check,
    work=work,
    footprint=footprint,
    baselines=(AUTHORS,),
    needs=("transformers", "datasets"),
)
