"""The one notion of a case, for tests and benchmarks: sizes, routing, data drawn on the CPU by a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROUTINGS = (
    "uniform",  # every expert has tokens
    "balanced",  # every expert has the same number of slots
    "zipf",  # an expert's share falls with its rank
    "skewed",  # one expert has 70 % of the tokens
    "dropped",  # a quarter of the slots has no expert
    "one",  # every token to the middle expert
    "first empty",
    "middle empty",
    "last empty",
    "nobody",  # no slot has an expert
)
TIMED_ROUTINGS = ("balanced", "zipf", "skewed")
TIMED_TOKENS = (64, 512, 4096, 16384, 65536)

# Sizes by name: the encoders that the layer is measured in, each with experts a quarter of the dense network.
SHAPES = {
    "bert-base": {"D": 768, "F": 768, "E": 4, "L": 12, "head_size": 64},
    "minilm": {"D": 384, "F": 384, "E": 4, "L": 6, "head_size": 32},
}


@dataclass(frozen=True)
class Case:
    """One call of `moe_ffn`: sizes in the package's notation, how tokens are routed, which parts are used."""

    T: int
    D: int = 16
    F: int = 24
    E: int = 4
    K: int = 1
    routing: str = "uniform"
    activation: str = "gelu"
    bias: bool = True
    gate: bool = False
    norm: bool = False
    C: int = 0  # neurons that all experts have beside their F

    def __str__(self) -> str:
        parts = [f"T{self.T}-D{self.D}-F{self.F}-E{self.E}-K{self.K}", self.routing, self.activation]
        parts += [name for name in ("gate", "norm") if getattr(self, name)] + [f"C{self.C}"] * (self.C > 0)
        return "-".join(parts + ([] if self.bias else ["nobias"])).replace(" ", "_")


@dataclass(frozen=True)
class FFNCase(Case):
    """What is timed of it: BERT-base with four experts of 768 neurons, by default."""

    D: int = 768
    F: int = 768
    routing: str = "balanced"
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class DispatchCase:
    """The routing of one batch for all L layers of a model, from ids below V."""

    T: int
    E: int = 4
    L: int = 12
    V: int = 30522


@dataclass(frozen=True)
class ModelCase:
    """One pass of an encoder over a batch; the dense network replaced has E*F neurons.

    The sequences are full, or those of a batch of `text`: a file's name; `tokenizer` made its tokens, `real`
    of the T tokens are no padding.
    """

    T: int
    sequence: int = 128
    D: int = 768
    F: int = 768
    E: int = 4
    L: int = 12
    V: int = 30522
    head_size: int = 64
    dtype: str = "float32"
    text: str | None = None
    tokenizer: str | None = None
    real: int | None = None

    @property
    def batch(self) -> int:
        return max(1, self.T // self.sequence)


@dataclass(frozen=True)
class ImportanceCase:
    """The scoring of one batch of labelled sequences by a dense encoder with F neurons per layer."""

    T: int
    sequence: int = 128
    D: int = 768
    F: int = 3072
    L: int = 12
    V: int = 30522
    head_size: int = 64
    dtype: str = "float32"

    @property
    def batch(self) -> int:
        return max(1, self.T // self.sequence)


@dataclass(frozen=True)
class Request:
    """Shapes that were asked for; None where the benchmark's own choice for the device stands.

    `shapes` are names in `SHAPES`, over which single sizes go; `norm` is whether the ffn is timed with its
    residual and LayerNorm; `text` is a file of sentences, for the model benchmark.
    """

    T: tuple[int, ...] | None = None
    D: int | None = None
    F: int | None = None
    E: int | None = None
    K: int | None = None
    L: int | None = None
    V: int | None = None
    sequence: int | None = None
    dtypes: tuple[str, ...] | None = None
    routings: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None
    norm: bool | None = None
    text: str | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """The named sizes that were asked for, to put over a case's defaults."""
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}

    def sizes(self, *names: str) -> list[dict[str, Any]]:
        """`given`, over the sizes of each shape by name."""
        shapes: list[dict[str, int]] = [SHAPES[shape] for shape in self.shapes or ()] or [{}]
        named = [{name: shape[name] for name in names if name in shape} for shape in shapes]
        return [sizes | self.given(*names) for sizes in named]

    def over(self, other: Request) -> Request:
        """This request, completed by another where it says nothing."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(other, **{name: value for name, value in mine.items() if value is not None})


def check_sequences(tokens: tuple[int, ...] | None, sequence: int) -> None:
    """Refuse token counts that are no whole sequences: others would be computed than the table says.

    Raises:
        ValueError: one of `tokens` is no multiple of `sequence`.
    """
    for count in tokens or ():
        if count % sequence:
            raise ValueError(f"tokens must be a multiple of the sequence length, {sequence}, got {count}")


TOY = Request(T=(24,), D=16, F=8, E=3, L=2, V=64, sequence=6, dtypes=("float32",), routings=("skewed",))


def cpu_dtypes() -> tuple[str, ...]:
    """float32, and bfloat16 where the processor multiplies it."""
    return ("float32", "bfloat16") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("float32",)


def expert_ids(case: Case, *, seed: int = 0) -> Tensor:
    """Draw the experts of every token, K different ones each as a router does; -1 for none.

    Returns:
        int64 [T, K], on the CPU.
    """
    T, E, K = case.T, case.E, case.K
    g = torch.Generator().manual_seed(seed)
    middle = E // 2
    if case.routing == "balanced":
        return (torch.randperm(T, generator=g).unsqueeze(1) + torch.arange(K)) % E
    if case.routing == "zipf":
        shares_E = 1 / torch.arange(1.0, E + 1)
        return torch.multinomial(shares_E.expand(T, E), K, generator=g) if T else torch.empty(0, K).long()
    absent = {"first empty": 0, "middle empty": middle, "last empty": E - 1}.get(case.routing)
    present = torch.tensor([e for e in range(E) if e != absent])
    ids_TK = present[torch.rand(T, len(present), generator=g).argsort(1)[:, :K]].reshape(T, K)
    if case.routing == "one":
        _put_first(ids_TK, middle, torch.ones(T, dtype=torch.bool))
    elif case.routing == "skewed":
        _put_first(ids_TK, middle, torch.rand(T, generator=g) < 0.7)
    elif case.routing == "dropped":
        ids_TK[torch.rand(T, K, generator=g) < 0.25] = -1
        ids_TK[: T // 8] = -1
    elif case.routing == "nobody":
        ids_TK[:] = -1
    return ids_TK


def _put_first(ids_TK: Tensor, expert: int, chosen_T: Tensor) -> None:
    """Make an expert the first choice of some tokens; where it was another choice, the two change places."""
    first_T1 = ids_TK[:, :1].clone()
    moved_TK = torch.where(ids_TK == expert, first_T1, ids_TK)
    moved_TK[:, 0] = expert
    ids_TK[chosen_T] = moved_TK[chosen_T]


def tensors(case: Case, *, seed: int = 0) -> dict[str, Tensor]:
    """float64 inputs of unit scale on the CPU, and the gradient that comes back, "dy".

    x has entries of magnitude up to 6, where erf and tanh GELU part; pre-activations and outputs are of
    unit scale, so that no error can hide behind a small output.
    """
    T, D, F, E, K, C = case.T, case.D, case.F, case.E, case.K, case.C
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    made = {"x": randn(T, D), "w1": randn(E, F, D, scale=1.5 * D**-0.5), "w2": randn(E, D, F, scale=F**-0.5)}
    made["x"][: (T + 3) // 4] *= 2
    made["x"].clamp_(-6, 6)
    if case.bias:
        made |= {"b1": randn(E, F, scale=0.5), "b2": randn(E, D)}
    if case.gate:
        made["gate"] = torch.rand(T, K, generator=g, dtype=torch.float64) + 0.25
    if case.norm:
        made |= {"residual": randn(T, D), "ln_w": randn(E, D), "ln_b": randn(E, D)}
    made["dy"] = randn(T, D)
    if C:
        made |= {"shared_w1": randn(C, D, scale=1.5 * D**-0.5), "shared_w2": randn(D, C, scale=C**-0.5)}
        if case.bias:
            made["shared_b1"] = randn(C, scale=0.5)
    return made


def num_shared(expert_size: int) -> int:
    """Of an expert's neurons, those that all experts have where some are shared: the paper's two thirds."""
    return round(expert_size * 2 / 3)


def token_ids(batch: int, sequence: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Draw token ids by Zipf's law, as running text has them: a hash then loads experts as text does.

    Returns:
        int64 [batch, sequence], on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(batch, sequence, generator=generator, dtype=torch.float64)
    rank = torch.exp(uniform * math.log(vocabulary)).long().clamp(1, vocabulary) - 1
    return torch.randperm(vocabulary, generator=generator)[rank]
