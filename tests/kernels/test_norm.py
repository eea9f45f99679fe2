"""Dropout inside `expert_norm`'s kernels: drawn from the seed alone, the same in backward as in forward."""

import pytest
import torch

from moebert_kernels import RoutingPlan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy on Triton's index conversions
pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels.kernels.triton import expert_norm_backward, expert_norm_forward  # noqa: E402

T, K, D, E, P = 8, 2, 40, 3, 0.3


@pytest.fixture
def call(device, poisoned_memory):
    g = torch.Generator().manual_seed(0)
    z_SD, residual_TD = (torch.randn(n, D, generator=g).to(device) for n in (T * K, T))
    ln_w_ED, ln_b_ED, gate_TK = (
        torch.randn(shape, generator=g).to(device) for shape in ((E, D), (E, D), (T, K))
    )
    plan = RoutingPlan.from_expert_ids(torch.randint(0, E, (T, K), generator=g).to(device), E)
    return z_SD, residual_TD, (plan.expert_ids_TK, plan.order_S, plan.offsets_E1, ln_w_ED, ln_b_ED, gate_TK)


def mask_of(call, seed):
    """The factors dropout multiplied z with, read off a gradient: dz / du."""
    z_SD, residual_TD, rest = call
    seed = torch.tensor([seed], device=z_SD.device)
    dy_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(z_SD.device)
    _, stats_2S = expert_norm_forward(z_SD, residual_TD, *rest, seed, 1e-12, P)
    dz_SD, *_ = expert_norm_backward(dy_TD, z_SD, residual_TD, stats_2S, *rest, seed, P, False)
    return (dz_SD != 0).float() / (1 - P)


def test_forward_and_backward_draw_the_same_mask(call):
    z_SD, residual_TD, rest = call
    seed = 2**40 + 3
    keep_SD = mask_of(call, seed)
    y, stats = expert_norm_forward(
        z_SD, residual_TD, *rest, torch.tensor([seed], device=z_SD.device), 1e-12, P
    )
    expected = expert_norm_forward(z_SD * keep_SD, residual_TD, *rest, None, 1e-12, 0.0)
    for a, b in zip((y, stats), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_mask_keeps_its_share_and_follows_the_seed(call):
    keep_SD = mask_of(call, 5) > 0
    assert abs(keep_SD.float().mean().item() - (1 - P)) < 4 * (P * (1 - P) / keep_SD.numel()) ** 0.5
    assert torch.equal(keep_SD, mask_of(call, 5) > 0)
    for other in (6, 5 + 2**32):  # both halves of the seed count
        assert (keep_SD != (mask_of(call, other) > 0)).float().mean() > 0.3
    halves = keep_SD.view(-1, 2, D // 2)
    assert (halves[:, 0] != halves[:, 1]).float().mean() > 0.3
    assert (keep_SD[::2] != keep_SD[1::2]).float().mean() > 0.3
