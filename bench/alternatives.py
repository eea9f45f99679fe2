"""Ways to choose neurons, tables and biases that the package does not have, to compare it with.

All of them look at the tokens that the product's fit sees. Notation as in the package; G groups of token ids
that are routed as one, t the tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels.activations import activate
from moebert_kernels.compress.data.batching import LABEL_COLUMNS
from moebert_kernels.compress.experts.affinity import DEFAULT_MAX_LOAD
from moebert_kernels.compress.experts.assignment import assign, loads
from moebert_kernels.compress.experts.layerwise import evaluating, forward_replaced
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models import find_ffns, is_moe
from moebert_kernels.models.families import DenseFFN
from moebert_kernels.routing import RoutingPlan
from moebert_kernels.routing.routers import RouterOutput

Batch = dict[str, Tensor]
_BLOCK = 16384  # tokens


@dataclass(frozen=True)
class Seen:
    """What a layer of the teacher sees and how its errors count, padding left out.

    Attributes:
        x_TD: inputs of the feed-forward network.
        sum_TD: what is normalised in the end.
        weight_T: of the squared error of each token.
        ids_T: the token ids.
    """

    x_TD: Tensor
    sum_TD: Tensor
    weight_T: Tensor
    ids_T: Tensor


def layers_see(teacher: PreTrainedModel, batches: list[Batch]) -> list[Seen]:
    """Run the teacher on batches and return what each of its layers sees."""
    return _see(teacher, [ffn.w1 for ffn in find_ffns(teacher)], teacher, batches)


def experts_see(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Batch]) -> list[Seen]:
    """The same of a student's own inputs."""
    return _see(student, experts_of(student), teacher, batches)


def experts_of(student: PreTrainedModel) -> list[MoEFFN]:
    """The layers' experts, in order."""
    return [module for module in student.modules() if isinstance(module, MoEFFN)]


def _see(
    model: PreTrainedModel, parts: list[Any], teacher: PreTrainedModel, batches: list[Batch]
) -> list[Seen]:
    ffns = find_ffns(teacher)
    found_L: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ffns]
    ids = []
    with evaluating(model, teacher), ExitStack() as hooks:
        x_L = hooks.enter_context(_caught(parts))
        sum_L = hooks.enter_context(_caught([ffn.norm for ffn in ffns]))
        for batch in batches:
            run(teacher, batch)
            if model is not teacher:
                run(model, batch)
            real_BS = batch["attention_mask"] != 0
            ids.append(batch["input_ids"][real_BS])
            for found, x_BSD, sum_BSD in zip(found_L, x_L, sum_L, strict=True):
                found.append((x_BSD[real_BS], sum_BSD[real_BS]))
    seen = []
    for ffn, found in zip(ffns, found_L, strict=True):
        x_TD, sum_TD = (torch.cat(parts) for parts in zip(*found, strict=True))
        seen.append(Seen(x_TD, sum_TD, _weights(sum_TD, ffn), torch.cat(ids)))
    return seen


def run(model: PreTrainedModel, batch: Batch) -> Any:
    """Run a model on a batch, labels left out; padded, as the teacher it is compared with token by token."""
    padded = {"pack": False} if is_moe(model.config) else {}
    return model(**{name: value for name, value in batch.items() if name not in LABEL_COLUMNS}, **padded)


@contextmanager
def _caught(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The last input of each module."""
    caught: list[Tensor] = [torch.empty(0)] * len(modules)
    with ExitStack() as hooks:
        for index, module in enumerate(modules):

            def hook(module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                caught[index] = args[0]

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield caught


def _weights(sum_TD: Tensor, ffn: DenseFFN) -> Tensor:
    return 1 / (sum_TD.var(-1, correction=0) + ffn.norm.eps)


def products(seen: Seen, dense: DenseFFN, expert_T: Tensor, num_experts: int) -> Tensor:
    """Weighted sums of products of dense activations, float64 [E, F + 1, F + 1]; last the bias."""
    width = dense.w1.out_features
    products_EGG = torch.zeros(num_experts, width + 1, width + 1, dtype=torch.float64)
    with torch.no_grad():
        for e in range(num_experts):
            for tokens in (expert_T == e).nonzero().squeeze(1).split(_BLOCK):
                root_t1 = seen.weight_T[tokens].sqrt().unsqueeze(1)
                a_tF = activate(dense.activation, F.linear(seen.x_TD[tokens], dense.w1.weight, dense.w1.bias))
                a_tG = torch.cat([a_tF * root_t1, root_t1], 1)
                products_EGG[e] += a_tG.T @ a_tG
    return products_EGG


def greedy_neurons(
    products_GG: Tensor, dense: DenseFFN, count: int, first: Tensor | None = None, *, ridge: float = 0.003
) -> Tensor:
    """Choose neurons one by one, each the one that, with all output weights fitted anew, explains most.

    Forward selection with compensation (column subset selection) by a Cholesky factor that grows.

    Args:
        products_GG: of the tokens to be explained, see `products`.
        dense: the network whose output is to be explained.
        count: how many to choose.
        first: such as are chosen already.
        ridge: keeps neurons that others explain from being divided by nothing; in units of the mean square.

    Returns:
        int64 [count], `first` first.
    """
    with torch.no_grad():
        w_GD = torch.cat([dense.w2.weight.T, dense.w2.bias[None]]).double()
        rest_GG, wanted_GD = products_GG.clone(), products_GG @ w_GD
    mean_square = float(products_GG.diagonal()[:-1].mean())
    rest_GG.diagonal()[:-1].add_(ridge * mean_square)
    free_G = torch.ones(len(rest_GG), dtype=torch.bool)
    chosen: list[int] = []

    def take(g: int) -> None:
        root = rest_GG[g, g].sqrt()
        column_G = rest_GG[:, g] / root
        wanted_GD.sub_(torch.outer(column_G, wanted_GD[g] / root))
        rest_GG.sub_(torch.outer(column_G, column_G))
        free_G[g] = False

    take(len(rest_GG) - 1)  # the bias
    for g in [] if first is None else first.tolist():
        take(g)
        chosen.append(g)
    while len(chosen) < count:
        gain_G = wanted_GD.square().sum(1) / rest_GG.diagonal().clamp(min=1e-9 * mean_square)
        g = int(gain_G.masked_fill(~free_G, -1).argmax())
        take(g)
        chosen.append(g)
    return torch.tensor(chosen)


def means_of_cut(
    student: PreTrainedModel,
    index_LEF: Tensor,
    products_of: Callable[[int], Tensor],
    teacher: PreTrainedModel,
) -> None:
    """Add to each expert's bias what the neurons that it lacks put out in the mean; in place.

    Args:
        student: as it was cut.
        index_LEF: its neurons.
        products_of: gives a layer's `products`.
        teacher: of the student.
    """
    experts = experts_of(student)
    biases = [part.bias2_ED for part in experts] if experts else [f.w2.bias[None] for f in find_ffns(student)]
    with torch.no_grad():
        for layer, (dense, bias_ED) in enumerate(zip(find_ffns(teacher), biases, strict=True)):
            for e, products_GG in enumerate(products_of(layer)):
                mean_F = products_GG[-1, :-1] / products_GG[-1, -1].clamp(min=1e-300)
                mean_F[index_LEF[layer, e]] = 0
                assert bias_ED is not None
                bias_ED[e] += (dense.w2.weight.double() @ mean_F).to(bias_ED.dtype)


def errors_of_experts(part: MoEFFN, seen: Seen) -> Tensor:
    """The weighted squared error [T, E] of each expert on each token."""
    errors_TE = torch.empty(len(seen.x_TD), part.num_experts)
    with torch.no_grad():
        for tokens in torch.arange(len(seen.x_TD)).split(_BLOCK):
            z_tED = _sums(part, seen.x_TD[tokens])
            lacking_tED = z_tED - (seen.sum_TD[tokens] - seen.x_TD[tokens]).unsqueeze(1)
            errors_TE[tokens] = lacking_tED.square().sum(2) * seen.weight_T[tokens].unsqueeze(1)
    return errors_TE


def _sums(part: MoEFFN, x_TD: Tensor) -> Tensor:
    """What each expert puts out before residual and LayerNorm, [T, E, D]."""
    assert part.bias1_EF is not None
    assert part.bias2_ED is not None
    weights = zip(part.w1_EFD, part.bias1_EF, part.w2_EDF, part.bias2_ED, strict=True)
    outputs = [
        F.linear(activate(part.activation, F.linear(x_TD, w1_FD, b1_F)), w2_DF, b2_D)
        for w1_FD, b1_F, w2_DF, b2_D in weights
    ]
    return torch.stack(outputs, 1)


def tables_by_error(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: list[Batch],
    group_V: Tensor,
    tables_LV: Tensor,
) -> Tensor:
    """Give each group of token ids the fitted expert whose error on it is least, as far as loads allow."""
    tables = []
    layers = zip(experts_of(student), experts_see(student, teacher, batches), tables_LV, strict=True)
    for part, seen, table_V in layers:
        group_T = group_V[seen.ids_T]
        num_groups = int(group_V.max()) + 1
        start_G = torch.zeros(num_groups, dtype=torch.int64)
        start_G[group_V] = table_V.long()
        counts_G = group_T.bincount(minlength=num_groups)
        error_GE = torch.zeros(num_groups, part.num_experts, dtype=torch.float64)
        error_GE.index_add_(0, group_T, errors_of_experts(part, seen).double())
        capacity = max(
            int(DEFAULT_MAX_LOAD * int(counts_G.sum()) / part.num_experts),
            int(loads(start_G, counts_G, part.num_experts).max()),
        )
        tables.append(assign(-error_GE, counts_G, capacity, start_G)[group_V])
    return torch.stack(tables).to(torch.int32)


class Oracle:
    """Lets every token of a student use, in every layer, the expert that errs least there: a ceiling.

    Args:
        student: with hash tables.
        teacher: says, batch by batch, what is right.

    Attributes:
        error_L: of each layer, what share of its output was wrong so far, as the fit counts it.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        self.config, self.device = student.config, student.device
        self._student, self._teacher = student, teacher
        self._ffns, self._parts = find_ffns(teacher), experts_of(student)
        self._wrong_L = [0.0] * len(self._parts)
        self._whole_L = [0.0] * len(self._parts)

    def eval(self) -> Oracle:
        """It is never trained."""
        return self

    def __call__(self, **batch: Tensor) -> Any:
        """What the student says."""
        with evaluating(self._student, self._teacher), ExitStack() as changed:
            sum_L = changed.enter_context(_caught([ffn.norm for ffn in self._ffns]))
            run(self._teacher, batch)
            for layer, part in enumerate(self._parts):
                changed.enter_context(forward_replaced(part, self._choosing(layer, part, sum_L[layer])))
            return run(self._student, batch)

    @property
    def error_L(self) -> list[float]:
        """See the class."""
        return [wrong / whole for wrong, whole in zip(self._wrong_L, self._whole_L, strict=True)]

    def _choosing(self, layer: int, part: MoEFFN, sum_BSD: Tensor) -> Callable[..., Tensor]:
        compute = part.forward
        ffn = self._ffns[layer]

        def forward(x_BSD: Tensor, *, routing: RouterOutput) -> Tensor:
            x_TD, sum_TD = x_BSD.flatten(0, -2), sum_BSD.flatten(0, -2)
            ids_TK = routing.plan.expert_ids_TK
            real_T = ids_TK[:, 0] >= 0
            seen = Seen(x_TD, sum_TD, _weights(sum_TD, ffn), ids_TK)
            least_T, best_T = errors_of_experts(part, seen).min(1)
            variance_T = sum_TD.var(1, correction=0)
            self._wrong_L[layer] += float(least_T[real_T].sum())
            self._whole_L[layer] += float((seen.weight_T * variance_T)[real_T].sum()) * sum_TD.shape[1]
            ids_T = torch.where(real_T, best_T, -1)
            return compute(x_BSD, routing=RoutingPlan.from_expert_ids(ids_T, part.num_experts))

        return forward
