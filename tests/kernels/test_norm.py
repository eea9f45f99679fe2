"""Dropout inside `expert_norm`'s kernels: drawn from the seed alone, the same in backward as in forward."""

import pytest
import torch

from moebert_kernels import RoutingPlan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy on Triton's index conversions
pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels.kernels.call import Call  # noqa: E402
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
    of_plan = plan.expert_ids_TK, plan.order_S, plan.inverse_S, plan.offsets_E1
    w1_EFD, w2_EDF = torch.zeros(E, 1, D, device=device), torch.zeros(E, D, 1, device=device)
    experts = w1_EFD, None, w2_EDF, None
    return Call(residual_TD, *of_plan, *experts, gate_TK, ln_w_ED, ln_b_ED), z_SD


def dropping(call, seed):
    return call._replace(seed=torch.tensor([seed], device=call.x_TD.device), dropout_p=P)


def mask_of(call, seed):
    """The factors dropout multiplied z with, read off a gradient: dz / du."""
    call, z_SD = dropping(call[0], seed), call[1]
    dy_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(z_SD.device)
    _, stats_2S = expert_norm_forward(call, z_SD)
    dz_SD, *_ = expert_norm_backward(call, z_SD, stats_2S, dy_TD, False)
    return (dz_SD != 0).float() / (1 - P)


def test_forward_and_backward_draw_the_same_mask(call):
    seed = 2**40 + 3
    keep_SD = mask_of(call, seed)
    call, z_SD = call
    found = expert_norm_forward(dropping(call, seed), z_SD)
    torch.testing.assert_close(found, expert_norm_forward(call, z_SD * keep_SD))


def test_the_mask_keeps_its_share_and_follows_the_seed(call):
    keep_SD = mask_of(call, 5) > 0
    assert abs(keep_SD.float().mean().item() - (1 - P)) < 4 * (P * (1 - P) / keep_SD.numel()) ** 0.5
    assert torch.equal(keep_SD, mask_of(call, 5) > 0)
    for other in (6, 5 + 2**32):  # both halves of the seed count
        assert (keep_SD != (mask_of(call, other) > 0)).float().mean() > 0.3
    halves = keep_SD.view(-1, 2, D // 2)
    assert (halves[:, 0] != halves[:, 1]).float().mean() > 0.3
    assert (keep_SD[::2] != keep_SD[1::2]).float().mean() > 0.3
