"""Whole encoders: MoEBERT, the authors' dispatch in the same model, and the dense encoders of more or less work."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.layer import MoEFFN
from moebert_kernels.routing import RouterOutput

from .baselines.authors import AuthorsExpert, AuthorsExperts
from .cases import DTYPES, ModelCase, Request, cpu_dtypes, token_ids
from .reference import specification
from .registry import Entry, Op, Outputs, Thunk, Work
from .verify import check_close

OURS = "moebert_kernels"
DENSE, BOUND = "dense BERT", "bound: dense FFN of one expert"
_WORKS = {"dense": DENSE, "bound": BOUND, "half": "DistilBERT shape: half the layers"}


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """A batch of full sequences.

    Attributes:
        case: the sizes.
        ids_BS: token ids.
        dy_BSD: gradient at the last hidden state.
        models: encoders by work, built when first asked for.
    """

    case: ModelCase
    ids_BS: Tensor
    dy_BSD: Tensor
    models: dict[str, Any]


def cases(request: Request, device_type: str) -> list[ModelCase]:
    """One sequence, and a batch; more of them on a GPU."""
    gpu = device_type == "cuda"
    sizes = request.given("sequence", "hidden", "layers", "expert_size", "experts", "vocabulary")
    base = ModelCase(0, **sizes)
    base = replace(base, ffn_size=base.experts * base.expert_size)
    tokens = request.tokens or tuple(base.sequence * batch for batch in ((8, 32, 128) if gpu else (1, 8)))
    dtypes = request.dtypes or (("bfloat16",) if gpu else cpu_dtypes())
    return [replace(base, tokens=count, dtype=dtype) for dtype in dtypes for count in tokens]


def make_inputs(case: ModelCase, device: torch.device, seed: int) -> ModelInputs:
    """Zipf's token ids; no padding, which only MoEBERT skips."""
    ids_BS = token_ids(case.batch, case.sequence, case.vocabulary, seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    dy_BSD = torch.randn(case.batch, case.sequence, case.hidden, generator=generator)
    return ModelInputs(case, ids_BS, dy_BSD.to(device, DTYPES[case.dtype]), {})


def _heads(hidden: int) -> int:
    return max(1, hidden // 64)


def _build(case: ModelCase, kind: str) -> nn.Module:
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    from moebert_kernels.models import MoEBertConfig, MoEBertModel

    sizes = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": _heads(case.hidden),
        "max_position_embeddings": max(512, case.sequence),
    }
    if kind == "experts":
        experts = {"num_experts": case.experts, "expert_size": case.expert_size, "num_shared_neurons": 0}
        return MoEBertModel(MoEBertConfig(**sizes, **experts, intermediate_size=case.ffn_size), False)
    if kind == "half":
        config = DistilBertConfig(
            vocab_size=case.vocabulary,
            dim=case.hidden,
            n_layers=max(1, case.layers // 2),
            n_heads=_heads(case.hidden),
            hidden_dim=case.ffn_size,
            max_position_embeddings=sizes["max_position_embeddings"],
        )
        return DistilBertModel(config)
    width = case.ffn_size if kind == "dense" else case.expert_size
    return BertModel(BertConfig(**sizes, intermediate_size=width), add_pooling_layer=False)


def _model(inputs: ModelInputs, kind: str) -> Any:
    """The encoder of a kind of work, the same weights for every entry that computes it."""
    if kind not in inputs.models:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _build(inputs.case, kind)
            spread_weights(model)
        inputs.models[kind] = model.eval().to(inputs.ids_BS.device, DTYPES[inputs.case.dtype])
    return inputs.models[kind]


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Weights of unit gain, varied biases and scales: beside the tiny initial ones a wrong layer would not show."""
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if parameter.dim() == 1 or kind in ("b1_EF", "b2_ED", "ln_w_ED", "ln_b_ED"):
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        elif "embeddings" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _swap_experts(model: nn.Module, make: Callable[[MoEFFN], nn.Module]) -> nn.Module:
    """A copy of a MoEBERT whose layers' experts are computed otherwise."""
    swapped = copy.deepcopy(model)
    for layer in swapped.encoder.layer:  # type: ignore[union-attr]
        layer.ffn = make(layer.ffn)
    return swapped


class _AuthorsFFN(nn.Module):
    def __init__(self, ffn: MoEFFN):
        super().__init__()
        self.num_experts = ffn.num_experts
        self.experts = AuthorsExperts([self._expert(ffn, e) for e in range(ffn.num_experts)])

    @staticmethod
    def _expert(ffn: Any, e: int) -> AuthorsExpert:
        norm = nn.LayerNorm(ffn.hidden_size, eps=ffn.norm_eps)
        norm.weight, norm.bias = nn.Parameter(ffn.ln_w_ED[e].detach()), nn.Parameter(ffn.ln_b_ED[e].detach())
        weights = (ffn.w1_EFD, ffn.b1_EF, ffn.w2_EDF, ffn.b2_ED)
        return AuthorsExpert(*(weight[e].detach() for weight in weights), norm)

    def forward(self, x_BSD: Tensor, *, routing: RouterOutput) -> Tensor:
        y_TD = self.experts(x_BSD.flatten(0, 1), routing.plan.expert_ids_TK[:, 0].long())
        return y_TD.view(x_BSD.shape)


class _ReferenceFFN(nn.Module):
    def __init__(self, ffn: MoEFFN):
        super().__init__()
        self.num_experts = ffn.num_experts
        self.ffn = ffn

    def forward(self, x_BSD: Tensor, *, routing: RouterOutput) -> Tensor:
        ffn = self.ffn
        y_TD = specification("ffn").moe_ffn(
            x_BSD.flatten(0, 1),
            routing.plan.expert_ids_TK,
            ffn.w1_EFD,
            ffn.b1_EF,
            ffn.w2_EDF,
            ffn.b2_ED,
            activation=ffn.activation,
            ln_w_ED=ffn.ln_w_ED,
            ln_b_ED=ffn.ln_b_ED,
            ln_eps=ffn.norm_eps,
        )
        return y_TD.view(x_BSD.shape)


class _AuthorsEncoder(nn.Module):
    """The authors look experts up and sort in every layer; the plans that MoEBERT makes once are not used."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.layer, self.tables_LV = encoder.layer, encoder.tables_LV

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        ids_T = kwargs["routing_ids"].flatten()
        for layer, table_V in zip(self.layer, self.tables_LV, strict=True):
            x_BSD, _ = layer.attention(hidden_states, attention_mask)
            y_TD = layer.ffn.experts(x_BSD.flatten(0, 1), table_V[ids_T].long())
            hidden_states = y_TD.view(x_BSD.shape)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def _authors(model: nn.Module) -> nn.Module:
    swapped: Any = _swap_experts(model, _AuthorsFFN)
    swapped.encoder = _AuthorsEncoder(swapped.encoder)
    return swapped


def _bind(kind: str, change: Callable[[nn.Module], nn.Module] | None, inputs: ModelInputs, pass_: str) -> Thunk:
    model = _model(inputs, kind)
    if change is not None:
        model = change(model)
    return _passes(model, inputs, pass_)


def _passes(model: Any, inputs: ModelInputs, pass_: str) -> Thunk:
    dy_BSD = inputs.dy_BSD.to(next(model.parameters()).dtype)

    @torch.no_grad()
    def forward() -> Outputs:
        return {"y": model(input_ids=inputs.ids_BS).last_hidden_state}

    def forward_backward() -> Outputs:
        y_BSD = model(input_ids=inputs.ids_BS).last_hidden_state
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(y_BSD, parameters, dy_BSD, allow_unused=True)
        return {"y": y_BSD.detach(), "dword": dict(zip(names, grads, strict=True))["embeddings.word_embeddings.weight"]}

    return forward_backward if pass_.endswith("backward") else forward


def entries(peer_path: str | None) -> list[Entry]:
    """MoEBERT, then what it is compared with."""

    def entry(name: str, kind: str, change: Callable[[nn.Module], nn.Module] | None = None, **options) -> Entry:
        return Entry(name, functools.partial(_bind, kind, change), work=kind, **options)

    return [
        entry(OURS, "experts"),
        *(entry(name, kind) for kind, name in _WORKS.items()),
        entry("authors' loop", "experts", _authors, dispatch="inside"),
    ]


def reference(inputs: ModelInputs, pass_: str, kind: str) -> dict[str, Tensor]:
    """The same encoder in float64, its experts computed by `python_ref`."""
    model = copy.deepcopy(_model(inputs, kind)).double()
    if kind == "experts":
        model = _swap_experts(model, _ReferenceFFN)
    return _passes(model, inputs, pass_)()


def check(
    outputs: dict[str, Tensor], expected: dict[str, Tensor], inputs: ModelInputs, kind: str
) -> dict[str, float]:
    """Every layer adds its rounding: the limits are those of one layer times their number."""
    return check_close(
        outputs, expected, DTYPES[inputs.case.dtype], sums=("dword",), slack=inputs.case.layers
    )


def work(inputs: ModelInputs, pass_: str, kind: str) -> Work:
    """Multiply-adds of projections and attention (three times as many with backward); parameters read once."""
    case = inputs.case
    layers = max(1, case.layers // 2) if kind == "half" else case.layers
    neurons = case.ffn_size if kind in ("dense", "half") else case.expert_size
    per_token = layers * (4 * case.hidden**2 + 2 * case.hidden * neurons + 2 * case.sequence * case.hidden)
    tokens = case.batch * case.sequence
    networks = case.experts if kind == "experts" else 1
    parameters = layers * (4 * case.hidden**2 + 2 * case.hidden * neurons * networks)
    passes = 3 if pass_.endswith("backward") else 1
    moved = parameters + 2 * tokens * case.hidden * layers
    return Work(2 * per_token * tokens * passes, moved * passes * DTYPES[case.dtype].itemsize)


def footprint(inputs: ModelInputs) -> int:
    """An encoder's parameters are past any cache by themselves."""
    parameters = work(inputs, "forward", "experts").bytes
    return int(parameters) + inputs.case.vocabulary * inputs.case.hidden * DTYPES[inputs.case.dtype].itemsize


MODEL = Op(
    name="model",
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
)
