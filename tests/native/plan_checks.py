"""What a routing plan must be, by torch.sort alone, and ids to try a builder with; a size is (L, S, E)."""

from __future__ import annotations

import torch


def sorted_plans(expert_ids_LS, num_experts):
    """What must come out, by torch.sort alone: experts, order, inverse, counts, offsets."""
    routed_LS = (expert_ids_LS >= 0) & (expert_ids_LS < num_experts)
    keys_LS = torch.where(routed_LS, expert_ids_LS, num_experts).long()
    order_LS = keys_LS.sort(dim=1, stable=True).indices
    inverse_LS = order_LS.argsort(dim=1)
    counts_LE = torch.stack([row_S.bincount(minlength=num_experts + 1)[:num_experts] for row_S in keys_LS])
    offsets_LE1 = torch.nn.functional.pad(counts_LE.cumsum(1), (1, 0))
    experts_LS = torch.where(routed_LS, expert_ids_LS, -1)
    return [t.to(torch.int32) for t in (experts_LS, order_LS, inverse_LS, counts_LE, offsets_LE1)]


def looked_up(input_ids_T, tables_LV, mask_T):
    """The expert ids [L, T] of a token case, and the number of its unmasked ids outside the tables."""
    real_T = torch.ones_like(input_ids_T, dtype=torch.bool) if mask_T is None else mask_T
    known_T = (input_ids_T >= 0) & (input_ids_T < tables_LV.shape[1])
    experts_LT = tables_LV[:, torch.where(known_T, input_ids_T, 0).long()]
    return torch.where(known_T & real_T, experts_LT, -1), int((real_T & ~known_T).sum())


def assert_same_plans(plans, expected):
    names = ("expert_ids_LS", "order_LS", "inverse_LS", "counts_LE", "offsets_LE1")
    for name, wanted in zip(names, expected, strict=True):
        found = getattr(plans, name)
        assert found.dtype == torch.int32, name
        assert found.is_contiguous(), name
        assert torch.equal(found.cpu(), wanted), name


def check_slots(plans, ids_LS, num_experts):
    """Plans from expert ids."""
    assert_same_plans(plans, sorted_plans(ids_LS, num_experts))
    assert plans.num_invalid is None


def check_tokens(plans, token_case, num_experts):
    """Plans from token ids, tables and a mask."""
    expert_ids_LT, num_invalid = looked_up(*token_case)
    assert_same_plans(plans, sorted_plans(expert_ids_LT, num_experts))
    assert plans.num_invalid == num_invalid


def random_slots(size, dtype, *, seed, manner="even", outside=True):
    """Expert ids [L, S]."""
    *shape, num_experts = size
    generator = torch.Generator().manual_seed(seed)
    return _random_ids(generator, shape, num_experts, dtype, manner, outside)


def random_tokens(size, dtype, *, seed, vocab_size=1000, manner="even", outside=True, masked=True):
    """Token ids [T], tables [L, V] and a mask [T] or None, for S = T."""
    num_layers, num_tokens, num_experts = size
    generator = torch.Generator().manual_seed(seed)
    ids_T = _random_ids(generator, (num_tokens,), vocab_size, dtype, manner, outside)
    tables_LV = _random_ids(generator, (num_layers, vocab_size), num_experts, torch.int32, "even", outside)
    mask_T = torch.rand(num_tokens, generator=generator) < 0.7 if masked else None
    return ids_T, tables_LV, mask_T


def _random_ids(generator, shape, limit, dtype, manner, outside):
    """Ids in [0, limit): even, mostly the first, or all the same; `outside` puts some out of range."""
    ids = torch.randint(limit, shape, generator=generator)
    if manner == "skewed":
        ids[torch.rand(shape, generator=generator) < 0.9] = 0
    elif manner == "one":
        ids[:] = int(torch.randint(limit, (), generator=generator))
    if outside:
        info = torch.iinfo(dtype)
        wrong = torch.tensor([-1, -2, limit, limit + 1, info.min, info.max])
        wrong = wrong[torch.randint(len(wrong), shape, generator=generator)]
        ids = torch.where(torch.rand(shape, generator=generator) < 0.1, wrong, ids)
    return ids.to(dtype)
