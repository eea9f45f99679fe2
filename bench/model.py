"""Whole encoders: MoEBERT, the authors' dispatch in the same model, dense encoders of more or less work."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import DTYPES, ModelCase, Request, check_sequences, cpu_dtypes, num_shared, token_ids
from .encoders import attend_without_mask, build, with_authors_dispatch, with_reference_experts
from .options import TAKES
from .registry import Entry, Op, Outputs, Thunk, Work
from .text import read_batch
from .verify import check_close

OURS, TIED = "moebert_kernels", "moebert_kernels tied"
_EXPERTS = ("experts", "tied")  # works
DENSE, BOUND = "dense BERT", "bound: dense FFN of one expert"
_CPU_BATCHES = ((1, 32), (8, 128), (32, 128))
_WORKS = {"dense": DENSE, "bound": BOUND, "half": "DistilBERT shape: half the layers"}


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """A batch.

    Attributes:
        case: the sizes.
        ids_BS: token ids.
        mask_BS: int64, 0 for padding; None where there is none.
        dy_BSD: gradient at the last hidden state.
        models: encoders by work, built when first asked for.
    """

    case: ModelCase
    ids_BS: Tensor
    mask_BS: Tensor | None
    dy_BSD: Tensor
    models: dict[str, Any]


def cases(request: Request, device_type: str) -> list[ModelCase]:
    """A short sequence and batches, larger ones on a GPU; then the text's padded one, if there is any."""
    gpu = device_type == "cuda"
    dtypes = request.dtypes or (("bfloat16",) if gpu else cpu_dtypes())
    chosen = []
    for sizes in request.sizes("D", "F", "E", "L", "V", "head_size"):
        for dtype in dtypes:
            chosen += [
                ModelCase(count, sequence, **sizes, dtype=dtype) for count, sequence in _batches(request, gpu)
            ]
            if request.text is not None:
                chosen.append(_text_case(request.text, sizes, dtype))
    return list(dict.fromkeys(chosen))


def _batches(request: Request, gpu: bool) -> list[tuple[int, int]]:
    """Tokens and sequence lengths."""
    if request.T is None and request.sequence is None and not gpu:
        return [(batch * sequence, sequence) for batch, sequence in _CPU_BATCHES]
    sequence = request.sequence or 128
    check_sequences(request.T, sequence)
    return [(count, sequence) for count in request.T or [sequence * batch for batch in (8, 32, 128)]]


def _text_case(path: str, sizes: dict[str, Any], dtype: str) -> ModelCase:
    batch = read_batch(path, ModelCase(0, **sizes).V)
    count, real = batch.mask_BS.numel(), int(batch.mask_BS.sum())
    return ModelCase(
        count,
        batch.mask_BS.shape[1],
        **sizes,
        dtype=dtype,
        text=path,
        tokenizer=batch.tokenizer,
        real=real,
    )


def make_inputs(case: ModelCase, device: torch.device, seed: int) -> ModelInputs:
    """The text's tokens, or without one full sequences of Zipf's token ids."""
    generator = torch.Generator().manual_seed(seed)
    dy_BSD = torch.randn(case.batch, case.sequence, case.D, generator=generator)
    if case.text is None:
        ids_BS, mask_BS = token_ids(case.batch, case.sequence, case.V, seed), None
    else:
        batch = read_batch(case.text, case.V)
        ids_BS, mask_BS = batch.ids_BS, batch.mask_BS.to(device)
        dy_BSD *= batch.mask_BS.unsqueeze(2)
    return ModelInputs(case, ids_BS.to(device), mask_BS, dy_BSD.to(device, DTYPES[case.dtype]), {})


def _model(inputs: ModelInputs, kind: str) -> Any:
    """The encoder of a kind of work, the same for every entry that computes it."""
    if kind not in inputs.models:
        model = build(inputs.case, kind).to(inputs.ids_BS.device, DTYPES[inputs.case.dtype])
        if model.device.type == "cuda" and inputs.mask_BS is None:
            attend_without_mask(model)
        inputs.models[kind] = model
    return inputs.models[kind]


def _bind(kind: str, change: Callable[[Any], Any] | None, inputs: ModelInputs, pass_: str) -> Thunk:
    model = _model(inputs, kind)
    if change is not None:
        model = change(model)
    # The published code computes padding.
    return _passes(model, inputs, pass_, {"pack": False} if change is with_authors_dispatch else {})


def _passes(model: Any, inputs: ModelInputs, pass_: str, options: dict[str, Any]) -> Thunk:
    dy_BSD = inputs.dy_BSD.to(next(model.parameters()).dtype)
    batch = {"input_ids": inputs.ids_BS, **options}
    if inputs.mask_BS is not None:
        batch["attention_mask"] = inputs.mask_BS

    @torch.no_grad()
    def forward() -> Outputs:
        return {"y": model(**batch).last_hidden_state}

    def forward_backward() -> Outputs:
        y_BSD = model(**batch).last_hidden_state
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(y_BSD, parameters, dy_BSD, allow_unused=True)
        return {
            "y": y_BSD.detach(),
            "dword": dict(zip(names, grads, strict=True))["embeddings.word_embeddings.weight"],
        }

    return forward_backward if pass_.endswith("backward") else forward


def entries(peer_path: str | None) -> list[Entry]:
    """MoEBERT, then what it is compared with."""

    def entry(name: str, kind: str, change: Callable[[Any], Any] | None = None, **options) -> Entry:
        return Entry(name, functools.partial(_bind, kind, change), work=kind, **options)

    return [
        entry(OURS, "experts"),
        entry(TIED, "tied"),
        *(entry(name, kind) for kind, name in _WORKS.items()),
        entry("authors' loop", "experts", with_authors_dispatch, dispatch="inside"),
    ]


def reference(inputs: ModelInputs, pass_: str, kind: str) -> dict[str, Tensor]:
    """The same encoder in float64, its experts computed by `python_ref`."""
    model = copy.deepcopy(_model(inputs, kind)).double()
    if kind in _EXPERTS:
        model = with_reference_experts(model)
    return _passes(model, inputs, pass_, {})()


def check(
    outputs: dict[str, Tensor], expected: dict[str, Tensor], inputs: ModelInputs, kind: str
) -> dict[str, float]:
    """Every layer adds its rounding: the limits are those of one layer times their number.

    What becomes of padding is nobody's concern.
    """
    if inputs.mask_BS is not None:
        real_BS = inputs.mask_BS.bool()
        outputs, expected = ({**named, "y": named["y"][real_BS]} for named in (outputs, expected))
    return check_close(outputs, expected, DTYPES[inputs.case.dtype], sums=("dword",), slack=inputs.case.L)


def work(inputs: ModelInputs, pass_: str, kind: str) -> Work:
    """Multiply-adds of projections and attention, three times as many with backward; parameters read once.

    Encoders with experts need not compute padding; dense networks, as transformers has them, do.
    """
    case = inputs.case
    layers = max(1, case.L // 2) if kind == "half" else case.L
    neurons = case.E * case.F if kind in ("dense", "half") else case.F
    tokens = case.real if kind in _EXPERTS and case.real is not None else case.batch * case.sequence
    mults = tokens * (4 * case.D**2 + 2 * case.sequence * case.D + 2 * case.D * neurons)
    stored = case.E * neurons if kind == "experts" else neurons
    if kind == "tied":
        stored = num_shared(case.F) + case.E * (case.F - num_shared(case.F))
    parameters = layers * (4 * case.D**2 + 2 * case.D * stored)
    passes = 3 if pass_.endswith("backward") else 1
    moved = parameters + 2 * tokens * case.D * layers
    return Work(2 * layers * mults * passes, moved * passes * DTYPES[case.dtype].itemsize)


def footprint(inputs: ModelInputs) -> int:
    """An encoder's parameters are past any cache by themselves."""
    parameters = work(inputs, "forward", "experts").bytes
    return int(parameters) + inputs.case.V * inputs.case.D * DTYPES[inputs.case.dtype].itemsize


MODEL = Op(
    name="model",
    takes=TAKES["model"],
    passes=("forward", "forward+backward"),
    default_passes=("forward",),
    cases=cases,
    make_inputs=make_inputs,
    entries=entries,
    reference=reference,
    check=check,
    work=work,
    footprint=footprint,
    baselines=(DENSE, BOUND),
    needs=("transformers",),
)
