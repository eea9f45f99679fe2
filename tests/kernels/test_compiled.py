"""Every committed config compiled for each GPU generation, without a GPU, and the binaries read.

In a process of its own: this one may have told Triton to interpret. What has not changed since
`python -m tests.kernels.readings` is not compiled again.
"""

import json

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton

from bench.binaries import ARCHITECTURES
from tests.forked import compiling, python
from tests.kernels import readings

GEMMS = {
    "gather_kernel",
    "scatter_kernel",
    "gather_backward_kernel",
    "weight_grad_kernel",
    "weight_grad_stream_kernel",
}
PINGPONG = set(readings.PINGPONG)

# Instructions for each element after the last product, at most: what follows it is not hidden by products.
EPILOGUES = {"gather_kernel": 36, "gather_backward_kernel": 30, "scatter_kernel": 8}


def run(*arguments):
    done = python(*arguments, imported=("torch", "triton"), environment=compiling())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def everything():
    return json.loads(run("-m", readings.__name__, "everything").splitlines()[-1])


@pytest.fixture
def read(everything):
    """What was read of each kernel that was asked for by one of `readings.ASKED`'s names."""

    def read(family, name):
        return [row for row in everything["rows"] if (row["family"], row["name"]) == (family, name)]

    return read


CHAINS = """
import json, re, torch
from bench import binaries
from moebert_kernels.kernels.triton import configs

def of_loop(arithmetic):
    config, dtype = configs.TABLE["sm_90", arithmetic, "large"], binaries.ELEMENT[arithmetic]
    for launch in binaries.launches(config, dtype):
        if launch.kernel.__name__ in ("gather_kernel", "scatter_kernel", "gather_backward_kernel"):
            yield binaries.compiled(launch, "sm_90").asm["ttir"].count("tt.dot ")

def of_one_step():
    # Whose accumulators begin as a constant.
    for launch in binaries.launches(configs.TABLE["sm_90", "ieee", "large"], torch.float32, D=13, F=29):
        if launch.kernel.__name__.startswith(("gather_kernel", "scatter", "gather_b")):
            ptx = binaries.compiled(launch, "sm_90").asm["ptx"]
            elements = launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"]
            chains = len(re.findall(r"fma.rn.f32.*, 0f00000000;", ptx))
            yield chains * 32 * launch.arguments["num_warps"] / elements

print(json.dumps([[*of_loop("half")], [*of_loop("ieee")], [*of_one_step()]]))
"""


def check(rows):
    assert rows
    for r in rows:
        limits, where = ARCHITECTURES[r["arch"]], f"{r['kernel']} of {r['config']} on {r['arch']}"
        assert r["spilled_bytes"] == 0, f"{where} spills {r['spilled_bytes']} bytes"
        taken = r["shared_bytes"]
        assert taken <= limits.shared_per_program, f"{where} takes {taken} bytes of shared memory"
        assert r["programs"] >= 1, f"{where} does not fit a multiprocessor"
        if r["kernel"] in GEMMS | PINGPONG and not r["config"].startswith("ieee"):
            serialised = [number for number in r["warnings"] if number.startswith("C75")]
            assert not serialised, f"{where}: ptxas serialises its products ({serialised})"
            # With shared neurons they are waited for in both loops.
            if limits.matrix_instruction in r["instructions"] and not r["config"].startswith("C="):
                most = 4 if r["kernel"] in PINGPONG else 2  # of which each consumer has half
                assert r["waits"] <= most, f"{where} waits {r['waits']} times for its products"


@pytest.mark.slow
@pytest.mark.parametrize("family", readings.ASKED)
def test_every_config(family, read):
    """No spills, and it fits; in half precision the generation's own matrix instruction and no other.

    Every config in half precision. The largest tiles with TF32, and at another size. IEEE arithmetic, which
    has no matrix instruction and one config for all generations, is compiled for Hopper.
    """
    for name in readings.ASKED[family]:
        check(read(family, name))
    if family != "sm_90":
        half = read(family, "half")
        assert {r["kernel"] for r in half} >= GEMMS
        for r in half:
            if r["kernel"] in GEMMS:
                assert r["instructions"] == [ARCHITECTURES[family].matrix_instruction], r


@pytest.mark.slow
def test_every_config_on_hopper(read):
    """Training or inference, with gate and biases or without: no spills, and products run asynchronously.

    Every weight gradient with a bias once waited for each product before the next (ptxas said C7515, nobody
    listened), and the gather without a bias spilled, which was never compiled. Every config with all of it;
    of the variants the largest tiles, which take most. Unrolled over 14 experts, a warp-specialised kernel's
    search for a tile's expert made a producer spill.
    """
    large = read("sm_90", "large")
    half = [*read("sm_90", "small"), *large, *read("sm_90", "variants")]
    assert {r["kernel"] for r in half} >= GEMMS | PINGPONG
    assert {r["kernel"] for r in read("sm_90", "specialised")} >= PINGPONG
    for r in half:
        if r["kernel"] in GEMMS and r["config"] != "half/tiny":  # whose tiles are too small for wgmma
            assert r["instructions"] == ["wgmma"], r
            assert r["waits"] == 2, r  # one in the loop, for the products before the last; one after it
    for r in large:
        if r["kernel"] in EPILOGUES:
            assert 0 < r["epilogue"] <= EPILOGUES[r["kernel"]], r


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_shared_neurons_take_no_more_memory(family, read):
    """Two loops of products in branches had shared memory each, and half as many programs fitted."""
    for before, r in zip(read(family, "apart"), read(family, "shared"), strict=True):
        assert (r["kernel"], r["instructions"]) == (before["kernel"], before["instructions"])
        assert r["shared_bytes"] == before["shared_bytes"], r["kernel"]
        assert r["programs"] >= before["programs"], r["kernel"]


@pytest.mark.skipif(triton.__version__ != readings.recorded()["triton"], reason="another Triton compiles")
def test_what_was_recorded_is_of_these_kernels(everything):
    """All of it, and no more: `python -m tests.kernels.readings` records it anew."""
    assert (everything["compiled"], everything["not asked for"]) == ([], [])
    pairs = json.loads(run("-m", readings.__name__, "sample").splitlines()[-1])
    assert len({before["kernel"] for before, _ in pairs}) > 2
    for before, now in pairs:
        assert now == before


def test_serialised_products_are_seen():
    """What the checks ask for must be visible at all: of two loops under a branch ptxas says C7515."""
    assert "C7515" in run("-m", "tests.kernels.serialised").split()


def test_float32_is_added_up_in_two_chains():
    """In one, dx of seven tokens was off by more than its bound on an H200, where cuBLAS has two.

    Nor are the two folded into one where the loop has one step: y was off there.
    """
    half, float32, of_one_step = json.loads(run("-c", CHAINS))
    assert set(half) == {1}
    assert set(float32) == {2}
    assert of_one_step == [2.0] * 4
