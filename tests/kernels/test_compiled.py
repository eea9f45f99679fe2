"""Every committed config compiled for each GPU generation, without a GPU, and the binaries read.

In a process of its own: this one may have told Triton to interpret.
"""

import json

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels.kernels.triton.hopper.launches import MOST_EXPERTS
from tests.forked import compiling, python

READ = """
import dataclasses, json, sys
from bench import binaries
from moebert_kernels.kernels.triton import configs

family = sys.argv[1]
limits = binaries.ARCHITECTURES[family]
done = {}

def reading(name, launch, code):
    code = launch.kernel.__name__ in code
    key = launch.kernel.__name__, repr(binaries._values(launch.arguments))
    if key not in done:
        done[key] = dataclasses.asdict(binaries.read(launch, family, code=code))
    of_family = {"limit": limits.shared_per_program, "matrix": limits.matrix_instruction}
    return {"config": name} | of_family | done[key]

def readings(arithmetics, variants, of_sizes, kernels, code, **sizes):
    variants = [binaries.Variant(*choice) for choice in variants]
    for name, of_config in binaries.distinct_launches(family, tuple(arithmetics), variants, **sizes).items():
        # IEEE arithmetic has one for all sizes.
        if not of_sizes or name.endswith(tuple(of_sizes)) or name.startswith("ieee"):
            for launch in of_config:
                if not kernels or launch.kernel.__name__ in kernels:
                    yield reading(name, launch, code)

def sharing(C):
    # Specialised kernels are not for shared neurons.
    config = dataclasses.replace(configs.TABLE[family, "half", "large"], specialised=())
    for launch in binaries.launches(config, binaries.ELEMENT["half"], C=C):
        if launch.kernel.__name__.startswith(("gather", "scatter", "weight_grad")):
            yield reading(f"C={C}", launch, ()) | {"matrix": ""}  # waited for in both loops

print(json.dumps([
    list(sharing(**asked) if "C" in asked else readings(**asked)) for asked in json.loads(sys.argv[2])
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
SPECIALISED = ((True, False, True), (False, False, True))  # of which warp-specialised kernels know more


def asked(*arithmetics, variants=FULL, of_sizes=(), kernels=(), code=(), **sizes):
    """Every config, or those of a size, "large" for example, in variants; of all kernels or those named.

    Of the kernels in `code` instructions are read too.
    """
    chosen = {"of_sizes": of_sizes, "kernels": tuple(kernels), "code": tuple(code)}
    return {"arithmetics": arithmetics, "variants": variants, **chosen, **sizes}


def read(family, *asked):
    """What is read of each; one process does it all, and what is asked for twice once."""
    return json.loads(run("-c", READ, family, json.dumps(asked)).splitlines()[-1])


def run(*arguments):
    done = python(*arguments, imported=("torch", "triton"), environment=compiling())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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


# Each family at a size likely to fail. A tile that fitted at D=F=768 asked for twice the shared memory there
# is at TinyBERT's 312 x 1200; rows of 312 are no multiple of 16: their loads are narrower. BERT-large: 1024.
OTHER_SIZES = {
    "sm_80": {"D": 312, "F": 1200},
    "sm_90": {"D": 312, "F": 1200},
    "sm_100": {"D": 1024, "F": 1024},
}
LARGE = ("large",)
MOST = {"D": 1024, "F": 1024, "E": MOST_EXPERTS, "K": 2}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sm_80", "sm_100"])
def test_every_config(family):
    """No spills, and it fits; in half precision the generation's own matrix instruction and no other.

    Every config in half precision. The largest tiles with TF32, and at another size. IEEE arithmetic, which
    has no matrix instruction and one config for all generations, is compiled for Hopper.
    """
    sharing = ({"C": 0}, {"C": 512}) if family == "sm_80" else ()
    half, float32, other_size, *shared = read(
        family,
        asked("half"),
        asked("tf32", of_sizes=LARGE),
        asked("half", of_sizes=LARGE, **OTHER_SIZES[family]),
        *sharing,
    )
    assert {r["kernel"] for r in half} >= GEMMS
    for readings in (half, float32, other_size):
        check(readings)
    for r in half:
        if r["kernel"] in GEMMS:
            assert r["instructions"] == [r["matrix"]], r
    if shared:
        check_sharing(*shared)


@pytest.mark.slow
def test_every_config_on_hopper():
    """Training or inference, with gate and biases or without: no spills, and products run asynchronously.

    Every weight gradient with a bias once waited for each product before the next (ptxas said C7515, nobody
    listened), and the gather without a bias spilled, which was never compiled. Every config with all of it;
    of the variants the largest tiles, which take most. Unrolled over 14 experts, a warp-specialised kernel's
    search for a tile's expert made a producer spill.
    """
    large, small, variants, float32, other_size, specialised, *shared = read(
        "sm_90",
        asked("half", of_sizes=("medium", "large"), code=EPILOGUES),
        asked("half", of_sizes=("tiny", "small", "safe")),
        asked("half", variants=VARIANTS[1:], of_sizes=LARGE),
        asked("tf32", "ieee", of_sizes=LARGE),
        asked("half", of_sizes=LARGE, **OTHER_SIZES["sm_90"]),
        asked("half", variants=SPECIALISED, of_sizes=LARGE, kernels=PINGPONG, **MOST),
        {"C": 0},
        {"C": 512},
    )
    half = small + large + variants
    assert {r["kernel"] for r in half} >= GEMMS | PINGPONG
    assert {r["kernel"] for r in specialised} >= PINGPONG
    for readings in (half, float32, other_size, specialised):
        check(readings)
    for r in half:
        if r["kernel"] in GEMMS and r["config"] != "half/tiny":  # whose tiles are too small for wgmma
            assert r["instructions"] == ["wgmma"], r
            assert r["waits"] == 2, r  # one in the loop, for the products before the last; one after it
    for r in large:
        if r["kernel"] in EPILOGUES:
            assert 0 < r["epilogue"] <= EPILOGUES[r["kernel"]], r
    check_sharing(*shared)


def check_sharing(plain, shared):
    """Two loops of products in branches had shared memory each, and half as many programs fitted."""
    check(plain + shared)
    for before, r in zip(plain, shared, strict=True):
        assert (r["kernel"], r["instructions"]) == (before["kernel"], before["instructions"])
        assert r["shared_bytes"] == before["shared_bytes"], r["kernel"]
        assert r["programs"] >= before["programs"], r["kernel"]


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
