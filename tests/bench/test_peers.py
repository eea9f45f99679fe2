"""The adapters of peers from source, called through stand-ins that do in PyTorch what the peers' calls mean.

The peers themselves need their sources and, but for scattermoe in Triton's interpreter, a GPU:
`bash bench/gpu.sh second --dry-run --only peers --peer-path FOLDER` runs what can run.
"""

import sys
from dataclasses import replace

import pytest

from bench import ceilings
from bench.baselines import from_source
from bench.cases import TOY
from bench.dispatch import DISPATCH
from bench.ffn import FFN
from bench.run import Settings, start

SCATTERMOE = """
from types import SimpleNamespace
import torch

kernels = SimpleNamespace(ops=SimpleNamespace(ALLOW_TF32=True))

def flatten_sort_count(expert_idxs, num_experts):
    experts, order = expert_idxs.reshape(-1).sort(stable=True)
    return experts, order, torch.searchsorted(experts, torch.arange(num_experts), right=True)

def parallel_linear(inputs, expert_weights, k, experts, order, ends, expert_biases, gates=None,
                    grouped_in=False, grouped_out=False):
    assert not kernels.ops.ALLOW_TF32
    rows = inputs if grouped_in else inputs[order // k]
    y = torch.einsum("sd,sdf->sf", rows, expert_weights[experts]) + expert_biases[experts]
    y = y if grouped_out else y[order.argsort()]
    return y if gates is None else (y.unflatten(0, gates.shape) * gates.unsqueeze(2)).sum(1)
"""
TENSOR = """
import torch

def make_ragged_tensor_metadata(slice_sizes, n_total_rows):
    assert slice_sizes.dtype == torch.int32 and int(slice_sizes.sum()) == n_total_rows
    return torch.arange(len(slice_sizes)).repeat_interleave(slice_sizes)
"""
MATMUL = """
from collections import namedtuple
import torch

FnSpecs = namedtuple("FnSpecs", "name fn fn_arg_names")
FusedActivation = namedtuple("FusedActivation", "specs fn_args")
PrecisionConfig = namedtuple("PrecisionConfig", "allow_tf32")

def matmul(a, b, bias, a_ragged_metadata, precision_config, gather_indx=None, scatter_indx=None,
           fused_activation=None):
    assert bias.dtype == torch.float32 and not precision_config.allow_tf32
    rows = a if gather_indx is None else a[gather_indx]
    y = torch.einsum("sd,sdf->sf", rows, b[a_ragged_metadata]) + bias[a_ragged_metadata]
    if fused_activation is not None:
        assert fused_activation.specs.name == "gelu" and fused_activation.specs.fn_arg_names == ()
        y = torch.nn.functional.gelu(y)
    return y if scatter_indx is None else torch.zeros_like(y).index_copy(0, scatter_indx.long(), y)
"""
FILES = {
    "scattermoe/__init__.py": SCATTERMOE,
    "triton_kernels/__init__.py": "",
    "triton_kernels/tensor.py": TENSOR,
    "triton_kernels/matmul.py": MATMUL,
}


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """A folder of stand-ins; whatever was imported from it is forgotten."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(from_source, "_runs", lambda *_: True)
    yield str(tmp_path)
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("scattermoe", "triton_kernels")]:
        del sys.modules[name]


def rows(op, peers, only, **options):
    settings = Settings(rounds=1, probes=ceilings.TOY, peer_path=peers, only=only, threads=1, **options)
    return list(start(op, settings)[1])


@pytest.mark.parametrize("routing", ["skewed", "middle empty"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_ffn_is_what_the_peers_are_asked_for(peers, top_k, routing):
    pytest.importorskip("triton")
    request = replace(TOY, K=top_k, routings=(routing,))
    passes = ("forward", "dispatch+forward+backward")
    found = rows(FFN, peers, ("triton_kernels", "scattermoe"), request=request, passes=passes)
    reasons = {(row.entry, row.pass_): row.did_not_run for row in found}
    assert reasons == {
        ("triton_kernels", "forward"): None,
        ("scattermoe", "forward"): None,
        ("triton_kernels", "dispatch+forward+backward"): "has no backward pass",
        ("scattermoe", "dispatch+forward+backward"): None,
    }


def test_the_dispatch_is_what_scattermoe_is_asked_for(peers):
    (row,) = rows(DISPATCH, peers, ("scattermoe",), request=TOY)
    assert row.did_not_run is None
