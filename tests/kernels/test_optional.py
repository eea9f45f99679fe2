"""Triton is optional: the package imports and computes without it."""

import subprocess
import sys
import warnings

import pytest
import torch

from moebert_kernels.kernels import torch as plain
from moebert_kernels.ops import backends

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from moebert_kernels import MoEFFN, RoutingPlan
plan = RoutingPlan.from_expert_ids(torch.tensor([0, 1, -1]), 2)
MoEFFN(8, 8, 2)(torch.randn(3, 8), routing=plan).sum().backward()
"""


def test_import_and_use_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "moebert_kernels.kernels.triton", None)
    monkeypatch.delattr("moebert_kernels.kernels.triton", raising=False)
    monkeypatch.setattr(backends, "why_not_triton", lambda device: None)
    backends._triton_backend.cache_clear()
    yield
    backends._triton_backend.cache_clear()


def test_cuda_without_triton_warns_once_and_takes_the_pytorch_path(no_triton):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = [backends.on_cuda(torch.empty(0)) for _ in range(2)]
    assert chosen == [plain, plain]
    assert [str(w.message).count("Triton cannot be imported") for w in caught] == [1]


def test_a_device_that_the_kernels_do_not_serve_takes_the_pytorch_path(monkeypatch):
    """A T4 was said not to be served, and sent to the kernels all the same."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    backends._triton_backend.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = [backends.on_cuda(torch.empty(0)) for _ in range(2)]
    backends._triton_backend.cache_clear()
    assert chosen == [plain, plain]
    (warning,) = caught
    assert "needs compute capability 8.0, Tesla T4 has 7.5" in str(warning.message)
