"""Every committed config compiled for each GPU generation, without a GPU, and the binaries read.

In a process of its own: this one may have told Triton to interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels.kernels.triton.hopper.launches import MOST_EXPERTS
from tests import ROOT

READ = """
import dataclasses, json, sys
from bench import binaries
family, variants, code, of_size, options, *arithmetics = sys.argv[1:]
variants = [binaries.Variant(*choice) for choice in json.loads(variants)]
launches = binaries.distinct_launches(family, tuple(arithmetics), variants, **json.loads(options))
print(json.dumps([
    {"config": name, "limit": binaries.ARCHITECTURES[family].shared_per_program,
     "matrix": binaries.ARCHITECTURES[family].matrix_instruction}
    | dataclasses.asdict(binaries.read(launch, family, code=bool(code)))
    for name, of_config in launches.items()
    if name.endswith(of_size) or name.startswith("ieee")  # which is one for all sizes
    for launch in of_config
]))
"""
GEMMS = {
    "gather_kernel",
    "scatter_kernel",
    "gather_backward_kernel",
    "weight_grad_kernel",
    "weight_grad_stream_kernel",
}
PINGPONG = {"gather_pingpong_kernel", "scatter_pingpong_kernel", "gather_backward_pingpong_kernel"}

# Instructions for each element after the last product, at most: what follows it is not hidden by products.
EPILOGUES = {"gather_kernel": 36, "gather_backward_kernel": 30, "scatter_kernel": 8}


FULL = ((True, True, True),)
# Each choice with and without each other one.
VARIANTS = (*FULL, (True, False, False), (False, True, False), (False, False, True))
UNGATED = (True, False, True)  # which warp-specialised kernels know alone


def read(family, *arithmetics, variants=FULL, code=False, of_size="", **sizes):
    """What is read of every config, or of those of a size, "large" for example."""
    options = json.dumps(variants), "code" * code, of_size, json.dumps(sizes)
    printed = run("-c", READ, family, *options, *arithmetics)
    return json.loads(printed.splitlines()[-1])


def run(*arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


COUNT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from bench import binaries
from moebert_kernels.kernels.triton import configs
for arithmetic in ("ieee", "half"):
    config = configs.TABLE["sm_90", arithmetic, "large"]
    dtype = binaries.ELEMENT[arithmetic]
    for launch in binaries.launches(config, dtype):
        if launch.kernel.__name__ in ("gather_kernel", "scatter_kernel", "gather_backward_kernel"):
            print(arithmetic, binaries.compiled(launch, "sm_90").asm["ttir"].count("tt.dot "))
"""

# Of loops of one step, whose accumulators begin as a constant.
COUNT_CHAINS = """
import re, torch
from bench import binaries
from moebert_kernels.kernels.triton import configs
for launch in binaries.launches(configs.TABLE["sm_90", "ieee", "large"], torch.float32, D=13, F=29):
    if launch.kernel.__name__.startswith(("gather_kernel", "scatter", "gather_b")):
        ptx = binaries.compiled(launch, "sm_90").asm["ptx"]
        elements = launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"]
        chains = len(re.findall(r"fma.rn.f32.*, 0f00000000;", ptx))
        print(chains * 32 * launch.arguments["num_warps"] / elements)
"""


def check(readings):
    assert readings
    for r in readings:
        where = f"{r['kernel']} of {r['config']} on {r['arch']}"
        assert r["spilled_bytes"] == 0, f"{where} spills {r['spilled_bytes']} bytes"
        assert r["shared_bytes"] <= r["limit"], f"{where} takes {r['shared_bytes']} bytes of shared memory"
        assert r["programs"] >= 1, f"{where} does not fit a multiprocessor"
        if r["kernel"] in GEMMS | PINGPONG and not r["config"].startswith("ieee"):
            serialised = [number for number in r["warnings"] if number.startswith("C75")]
            assert not serialised, f"{where}: ptxas serialises its products ({serialised})"
            if r["matrix"] in r["instructions"]:
                most = 4 if r["kernel"] in PINGPONG else 2  # of which each consumer has half
                assert r["waits"] <= most, f"{where} waits {r['waits']} times for its products"


@pytest.mark.parametrize("family", ["sm_80", "sm_100"])
def test_half_precision(family):
    """The generation's own matrix instruction and no other, no spills, and it fits."""
    readings = read(family, "half")
    assert {r["kernel"] for r in readings} >= GEMMS
    check(readings)
    for r in readings:
        if r["kernel"] in GEMMS:
            assert r["instructions"] == [r["matrix"]], r


@pytest.mark.slow
def test_half_precision_on_hopper_in_every_variant():
    """Training or inference, with gate and biases or without: no spills, and products run asynchronously.

    Every weight gradient with a bias once waited for each product before the next (ptxas said C7515, nobody
    listened), and the gather without a bias spilled, which was never compiled. Every config with all of it;
    of the variants the largest tiles, which take most.
    """
    readings = read("sm_90", "half", code=True)
    readings += read("sm_90", "half", variants=(*VARIANTS[1:], UNGATED), of_size="large", code=True)
    assert {r["kernel"] for r in readings} >= GEMMS | PINGPONG
    check(readings)
    for r in readings:
        if r["kernel"] in GEMMS and r["config"] != "half/tiny":  # whose tiles are too small for wgmma
            assert r["instructions"] == ["wgmma"], r
            assert r["waits"] == 2, r  # one in the loop, for the products before the last; one after it
        if r["config"] in ("half/medium", "half/large") and r["kernel"] in EPILOGUES:
            assert 0 < r["epilogue"] <= EPILOGUES[r["kernel"]], r


def test_serialised_products_are_seen():
    """What the checks ask for must be visible at all: of two loops under a branch ptxas says C7515."""
    assert "C7515" in run(str(Path(__file__).with_name("serialised.py"))).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("sm_80", {"D": 312, "F": 1200}),
        ("sm_90", {"D": 312, "F": 1200}),
        ("sm_100", {"D": 1024, "F": 1024}),
    ],
    ids=["sm_80-tiny", "sm_90-tiny", "sm_100-large"],
)
def test_half_precision_at_other_sizes(family, sizes):
    """A tile that fitted at D=F=768 asked for twice the shared memory there is at TinyBERT's 312 x 1200.

    Rows of 312 are no multiple of 16: their loads are narrower. BERT-large has D=1024. Each family at a size
    likely to fail, with the largest tiles: compiling the table takes half a minute.
    """
    check(read(family, "half", of_size="large", **sizes))


@pytest.mark.slow
def test_warp_specialised_kernels_of_other_sizes():
    """Unrolled over 14 experts, the search for a tile's expert made a producer spill."""
    ungated = UNGATED, (False, False, True)
    readings = read("sm_90", "half", variants=ungated, of_size="large", D=1024, F=1024, E=MOST_EXPERTS, K=2)
    assert {r["kernel"] for r in readings} >= PINGPONG
    check(readings)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100"])
def test_float32(family):
    """The largest tiles with TF32; IEEE arithmetic has no matrix instruction, but must not spill either."""
    check(read(family, "tf32", "ieee", of_size="large"))


def test_float32_is_added_up_in_two_chains():
    """In one, dx of seven tokens was off by more than its bound on an H200, where cuBLAS has two."""
    counted = run("-c", COUNT).split("\n")[:-1]
    assert sorted(set(counted)) == ["half 1", "ieee 2"]


def test_two_chains_stay_two_where_the_loop_has_one_step():
    """Their sum was folded into one chain there: y was off by more than its bound on an H200."""
    counted = run("-c", COUNT_CHAINS).split()
    assert len(counted) == 4
    assert set(counted) == {"2.0"}


SHARED = """
import dataclasses, json, sys
from bench import binaries
from moebert_kernels.kernels.triton import configs
family = sys.argv[1]
# Specialised kernels are not for shared neurons.
config = dataclasses.replace(configs.TABLE[family, "half", "large"], specialised=())
found = []
for C in (0, 512):
    for launch in binaries.launches(config, binaries.ELEMENT["half"], C=C):
        if launch.kernel.__name__.startswith(("gather", "scatter", "weight_grad")):
            limits = {"config": f"C={C}", "limit": binaries.ARCHITECTURES[family].shared_per_program,
                      "matrix": ""}
            found.append(limits | dataclasses.asdict(binaries.read(launch, family)))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_shared_neurons_take_no_more_of_a_multiprocessor(family):
    """Two loops of products in branches had shared memory each, and half as many programs fitted."""
    readings = json.loads(run("-c", SHARED, family).splitlines()[-1])
    check(readings)
    plain, shared = ([r for r in readings if r["config"] == name] for name in ("C=0", "C=512"))
    for before, r in zip(plain, shared, strict=True):
        assert (r["kernel"], r["instructions"]) == (before["kernel"], before["instructions"])
        assert r["shared_bytes"] == before["shared_bytes"], r["kernel"]
        assert r["programs"] >= before["programs"], r["kernel"]
