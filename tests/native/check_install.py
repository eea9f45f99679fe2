"""Checks one installation: `check_install.py none|cpu|cuda`, from outside the source tree."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import moebert_kernels
from moebert_kernels import native
from moebert_kernels.routing import native_plans

expected = sys.argv[1]
status = native.status()
assert (status.cpu, status.cuda) == (expected != "none", expected == "cuda"), status

ids_LS = torch.randint(-1, 4, (12, 5000))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plans = native_plans.from_expert_ids(ids_LS, 4)
    native_plans.from_expert_ids(ids_LS, 4)
if expected == "none":
    assert plans is None
    assert [w.category for w in caught] == [RuntimeWarning], caught
else:
    assert not caught, [str(w.message) for w in caught]
    keys_LS = torch.where(ids_LS < 0, 4, ids_LS)
    assert torch.equal(plans.order_LS.long(), keys_LS.sort(dim=1, stable=True).indices)
    import moebert_kernels._native as extension

    dynamic = subprocess.run(["readelf", "-d", extension.__file__], capture_output=True, text=True).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed, "readelf shows no dependencies"
    assert not [line for line in needed if "cuda" in line or "torch" in line], needed

plan = moebert_kernels.RoutingPlan.from_expert_ids(ids_LS[0], 4)
assert torch.equal(plan.order_S.long(), torch.where(ids_LS[0] < 0, 4, ids_LS[0]).sort(stable=True).indices)

# The layer, forward and backward, against itself in float64, which has no native path.
layer = moebert_kernels.MoEFFN(16, 24, 4, norm_eps=1e-5)
exact = copy.deepcopy(layer).double()
x_TD, dy_TD = torch.randn(2, 5000, 16)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    y_TD = layer(x_TD, routing=plan)
    y_TD.backward(dy_TD)
expected_TD = exact(x_TD.double(), routing=plan)
expected_TD.backward(dy_TD.double())
torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-4, atol=1e-4)
for found, wanted in zip(layer.parameters(), exact.parameters(), strict=True):
    assert (found.grad - wanted.grad).abs().max() < 1e-4 * wanted.grad.abs().max()

place = Path(moebert_kernels.__file__).parent
print(f"ok: torch {torch.__version__}, Python {sys.version.split()[0]}, {place}\n    {status}")
