"""Warp-specialised kernels: who gets them, what they are handed, their barriers; on a GPU, their results."""

import json
import random

import pytest
import torch

from tests import ROOT
from tests.cases import Case
from tests.forked import compiling, python
from tests.kernels.checks import assert_equal, check, inputs, recorded, run, use_config
from tests.kernels.protocol import Program

pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels.kernels.triton import hopper
from moebert_kernels.kernels.triton.configs import Config, Tile
from moebert_kernels.ops import backends

SMALL = Tile(64, 64, 32, 4, 2)
SPECIALISED = Config(
    *[SMALL] * 5, specialised=("up", "down", "down_backward", "up_backward"), stream_k=True, tma=True
)
PINGPONG = {
    "inference": ["gather_pingpong", "scatter_pingpong"],
    "forward": ["gather", "scatter_pingpong"],
    "backward": ["gather_backward_pingpong", "scatter_pingpong"],
}
PLAIN = {name: [kernel.removesuffix("_pingpong") for kernel in kernels] for name, kernels in PINGPONG.items()}


def script(name):
    """What a script of this folder prints, in a process whose Triton compiles."""
    done = python("-m", f"tests.kernels.{name}", imported=("torch", "triton"), environment=compiling())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def launches():
    return script("hopper_launches")


def test_calls_that_do_not_fit_get_the_plain_kernels(launches):
    """A gate, shared neurons, a tile that overhangs: the specialised kernels would compute something else."""
    specialised = ("fits", "norm", "two experts a token", "float16", "relu", "no bias", "8 experts")
    plain = ("shared", "float32", "9 experts", "hidden size of 160", "160 neurons")
    assert launches["chosen"] == {
        **dict.fromkeys(specialised, PINGPONG),
        **dict.fromkeys(plain, PLAIN),
        "gate": {
            "inference": ["gather_pingpong", "scatter"],
            "forward": ["gather", "scatter"],
            "backward": ["gather_backward", "scatter_pingpong"],
        },
        "hidden size of 192": {  # can be added up in whole steps, but has no whole columns
            "inference": ["gather_pingpong", "scatter"],
            "forward": ["gather", "scatter"],
            "backward": ["gather_backward_pingpong", "scatter"],
        },
        "no token": {"inference": [], "forward": [], "backward": []},
    }


def test_rows_whose_offsets_need_more_than_32_bits_are_not_gathered(launches):
    """Few rows of a wide matrix's: elements alone do not say how far apart they lie."""
    assert launches["reached"] == {str(2**16): True, str(2**20): False}


@pytest.mark.parametrize("pass_", ["inference", "backward"])
def test_plans_hand_on_what_triton_does(pass_, launches):
    """Grid, addresses, strides and tensor maps: descriptors of Gluon are not those of Triton."""
    by_triton, by_plan = launches["arguments"][pass_]
    assert by_triton == by_plan
    maps = [value for arguments in by_plan for value in arguments if told_of_map(value)]
    assert len(maps) == 3  # of both weights, and of the sorted rows
    # (3 + 2) row tiles by 2 columns of neurons, by 1 of the hidden size
    assert [arguments[:3] for arguments in by_plan[:2]] == [[10, 1, 1], [5, 1, 1]]


def told_of_map(value):
    return isinstance(value, list) and value[0] == "tensor map"


def test_the_interpreter_gets_the_plain_kernels(interpreter):
    """It knows no Gluon."""
    assert not hopper.takes(E=1, N=hopper.TILE.n, K=hopper.TILE.k)


def test_gluon_is_that_of_a_version_that_was_checked():
    """Gluon is experimental: another Triton gets the plain kernels until these were compiled with it and run
    on a Hopper GPU (`pytest -m gpu tests/kernels/test_hopper.py`), and `CHECKED` has it."""
    import triton

    from moebert_kernels.kernels.triton.hopper import launches

    assert triton.__version__.startswith(launches.CHECKED)


@pytest.mark.slow
def test_the_machine_code_is_that_which_was_measured():
    """The figures of docs/gpu.md are of these instructions: kernels that changed are to be measured anew."""
    import triton

    if triton.__version__ != "3.6.0":
        pytest.skip("another compiler")
    rows = map(json.loads, (ROOT / "bench" / "results" / "h200" / "specialised.jsonl").open(encoding="utf-8"))
    measured = {row["variant"].split()[0]: row["machine_code"] for row in rows if "machine_code" in row}
    assert script("hopper_code") == measured


@pytest.mark.parametrize("gathered", [False, True])
def test_the_barriers_neither_race_nor_deadlock(gathered):
    """At the depth that is shipped, for hidden sizes from 64 to 1024."""
    for steps in (1, 2, 5, 6, 12, 16):
        for tiles in (0, 1, 2, 3, 7):
            for seed in range(5):
                Program(tiles, steps, hopper.TILE.stages, gathered, random.Random(seed)).run()


def test_without_turns_a_consumer_reads_too_early():
    """What the simulation is for: it sees the race that `turn` prevents."""
    raced = []
    for seed in range(20):
        try:
            Program(4, 12, hopper.TILE.stages, False, random.Random(seed), turns=False).run()
        except AssertionError as error:
            raced.append(str(error))
    assert any("another step's tiles are read" in message for message in raced)


HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HAS_HOPPER, reason="the kernels are Hopper's")
ROUTINGS = ("uniform", "skewed", "dropped", "first empty", "middle empty", "last empty", "one", "nobody")
CASES = (
    *(Case(300, D=128, F=128, routing=routing) for routing in ROUTINGS),
    *(Case(T, D=128, F=128, E=1) for T in (1, 127, 128, 129)),
    Case(700, D=128, F=384, routing="skewed", norm=True, gate=True),
    Case(300, D=384, F=128, K=2, routing="dropped"),
    Case(300, D=256, F=128, K=2, gate=True),
    Case(300, D=128, F=128, bias=False, routing="dropped"),
    Case(600, D=128, F=128, E=8),
    *(Case(200, D=128, F=128, activation=activation) for activation in ("gelu_tanh", "relu", "silu")),
    Case(300, D=192, F=128),  # with whole steps, but no whole columns
    Case(300, D=128, F=128, C=64),
)


def kernels_of(step, *arguments):
    """Names of what a step launches."""
    with recorded() as launches:
        step(*arguments)
    return [one.kernel.__name__ for one in launches]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), *((case, torch.float16) for case in CASES[:3])],
    ids=str,
)
def test_a_small_case(case, dtype, poisoned_memory, monkeypatch):
    use_config(SPECIALISED, monkeypatch)
    check(case, dtype, "cuda")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("T", "routing", "gate"),
    [
        (8192, "balanced", False),
        (8193, "balanced", False),
        (8193, "skewed", False),
        (16384, "dropped", False),
        (16384, "first empty", True),
    ],
)
def test_a_large_call(T, routing, gate, dtype, poisoned_memory):
    """On both sides of the table's limit, from 2048 rows an expert on; twice, bitwise the same."""
    from bench import smoke
    from bench.cases import FFNCase, expert_ids
    from moebert_kernels import RoutingPlan

    case = FFNCase(T, routing=routing, gate=gate, dtype=dtype)
    t = smoke.make_inputs(case, torch.device("cuda"))
    plan = RoutingPlan.from_expert_ids(expert_ids(case).cuda(), case.E)
    assert ("gather_pingpong_kernel" in kernels_of(smoke.step, t, plan)) == (T > 8192)
    wrong, _ = smoke.check_case(case, t, {})
    assert not wrong


@pytest.mark.gpu
@on_hopper
def test_runs_are_bitwise_equal_and_started_directly(monkeypatch):
    """With other routings in between: nothing in shared memory may be left of another launch."""
    use_config(SPECIALISED, monkeypatch)
    cases = [Case(3000, D=256, F=256, routing=routing) for routing in ("skewed", "one", "dropped")]
    t = inputs(cases[0], torch.bfloat16, "cuda")
    assert "gather_backward_pingpong_kernel" in kernels_of(run, cases[0], t)
    first = run(cases[0], t)
    for i in range(20):
        run(cases[1 + i % 2], t)
        assert_equal(run(cases[0], t), first)
    plans = [plan for form in backends._forms.values() for plan in form.kept.values()]
    assert plans
    assert all(plan.whole for plan in plans)
