"""Every committed config compiled for each GPU generation, without a GPU, and the binaries read.

In a process of its own: this one may have told Triton to interpret.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

READ = """
import dataclasses, json, sys
from moebert_kernels.kernels import inspect
family, sizes, *arithmetics = sys.argv[1:]
print(json.dumps([
    {"config": name, "limit": inspect.ARCHITECTURES[family].shared_per_program,
     "matrix": inspect.ARCHITECTURES[family].matrix_instruction} | dataclasses.asdict(reading)
    for name, reading in inspect.readings(family, tuple(arithmetics), **json.loads(sizes))
]))
"""
GEMMS = {
    "gather_kernel",
    "scatter_kernel",
    "gather_backward_kernel",
    "weight_grad_kernel",
    "weight_grad_stream_kernel",
    "dense_up_kernel",
    "dense_down_kernel",
}


def read(family, *arithmetics, **sizes):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", READ, family, json.dumps(sizes), *arithmetics],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(readings):
    assert readings
    for r in readings:
        where = f"{r['kernel']} of {r['config']} on {r['arch']}"
        assert r["spilled_bytes"] == 0, f"{where} spills {r['spilled_bytes']} bytes"
        assert r["shared_bytes"] <= r["limit"], f"{where} takes {r['shared_bytes']} bytes of shared memory"
        assert r["programs"] >= 1, f"{where} does not fit a multiprocessor"
        if r["kernel"] in GEMMS and not r["config"].startswith("ieee"):
            assert r["instructions"] == [r["matrix"]], f"{where} multiplies with {r['instructions']}"


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100"])
def test_half_precision(family):
    """The generation's own matrix instruction and no other, no spills, and it fits."""
    readings = read(family, "half")
    assert {r["kernel"] for r in readings} >= GEMMS
    check(readings)


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
    likely to fail: compiling the table takes half a minute.
    """
    check(read(family, "half", **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100"])
def test_float32(family):
    """The same with TF32; IEEE arithmetic has no matrix instruction, but must not spill either."""
    check(read(family, "tf32", "ieee"))
