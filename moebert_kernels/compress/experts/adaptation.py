"""Adaptation: which neurons each expert takes, and the model made of such experts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.checks import check_whole
from moebert_kernels.compress import defaults
from moebert_kernels.compress.experts.affinity import split_by_affinity
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.errors import ArgumentError, UserError
from moebert_kernels.models.shrink import narrow_ffns
from moebert_kernels.models.surgery import find_ffns, to_moe
from moebert_kernels.routing import hash_balance_tables
from moebert_kernels.routing.tables import check_seed

COUNTING_ROUTINGS = ("hash-balance", "hash-affinity")


def default_sizes(ffn_width: int, num_experts: int) -> tuple[int, int]:
    """Return (expert_size, num_shared) in the paper's proportions: width / E, and two thirds of that.

    BERT-base, 3072 with 4 experts, gives (768, 512). A width that E does not divide is cut.

    Raises:
        UserError: there are fewer neurons than experts, or no expert.
    """
    if not 1 <= num_experts <= ffn_width:
        raise ArgumentError(
            "num_experts", f"must be 1 to the {ffn_width} neurons of a layer, got {num_experts}"
        )
    expert_size = ffn_width // num_experts
    return expert_size, round(expert_size * 2 / 3)


def split_neurons(importance_LF: Tensor, num_experts: int, expert_size: int, num_shared: int) -> Tensor:
    """Deal every layer's neurons out to experts (section 3.1 of the paper).

    Sorted by falling importance (the lower index first among equals), the first `num_shared` go to every
    expert; of the rest, expert e takes every E-th starting at e until it is full. The least important are
    left out.

    Args:
        importance_LF: floating point, F the dense width.
        num_experts: E.
        expert_size: neurons of one expert.
        num_shared: how many of them all experts have.

    Returns:
        int64 [L, E, expert_size], indices of dense neurons, by falling importance.

    Raises:
        UserError: the sizes do not fit each other, or need more neurons than there are; or the importance
            is not finite numbers of this shape.
    """
    if importance_LF.dim() != 2 or not importance_LF.is_floating_point():
        raise UserError(
            f"importance_LF must be floating point [L, F], got {importance_LF.dtype} "
            f"{tuple(importance_LF.shape)}"
        )
    if not bool(importance_LF.isfinite().all()):
        raise UserError("importance_LF must be finite, found infinite or NaN scores")
    width = importance_LF.shape[1]
    check_sizes(width, num_experts, expert_size, num_shared)
    order_LF = importance_LF.argsort(dim=1, descending=True, stable=True)
    shared_EF = torch.arange(num_shared).expand(num_experts, -1)
    own_EF = num_shared + torch.arange(num_experts * (expert_size - num_shared)).view(-1, num_experts).T
    return order_LF[:, torch.cat([shared_EF, own_EF], dim=1)]


def check_sizes(
    ffn_width: int,
    num_experts: int,
    expert_size: int,
    num_shared: int,
    *,
    overlapping: bool = False,
    tied: bool = False,
) -> None:
    """Raise a UserError unless layers of `ffn_width` neurons can be split this way.

    It is an ArgumentError where one size alone is at fault. Under "hash-affinity" experts are `overlapping`:
    they choose neurons independently of each other. With shared neurons `tied` each needs one of its own.
    """
    if num_experts < 1:
        raise ArgumentError("num_experts", f"must be at least 1, got {num_experts}")
    if not 1 <= expert_size <= ffn_width:
        raise ArgumentError("expert_size", f"must be 1 to the dense width {ffn_width}, got {expert_size}")
    if not 0 <= num_shared <= expert_size:
        raise ArgumentError("num_shared", f"must be 0 to the expert size {expert_size}, got {num_shared}")
    if tied and num_shared == expert_size:
        raise ArgumentError(
            "num_shared", f"must be less than the expert size {expert_size} to be tied, got {num_shared}"
        )
    needed = num_experts * (expert_size - num_shared) + num_shared
    if needed > ffn_width and not overlapping:
        raise UserError(
            f"{num_experts} experts of {expert_size} neurons, {num_shared} of them shared, need {needed}"
            f" neurons, but the model's layers have {ffn_width}: take smaller experts or share more"
        )


def random_scores(num_layers: int, ffn_width: int, *, seed: int = 0) -> Tensor:
    """Return float32 [L, F] scores that make `split_neurons` a random split, each layer in its own order.

    Drawn from a generator of its own; the global random state is neither read nor moved.
    """
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(ffn_width, generator=generator) for _ in range(num_layers)]).float()


def narrow(teacher: PreTrainedModel, scores_LF: Tensor, num_neurons: int) -> PreTrainedModel:
    """A dense model of the cost of experts of `num_neurons`: each layer keeps so many, the best scored.

    Args:
        teacher: as for `narrow_ffns`.
        scores_LF: of its neurons.
        num_neurons: of each layer of the result.
    """
    order_LF = scores_LF.argsort(dim=1, descending=True, stable=True)
    return narrow_ffns(teacher, order_LF[:, :num_neurons])


def token_counts(dataset: Dataset, vocab_size: int) -> Tensor:
    """Count how often each token id occurs, padding left out.

    Args:
        dataset: tokenized, with "input_ids" and, if any are padded, "attention_mask".
        vocab_size: V.

    Returns:
        int64 [V].

    Raises:
        UserError: an id is not in the vocabulary.
    """
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for rows in dataset.iter(batch_size=1000):
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows["input_ids"]])
        if "attention_mask" in rows:
            ids = ids[np.concatenate([np.asarray(row) for row in rows["attention_mask"]]) != 0]
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise UserError(
                f"the data has token ids from {ids.min()} to {ids.max()}, but the model's vocabulary has"
                f" {vocab_size}: tokenize with the model's own tokenizer"
            )
        counts_V += np.bincount(ids, minlength=vocab_size)
    return torch.from_numpy(counts_V)


def adapt(
    teacher: PreTrainedModel,
    importance: Importance | Tensor,
    *,
    num_experts: int = 4,
    expert_size: int | None = None,
    num_shared: int | None = None,
    tie_shared: bool = False,
    routing: str = defaults.ROUTING_WITHOUT_DATA,
    top_k: int = 1,
    seed: int = 0,
    token_counts_V: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Make a MoE model of a fine-tuned one; the teacher is left as it is.

    Args:
        teacher: an encoder with any head that `to_moe` knows.
        importance: of the teacher, or scores_LF from elsewhere such as `random_scores`; for "hash-affinity",
            an importance with token scores.
        num_experts: E.
        expert_size: neurons of one expert; None for `default_sizes`.
        num_shared: how many of them all experts have; None for two thirds of the expert size.
        tie_shared: store these once, and keep them the same in all experts.
        routing: "hash-random", "hash-balance", "hash-affinity", "gate-token" or "gate-sentence".
        top_k: experts per token.
        seed: of random hash tables, those that "hash-affinity" starts from included, and of a gate's first
            weights.
        token_counts_V: how often each token occurs in training; needed by "hash-balance" and "hash-affinity".
        progress: called with (layers done, layers in all) by "hash-affinity", which takes its time.

    Returns:
        The model, in the teacher's mode and on its device.

    Raises:
        TypeError: an argument is of another kind.
        UserError: importance or sizes do not fit the teacher, or token scores or counts are missing.
    """
    ffns = find_ffns(teacher)
    width = ffns[0].w1.out_features
    if not isinstance(importance, Importance):
        if not isinstance(importance, Tensor):
            raise TypeError(
                "importance must be an Importance, which Importance.load reads from a file, or a tensor of "
                f"scores, got {type(importance).__name__}"
            )
        importance = Importance(importance, "", "", 0)
    importance.check(teacher)
    check_whole("num_experts", num_experts)
    if expert_size is None:
        expert_size = default_sizes(width, num_experts)[0]
    if num_shared is None:
        num_shared = round(expert_size * 2 / 3)
    check_whole("expert_size", expert_size)
    check_whole("num_shared", num_shared)
    if routing in COUNTING_ROUTINGS and token_counts_V is None:
        raise UserError(f"{routing} needs token_counts_V, how often each token occurs in training")
    tables_LV = None
    if routing == "hash-affinity":
        assert token_counts_V is not None
        check_sizes(width, num_experts, expert_size, num_shared, overlapping=True, tied=tie_shared)
        split = split_by_affinity(
            importance,
            token_counts_V,
            num_experts=num_experts,
            expert_size=expert_size,
            num_shared=num_shared,
            seed=seed,
            progress=progress,
        )
        index_LEF, tables_LV = split.index_LEF, split.tables_LV
    else:
        check_sizes(width, num_experts, expert_size, num_shared, tied=tie_shared)
        index_LEF = split_neurons(importance.scores_LF, num_experts, expert_size, num_shared)
        if routing == "hash-balance":
            assert token_counts_V is not None
            tables_LV = hash_balance_tables(len(ffns), token_counts_V, num_experts)
    return to_moe(
        teacher,
        index_LEF,
        num_shared_neurons=num_shared,
        tie_shared=tie_shared,
        routing=routing,
        tables_LV=tables_LV,
        top_k=top_k,
        seed=seed,
    )
