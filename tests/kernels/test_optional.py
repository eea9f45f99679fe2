"""Triton is optional: the package imports and computes without it."""

import sys
import warnings

import torch

from moebert_kernels.kernels import torch as plain
from moebert_kernels.ops import backends
from tests.forked import python

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from moebert_kernels import MoEFFN, RoutingPlan
plan = RoutingPlan.from_expert_ids(torch.tensor([0, 1, -1]), 2)
MoEFFN(8, 8, 2)(torch.randn(3, 8), routing=plan).sum().backward()
"""


def test_import_and_use_without_triton():
    done = python("-c", WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr


def choose_twice():
    """The backends of two CUDA tensors, chosen as if none had been before, and what was warned of."""
    backends._triton_backend.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = [backends.on_cuda(torch.empty(0)) for _ in range(2)]
    backends._triton_backend.cache_clear()
    return chosen, [str(warning.message) for warning in caught]


def test_cuda_without_triton_warns_once_and_takes_the_pytorch_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "moebert_kernels.kernels.triton", None)
    monkeypatch.delattr("moebert_kernels.kernels.triton", raising=False)
    monkeypatch.setattr(backends, "why_not_triton", lambda device: None)
    chosen, (warning,) = choose_twice()
    assert chosen == [plain, plain]
    assert "Triton cannot be imported" in warning


def test_a_device_that_the_kernels_do_not_serve_takes_the_pytorch_path(monkeypatch):
    """A T4 was said not to be served, and sent to the kernels all the same."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    chosen, (warning,) = choose_twice()
    assert chosen == [plain, plain]
    assert "needs compute capability 8.0, Tesla T4 has 7.5" in warning
