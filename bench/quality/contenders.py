"""Contenders: models of one cost per token, each made of the same teacher in another way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.compress.experts.adaptation import adapt, narrow, random_scores
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.models import (
    encoder_flops_per_token,
    find_ffns,
    keep_layers,
    layers_of_equal_cost,
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
        tied: whether shared neurons are stored once and stay the same in all experts.
    """

    routing: str
    num_experts: int
    shared: float
    score: Score = "sample"
    tied: bool = False

    can_be_fitted = True

    def build(self, made_of: Materials, seed: int) -> PreTrainedModel:
        """Make the student."""
        scores: Importance | Tensor = made_of.importance
        if self.score == "token":
            scores = made_of.token_scores_LF
        elif self.score == "random":
            scores = random_scores(*made_of.importance.scores_LF.shape, seed=seed)
        return adapt(
            made_of.teacher,
            scores,
            num_experts=self.num_experts,
            expert_size=made_of.num_met,
            num_shared=math.ceil(self.shared * made_of.num_met - 1e-9),
            tie_shared=self.tied,
            routing=self.routing,
            seed=seed,
            token_counts_V=made_of.counts_V,
        )


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
        return narrow(made_of.teacher, scores_LF, made_of.num_met)


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
