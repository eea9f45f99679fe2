"""Checks one installation: `check_install.py none|cpu|cuda`, from outside the source tree."""

import subprocess
import sys
import warnings
from pathlib import Path

import torch

import moebert_kernels
from moebert_kernels import native

expected = sys.argv[1]
status = native.status()
assert (status.cpu, status.cuda) == (expected != "none", expected == "cuda"), status

ids_LS = torch.randint(-1, 4, (12, 5000))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plans = native.build_plans_from_expert_ids(ids_LS, 4)
    native.build_plans_from_expert_ids(ids_LS, 4)
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
place = Path(moebert_kernels.__file__).parent
print(f"ok: torch {torch.__version__}, Python {sys.version.split()[0]}, {place}\n    {status}")
