"""Routing: which expert a token goes to, and the order in which experts read their tokens.

Masks are True (or 1) at real tokens and False (or 0) at padding, as transformers' attention_mask. Padding
gets expert -1, no expert; in the authors' code (moebert/moe_layer.py) it was routed and counted like words.
"""

import torch
from torch import Tensor


def hash_random_tables(
    num_layers: int, vocab_size: int, num_experts: int, generator: torch.Generator
) -> Tensor:
    """Random hash routing (Hash-r of Fig. 3): a token id goes to an expert drawn once, uniformly.

    Every layer has a table of its own, as in the authors' code (moe_layer.py, `_random_hash_list`).

    Returns:
        [L, V] int64 from 0 to E - 1.
    """
    return torch.randint(num_experts, (num_layers, vocab_size), generator=generator, device=generator.device)


def hash_balance_table(token_counts_V: Tensor, num_experts: int) -> Tensor:
    """Balanced hash routing (Hash-b of Fig. 3): the greedy assignment of the authors' hash_balance.py.

    Token ids by descending count (ties: lower id first), each to the expert with the smallest load so far,
    load being the counts given to it (ties: the expert with fewer ids, then the lower expert). An id never
    seen in training would add no load, and so all of them would go to one expert: they go to the expert with
    the fewest ids so far (ties: the lower expert). The authors drew these at random.

    Returns:
        [V] int64 from 0 to E - 1; the same table serves all layers.
    """
    counts = token_counts_V.tolist()
    load = [0] * num_experts
    num_ids = [0] * num_experts
    table = [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        if counts[token] > 0:
            expert = min(range(num_experts), key=lambda e: (load[e], num_ids[e], e))
        else:
            expert = min(range(num_experts), key=lambda e: (num_ids[e], e))
        table[token] = expert
        load[expert] += counts[token]
        num_ids[expert] += 1
    return torch.tensor(table, dtype=torch.int64, device=token_counts_V.device)


def hash_expert_ids(input_ids: Tensor, table_V: Tensor, mask: Tensor) -> Tensor:
    """Section 2, hash routing: the expert of a token is the table's entry for its id (Roller et al. 2021).

    Args:
        input_ids: integers of any shape with T elements, [B, S] as a rule.
        table_V: one layer's table.
        mask: of the shape of input_ids.

    Returns:
        expert_ids_TK, [T, 1]: -1 where masked.
    """
    return table_V[input_ids].masked_fill(~mask.bool(), -1).reshape(-1, 1)


def _choose(probs_TE: Tensor, top_k: int, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """The top_k most probable experts (ties: lower expert first) and their probabilities; -1, 0 if masked."""
    expert_ids_TK = probs_TE.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    gate_TK = probs_TE.gather(1, expert_ids_TK)
    return expert_ids_TK.masked_fill(~mask_T[:, None], -1), gate_TK.masked_fill(~mask_T[:, None], 0)


def gate_token(x_BSD: Tensor, w_ED: Tensor, top_k: int, mask_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3: p = softmax(W_g x_t); the top_k most probable experts, weighted by their p.

    The chosen probabilities are not renormalised: with K = 1 the gate would be 1 and learn nothing. The gate
    has no bias, as in the authors' code (moe_layer.py, `_forward_gate_token`).

    Returns:
        expert_ids_TK ([T, K] int64, most probable first), gate_TK, probs_TE (at all tokens, padding
        included). Masked tokens have expert -1 and gate 0.
    """
    probs_TE = torch.softmax(x_BSD.flatten(0, 1) @ w_ED.T, dim=-1)
    return *_choose(probs_TE, top_k, mask_BS.bool().flatten()), probs_TE


def gate_sentence(x_BSD: Tensor, w_ED: Tensor, top_k: int, mask_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 on the mean of a sentence's real tokens; all of its tokens go to the experts it chooses.

    From the authors' code (moe_layer.py, `_forward_gate_sentence`), which at batch size 1 left the gate out;
    here a sentence gives the same alone as in a batch.

    Returns:
        As `gate_token`; the tokens of a sentence have equal rows. A sentence with no real token has a uniform
        row in probs_TE.
    """
    mask_BS = mask_BS.bool()
    num_tokens_B = mask_BS.sum(dim=1).clamp(min=1)
    mean_BD = x_BSD.masked_fill(~mask_BS[:, :, None], 0).sum(dim=1) / num_tokens_B[:, None]
    probs_BE = torch.softmax(mean_BD @ w_ED.T, dim=-1)
    probs_TE = probs_BE.repeat_interleave(mask_BS.shape[1], dim=0)
    return *_choose(probs_TE, top_k, mask_BS.flatten()), probs_TE


def load_balance_loss(probs_TE: Tensor, expert_ids_TK: Tensor, mask_T: Tensor) -> Tensor:
    """E * sum over e of P_e f_e, over real tokens only (Fedus et al., arXiv 2101.03961, Eq. 4 to 6).

    P_e is the mean probability of expert e, f_e the fraction of all T_real * K slots that expert e got (with
    one expert per token, the fraction of tokens). It is 1 when both are uniform. The gradient reaches the
    probabilities alone.

    A sentence gate weighs here by tokens, which is what experts compute on. The authors weigh by sentences:
    pass a mask that is True at one token of each sentence.

    Returns:
        A scalar; 0 if no token is real.
    """
    probs_tE, expert_ids_tK = probs_TE[mask_T.bool()], expert_ids_TK[mask_T.bool()]
    num_tokens, num_experts = probs_tE.shape
    if num_tokens == 0:
        return probs_tE.sum()
    num_slots_E = torch.stack([(expert_ids_tK == e).sum() for e in range(num_experts)])
    f_E = num_slots_E.to(probs_tE.dtype) / expert_ids_tK.numel()
    return num_experts * (probs_tE.mean(dim=0) * f_E).sum()


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order the slots s = t * K + k by expert, so that each expert reads a contiguous run.

    The order is stable (slots of one expert stay in order of s) and slots without an expert come last, so it
    is a permutation of all S = T * K slots. The paper has no such step; it is moe_layer.py's argsort, made
    stable.

    Returns:
        order_S (the slot at each position), inverse_S (the position of each slot), counts_E (slots of each
        expert), offsets [E + 1] (expert e's run is offsets[e] to offsets[e + 1]; the last is the number of
        slots that have an expert). All int64.
    """
    expert_ids_S = expert_ids_TK.flatten()
    last = torch.full_like(expert_ids_S, num_experts)
    order_S = torch.where(expert_ids_S < 0, last, expert_ids_S).argsort(stable=True)
    inverse_S = order_S.argsort()
    counts_E = torch.stack([(expert_ids_S == e).sum() for e in range(num_experts)])
    offsets_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    return order_S, inverse_S, counts_E, offsets_E1
