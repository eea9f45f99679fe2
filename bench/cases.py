"""What is measured: shapes, dtypes and routings. Data is drawn on the CPU by a seed, the same on every device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FFNCase:
    """One call of the expert FFN. BERT-base MoEBERT's is the default."""

    tokens: int
    hidden: int = 768
    expert_size: int = 768
    experts: int = 4
    top_k: int = 1
    dtype: str = "bfloat16"
    routing: str = "balanced"


@dataclass(frozen=True)
class DispatchCase:
    """The routing of one batch for all layers of a model, from token ids."""

    tokens: int
    experts: int = 4
    layers: int = 12
    vocabulary: int = 30522


@dataclass(frozen=True)
class ModelCase:
    """One pass of an encoder over a batch of full sequences."""

    tokens: int
    sequence: int = 128
    hidden: int = 768
    layers: int = 12
    ffn_size: int = 3072
    expert_size: int = 768
    experts: int = 4
    vocabulary: int = 30522
    dtype: str = "float32"

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.sequence)


@dataclass(frozen=True)
class ImportanceCase:
    """The scoring of one batch of labelled sequences."""

    tokens: int
    sequence: int = 128
    hidden: int = 768
    layers: int = 12
    ffn_size: int = 3072
    vocabulary: int = 30522
    dtype: str = "float32"

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.sequence)


@dataclass(frozen=True)
class Request:
    """Shapes that were asked for; None where the benchmark's own choice for the device stands."""

    tokens: tuple[int, ...] | None = None
    hidden: int | None = None
    expert_size: int | None = None
    experts: int | None = None
    top_k: int | None = None
    layers: int | None = None
    sequence: int | None = None
    vocabulary: int | None = None
    dtypes: tuple[str, ...] | None = None
    skews: tuple[str, ...] | None = None

    def given(self, *names: str) -> dict[str, int]:
        """The named sizes that were asked for, to put over a case's defaults."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def over(self, other: Request) -> Request:
        """This request, completed by another where it says nothing."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(other, **{name: value for name, value in mine.items() if value is not None})


TOY = Request(
    tokens=(24,),
    hidden=16,
    expert_size=8,
    experts=3,
    layers=2,
    sequence=6,
    vocabulary=64,
    dtypes=("float32",),
    skews=("hot",),
)


def cpu_dtypes() -> tuple[str, ...]:
    """float32, and bfloat16 where the processor multiplies it."""
    return ("float32", "bfloat16") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("float32",)


def _balanced(case: FFNCase, generator: torch.Generator) -> Tensor:
    first_T1 = torch.randperm(case.tokens, generator=generator).unsqueeze(1) % case.experts
    return (first_T1 + torch.arange(case.top_k)) % case.experts


def _drawn(shares: Callable[[int], list[float]]) -> Callable[[FFNCase, torch.Generator], Tensor]:
    def draw(case: FFNCase, generator: torch.Generator) -> Tensor:
        shares_E = torch.tensor(shares(case.experts))
        if case.tokens == 0:
            return torch.zeros(0, case.top_k, dtype=torch.int64)
        return torch.multinomial(shares_E.expand(case.tokens, -1), case.top_k, generator=generator)

    return draw


def _hot_shares(experts: int) -> list[float]:
    return [0.7] + [0.3 / (experts - 1)] * (experts - 1) if experts > 1 else [1.0]


ROUTINGS: dict[str, Callable[[FFNCase, torch.Generator], Tensor]] = {
    "balanced": _balanced,
    "zipf": _drawn(lambda experts: [1 / (rank + 1) for rank in range(experts)]),
    "hot": _drawn(_hot_shares),
}


def expert_ids(case: FFNCase, seed: int = 0) -> Tensor:
    """Draw the experts of every token, K different ones each.

    "balanced" gives every expert the same number of slots, "zipf" falls with the expert's rank, "hot" sends
    70 % of the tokens to expert 0.

    Returns:
        int64 [T, K], on the CPU.
    """
    return ROUTINGS[case.routing](case, torch.Generator().manual_seed(seed))


def token_ids(batch: int, sequence: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Draw token ids by Zipf's law, as running text has them: a hash then loads experts as text does.

    Returns:
        int64 [batch, sequence], on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(batch, sequence, generator=generator, dtype=torch.float64)
    rank = torch.exp(uniform * math.log(vocabulary)).long().clamp(1, vocabulary) - 1
    return torch.randperm(vocabulary, generator=generator)[rank]
