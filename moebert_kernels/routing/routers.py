"""Routers: a fixed hash of the token id, or a learned gate over tokens or sentences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moebert_kernels.checks import check_tensor, check_whole
from moebert_kernels.routing.plan import RoutingPlan


class RouterOutput(NamedTuple):
    """A router's decision for the T tokens of a batch.

    Attributes:
        plan: which expert each token uses.
        gate_TK: the probability the expert's whole output is multiplied by; None for a hash, whose
            experts weigh 1/K each.
        balance_loss: scalar E * sum_e P_e * f_e over real tokens (Switch); None for a hash.
    """

    plan: RoutingPlan
    gate_TK: Tensor | None
    balance_loss: Tensor | None


def load_balance_loss(probs_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """E * sum_e P_e * f_e: 1 when balanced, up to E when one expert takes all.

    P_e is the mean gate probability of expert e and f_e the share of slots sent to it, both over tokens
    that have an expert. The gradient flows through P alone.

    Args:
        probs_TE: gate probabilities of every expert.
        expert_ids_TK: int, -1 for no expert.

    Returns:
        A scalar in float32 or wider; 0 when no token has an expert.
    """
    num_experts = probs_TE.shape[1]
    probs_TE = probs_TE.to(torch.promote_types(probs_TE.dtype, torch.float32))
    real_T = (expert_ids_TK >= 0).any(1)
    experts_E = torch.arange(num_experts, device=expert_ids_TK.device)
    slots_E = (expert_ids_TK.unsqueeze(-1) == experts_E).sum((0, 1)).to(probs_TE.dtype)
    share_E = slots_E / slots_E.sum().clamp(min=1)
    # where, not a product: the gate of a padding row may be NaN.
    mean_probs_E = torch.where(real_T.unsqueeze(1), probs_TE, 0).sum(0) / real_T.sum().clamp(min=1)
    return num_experts * (mean_probs_E * share_E).sum()


class HashRouter(nn.Module):
    """The expert is looked up by token id in a table that travels with the weights.

    Args:
        table_V: integer [V], the expert of every token id, each in [0, num_experts).
        num_experts: E.

    Raises:
        ValueError: `table_V` is not one-dimensional or names an expert outside [0, E).
        RuntimeError: `load_state_dict` is given such a table.
    """

    table_V: Tensor

    def __init__(self, table_V: Tensor, num_experts: int):
        super().__init__()
        check_tensor("table_V", table_V)
        check_whole("num_experts", num_experts, least=1)
        if table_V.dim() != 1 or table_V.is_floating_point():
            raise ValueError(f"table_V must be integer [V], got {table_V.dtype} {tuple(table_V.shape)}")
        if error := _out_of_range(table_V, num_experts):
            raise ValueError(error)
        self.num_experts = num_experts
        self.register_buffer("table_V", table_V.to(torch.int32))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        table_V = state_dict.get(f"{prefix}table_V")
        if isinstance(table_V, Tensor) and (error := _out_of_range(table_V, self.num_experts)):
            # Loaded, it would send its tokens to no expert without a word.
            errors.append(f"{prefix}{error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(self, x_BSD: Tensor, input_ids: Tensor | None, mask_BS: Tensor | None = None) -> RouterOutput:
        """Route by `input_ids` (the shape of `x_BSD` without its last axis); hidden states are not read.

        Raises:
            ValueError: `input_ids` is None: a hash has nothing else to route by.
        """
        if input_ids is None:
            raise ValueError(
                "hash routing needs input_ids; embeddings alone (inputs_embeds) cannot be routed"
            )
        (plan,) = RoutingPlan.from_input_ids(input_ids, self.table_V.unsqueeze(0), self.num_experts, mask_BS)
        return RouterOutput(plan, None, None)

    def extra_repr(self) -> str:
        """Show the table's size."""
        return f"vocab_size={self.table_V.shape[0]}, num_experts={self.num_experts}"


def _out_of_range(table_V: Tensor, num_experts: int) -> str | None:
    if table_V.device.type == "meta" or not table_V.numel():
        return None
    low, high = int(table_V.min()), int(table_V.max())
    if low >= 0 and high < num_experts:
        return None
    return f"table_V must name experts in [0, {num_experts}), found {low} to {high}"


class _Gate(nn.Module):
    """A linear gate without bias; subclasses say what it looks at."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 1, *, device=None, dtype=None):
        super().__init__()
        check_whole("hidden_size", hidden_size, least=1)
        check_whole("num_experts", num_experts, least=1)
        check_whole("top_k", top_k)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie in [1, num_experts={num_experts}], got {top_k}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    def _logits(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"x must end in hidden_size={self.hidden_size}, got shape {tuple(x.shape)}")
        return self.gate(x)

    def _choose(self, logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs_NE = logits_NE.softmax(-1, dtype=torch.promote_types(logits_NE.dtype, torch.float32))
        gate_NK, expert_ids_NK = probs_NE.topk(self.top_k, dim=-1)
        return probs_NE, gate_NK, expert_ids_NK

    @staticmethod
    def _output(
        probs_TE: Tensor, gate_TK: Tensor, expert_ids_TK: Tensor, mask_T: Tensor | None
    ) -> RouterOutput:
        if mask_T is not None:
            expert_ids_TK = torch.where(mask_T.unsqueeze(1), expert_ids_TK, -1)
            gate_TK = torch.where(mask_T.unsqueeze(1), gate_TK, 0)
        plan = RoutingPlan.from_expert_ids(expert_ids_TK, probs_TE.shape[1])
        return RouterOutput(plan, gate_TK, load_balance_loss(probs_TE, expert_ids_TK))


class TokenGate(_Gate):
    """`gate-token`: each token picks its K most probable experts, p = softmax(x W_g) (Eq. 3).

    Args:
        hidden_size: D of what it routes by.
        num_experts: E.
        top_k: K, the experts of a token. Their K probabilities, of a softmax over all E, are not scaled to
            add up to 1.

    Raises:
        TypeError: an argument is no whole number.
        ValueError: a size is less than 1, or K more than E.
    """

    def forward(
        self, x_BSD: Tensor, input_ids: Tensor | None = None, mask_BS: Tensor | None = None
    ) -> RouterOutput:
        """Route by hidden states `x_BSD` (any leading shape); `mask_BS` is nonzero at real tokens.

        Raises:
            ValueError: `x_BSD` does not end in the gate's hidden size.
        """
        probs_TE, gate_TK, expert_ids_TK = self._choose(self._logits(x_BSD.reshape(-1, x_BSD.shape[-1])))
        mask_T = None if mask_BS is None else mask_BS.reshape(-1) != 0
        return self._output(probs_TE, gate_TK, expert_ids_TK, mask_T)


class SentenceGate(_Gate):
    """`gate-sentence`: all tokens of a sentence go where its mean over real tokens points.

    A sentence is routed alike alone and in a batch, whatever its padding.

    Args:
        hidden_size: D of what it routes by.
        num_experts: E.
        top_k: K, the experts of a token. Their K probabilities, of a softmax over all E, are not scaled to
            add up to 1.

    Raises:
        TypeError: an argument is no whole number.
        ValueError: a size is less than 1, or K more than E.
    """

    def forward(
        self, x_BSD: Tensor, input_ids: Tensor | None = None, mask_BS: Tensor | None = None
    ) -> RouterOutput:
        """Route by hidden states `x_BSD` [B, S, D]; `mask_BS` is nonzero at real tokens.

        Raises:
            ValueError: `x_BSD` is not [B, S, D], or the mask not [B, S].
        """
        if x_BSD.dim() != 3:
            raise ValueError(
                f"a sentence gate needs x of shape [B, S, D] to know its sentences, got {tuple(x_BSD.shape)}"
            )
        sentence_length = x_BSD.shape[1]
        if mask_BS is None:
            mean_BD, mask_T = x_BSD.mean(1), None
        elif mask_BS.shape != x_BSD.shape[:2]:
            raise ValueError(
                f"mask_BS must have shape {tuple(x_BSD.shape[:2])} as x_BSD has, got {tuple(mask_BS.shape)}"
            )
        else:
            real_BS1 = (mask_BS != 0).unsqueeze(-1)
            # where, not a product: a padding row may hold anything, NaN included.
            total_BD = torch.where(real_BS1, x_BSD, 0).sum(1)
            mean_BD, mask_T = total_BD / real_BS1.sum(1).clamp(min=1), real_BS1.reshape(-1)
        probs_TE, gate_TK, expert_ids_TK = (
            v.repeat_interleave(sentence_length, 0) for v in self._choose(self._logits(mean_BD))
        )
        return self._output(probs_TE, gate_TK, expert_ids_TK, mask_T)

    def route_rows(self, x_ND: Tensor, sentence_N: Tensor, num_sentences: int) -> RouterOutput:
        """Route tokens without padding, the same way.

        Args:
            x_ND: of the tokens of all sentences, in any order.
            sentence_N: int64, which sentence each is of; `num_sentences` for none, and so without an expert.
            num_sentences: how many there are.

        Raises:
            ValueError: `x_ND` is not [N, D].
        """
        if x_ND.dim() != 2 or sentence_N.shape != x_ND.shape[:1]:
            raise ValueError(
                f"x_ND must be [N, D] and sentence_N [N], got {tuple(x_ND.shape)} and "
                f"{tuple(sentence_N.shape)}"
            )
        sentence_B1 = torch.arange(num_sentences, device=sentence_N.device).unsqueeze(1)
        # A product, not a sum by index: it adds up in the same order every time, on any device.
        of_BN = sentence_N == sentence_B1
        mean_BD = of_BN.to(x_ND.dtype) @ x_ND / of_BN.sum(1, keepdim=True).clamp(min=1)
        which_N = sentence_N.clamp(max=num_sentences - 1)
        probs_NE, gate_NK, expert_ids_NK = (
            v.index_select(0, which_N) for v in self._choose(self._logits(mean_BD))
        )
        return self._output(probs_NE, gate_NK, expert_ids_NK, sentence_N < num_sentences)
