"""Contenders: models of one cost per token, each made of the same teacher in another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.compress.adapt import adapt, random_scores
from moebert_kernels.compress.importance import Importance
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models import (
    count_parameters,
    encoder_flops_per_token,
    find_ffns,
    keep_layers,
    layers_of_equal_cost,
    narrow_ffns,
)


@dataclass(frozen=True)
class Materials:
    """What contenders are made of.

    Attributes:
        teacher: fine-tuned; left as it is.
        importance: of its neurons, with token scores.
        counts_V: how often each token id occurs in the training rows.
        cost: a token is to meet the dense width divided by this; the paper's is 4.
    """

    teacher: PreTrainedModel
    importance: Importance
    counts_V: Tensor
    cost: int

    @property
    def num_met(self) -> int:
        """Neurons that a token is to meet in a layer."""
        return find_ffns(self.teacher)[0].w1.out_features // self.cost

    @property
    def token_scores_LF(self) -> Tensor:
        """The scores |a dL/da| of single tokens, summed: the sign is dropped token by token."""
        assert self.importance.tokens is not None
        return self.importance.tokens.scores_LGF.sum(1)


Score = Literal["sample", "token", "random"]


@dataclass(frozen=True)
class Experts:
    """Experts of a part of the dense width, one of them for each token.

    Attributes:
        routing: as `adapt` takes it.
        num_experts: E.
        shared: neurons in every expert, as a part of F. A split by importance needs the more the more experts
            there are: E (F - s) + s must not exceed the dense width.
        score: what neurons are sorted by: the paper's importance, whose sign is dropped sample by sample; the
            same token by token; or nothing.
        tied: whether shared neurons stay the same in all experts while they are trained.
    """

    routing: str
    num_experts: int
    shared: float
    score: Score = "sample"
    tied: bool = False

    @property
    def can_be_fitted(self) -> bool:
        """Whether the fit leaves it what it is; each expert's own fit would untie shared neurons."""
        return not self.tied

    def build(self, made_of: Materials, seed: int) -> PreTrainedModel:
        """Make the student."""
        scores: Importance | Tensor = made_of.importance
        if self.score == "token":
            scores = made_of.token_scores_LF
        elif self.score == "random":
            scores = random_scores(*made_of.importance.scores_LF.shape, seed=seed)
        student = adapt(
            made_of.teacher,
            scores,
            num_experts=self.num_experts,
            expert_size=made_of.num_met,
            num_shared=self._num_shared(made_of),
            routing=self.routing,
            seed=seed,
            token_counts_V=made_of.counts_V,
        )
        if self.tied:
            tie_shared(student, self._num_shared(made_of))
        return student

    def stored(self, made_of: Materials, student: PreTrainedModel) -> int:
        """How many parameters have to be stored."""
        if not self.tied:
            return count_parameters(student)
        return count_parameters(student) - _repeated(student, self._num_shared(made_of))

    def _num_shared(self, made_of: Materials) -> int:
        return math.ceil(self.shared * made_of.num_met - 1e-9)


@dataclass(frozen=True)
class Narrow:
    """Dense feed-forward networks of a part of the width.

    Attributes:
        score: as for `Experts`.
    """

    score: Score = "sample"

    can_be_fitted = True

    def build(self, made_of: Materials, seed: int) -> PreTrainedModel:
        """Make the student; the seed has no part in it."""
        scores_LF = made_of.importance.scores_LF if self.score == "sample" else made_of.token_scores_LF
        order_LF = scores_LF.argsort(dim=1, descending=True, stable=True)
        return narrow_ffns(made_of.teacher, order_LF[:, : made_of.num_met])

    def stored(self, made_of: Materials, student: PreTrainedModel) -> int:
        """How many parameters have to be stored."""
        return count_parameters(student)


@dataclass(frozen=True)
class FewerLayers:
    """As many of the teacher's layers as cost what the others do."""

    can_be_fitted = False  # its layers are not one to one the teacher's

    def build(self, made_of: Materials, seed: int) -> PreTrainedModel:
        """Make the student; the seed has no part in it."""
        return keep_layers(made_of.teacher, self.layer_map(made_of))

    def layer_map(self, made_of: Materials) -> list[int]:
        """The teacher's layers that are kept."""
        cost = encoder_flops_per_token(Narrow().build(made_of, 0))
        return layers_of_equal_cost(made_of.teacher, cost)

    def stored(self, made_of: Materials, student: PreTrainedModel) -> int:
        """How many parameters have to be stored."""
        return count_parameters(student)


Contender = Experts | Narrow | FewerLayers

CONTENDERS: dict[str, Contender] = {
    "narrow": Narrow(),
    "narrow-token": Narrow("token"),
    "layers": FewerLayers(),
    "shuffled-4": Experts("hash-random", 4, 2 / 3, "random"),
    "random-4": Experts("hash-random", 4, 2 / 3),
    "random-4-token": Experts("hash-random", 4, 2 / 3, "token"),
    "balance-4": Experts("hash-balance", 4, 2 / 3),
    "affinity-4": Experts("hash-affinity", 4, 2 / 3),
    "affinity-4-half": Experts("hash-affinity", 4, 1 / 2),
    "affinity-4-third": Experts("hash-affinity", 4, 1 / 3),
    "random-4-tied": Experts("hash-random", 4, 2 / 3, tied=True),
    "affinity-4-tied": Experts("hash-affinity", 4, 2 / 3, tied=True),
    "random-8": Experts("hash-random", 8, 4 / 7),
    "affinity-8": Experts("hash-affinity", 8, 2 / 3),
    "random-16": Experts("hash-random", 16, 4 / 5),
    "affinity-16": Experts("hash-affinity", 16, 2 / 3),
    "affinity-16-third": Experts("hash-affinity", 16, 1 / 3),
}


def tie_shared(student: PreTrainedModel, num_shared: int) -> None:
    """Keep the first `num_shared` neurons of all experts of a layer alike while they are trained.

    They begin alike and get the sum of their gradients, so every step of the optimizer is the same for all of
    them: what one stored copy would learn.
    """

    def share(neuron_dim: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            shared = gradient.narrow(neuron_dim, 0, num_shared)
            shared.copy_(shared.sum(0, keepdim=True).expand_as(shared))
            return gradient

        return hook

    for module in student.modules():
        if isinstance(module, MoEFFN):
            module.w1_EFD.register_hook(share(1))
            module.w2_EDF.register_hook(share(2))
            if module.bias1_EF is not None:
                module.bias1_EF.register_hook(share(1))


def _repeated(student: PreTrainedModel, num_shared: int) -> int:
    """Parameters of shared neurons in all experts but one."""
    copies = 0
    for module in student.modules():
        if isinstance(module, MoEFFN):
            num_experts, _, hidden = module.w1_EFD.shape
            copies += (num_experts - 1) * num_shared * (2 * hidden + (module.bias1_EF is not None))
    return copies
