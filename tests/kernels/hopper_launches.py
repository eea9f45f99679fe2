"""What is handed to the C functions of compiled kernels, by Triton's launcher and by plans; printed as JSON.

Run in a process of its own, for kernels are compiled here and not interpreted. In a GPU's place stands a
driver for Hopper, whose C functions and tensor maps say what they were given.
"""

import json
from types import SimpleNamespace

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from bench import standin
from bench.ahead import as_on
from moebert_kernels.kernels.call import NUM_TENSORS, Gradients
from moebert_kernels.kernels.triton import backend, hopper, replay
from moebert_kernels.kernels.triton.configs import Config, Tile
from moebert_kernels.kernels.triton.launch import recorded
from tests.cases import Case
from tests.kernels.checks import arguments, inputs, plan_of

SMALL = Tile(64, 64, 32, 4, 2)
ROLES = ("up", "down", "down_backward", "up_backward")
CONFIG = Config(SMALL, SMALL, SMALL, SMALL, SMALL, specialised=ROLES)
GRADIENTS = Gradients(*[True] * 5, *[False] * 7)


class Driver(standin.Driver):
    """Notes what C functions are given: by Triton, or by us."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self):
        super().__init__()
        self.given = []
        self.utils.fill_tma_descriptor = lambda *arguments: ("tensor map", *map(told, arguments))
        nvidia.library_dirs = list
        nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=lambda *a: self.given.append(a))


def told(value):
    if isinstance(value, (list, tuple)):
        return [told(one) for one in value]
    return value if isinstance(value, (int, float)) else str(value)


def call_of(dtype=torch.bfloat16, **changes):
    case = Case(**{"T": 300, "E": 2, "D": 128, "F": 256} | changes)
    t, plan = inputs(case, dtype, "cpu"), plan_of(case, "cpu")
    return arguments(t, plan, norm=case.norm, gate=case.gate)._replace(activation=case.activation)


def passes(call):
    """Inference, forward and backward of a call: name, function, tensors, options."""
    options, dy = call[NUM_TENSORS:], torch.empty_like(call.x_TD)
    yield "inference", backend._forward, call.tensors, (False, *options)
    yield "forward", backend._forward, call.tensors, (True, *options)
    with recorded():
        saved = backend._forward(call.tensors, (True, *options))[1:]
    yield "backward", backend._backward, (*call.tensors, *saved, dy), (GRADIENTS, *options)


def names(call):
    """Kernels of each pass, but for those that are no GEMMs."""
    found = {}
    for name, pass_, tensors, options in passes(call):
        with recorded() as launches:
            pass_(tensors, options)
        kernels = [one.kernel.__name__.removesuffix("_kernel") for one in launches]
        found[name] = [kernel for kernel in kernels if kernel.startswith(("gather", "scatter"))]
    return found


def given(started, launches):
    """What C functions were given for launches, with addresses by the order in which they first come.

    Left out is what they do not read: hooks and what is told to them, and constants, which come last.
    """
    seen = {}

    def value(v):
        if isinstance(v, tuple) and v and v[0] == "tensor map":
            return ["tensor map", value(v[1]), *v[2:]]
        v = v.data_ptr() if isinstance(v, torch.Tensor) else v
        is_address = isinstance(v, int) and v > 2**32
        return f"address {seen.setdefault(v, len(seen))}" if is_address else told(v)

    found = []
    for arguments, launch in zip(started, launches, strict=True):
        constant = [parameter.is_constexpr for parameter in launch.kernel.params]
        assert constant == sorted(constant)
        found.append([value(v) for v in (*arguments[:10], *arguments[13 : -sum(constant)])])
    return found


def both_ways(call, there):
    """Of inference and backward: what Triton hands on, and what a plan does."""
    found = {}
    for name, pass_, tensors, options in passes(call):
        if name == "forward":  # its scatter is that of inference
            continue
        with recorded() as launches:
            pass_(tensors, options)
        there.given.clear()
        pass_(tensors, options)
        by_triton = given(there.given, launches)
        plan = replay.Plan(pass_, tensors, options)
        assert plan.whole
        there.given.clear()
        results = plan.run([0 if t is None else t.data_ptr() for t in tensors])
        found[name] = by_triton, given(there.given, launches)
        del results
    return found


CASES = {
    "fits": {},
    "norm": {"norm": True, "gate": True},
    "two experts a token": {"K": 2},
    "float16": {"dtype": torch.float16},
    "relu": {"activation": "relu"},
    "no bias": {"bias": False},
    "8 experts": {"E": 8},
    "gate": {"gate": True},
    "shared": {"C": 128},
    "float32": {"dtype": torch.float32},
    "9 experts": {"E": 9},
    "hidden size of 192": {"D": 192},
    "hidden size of 160": {"D": 160},
    "160 neurons": {"F": 160},
    "no token": {"T": 0},
}

if __name__ == "__main__":
    there = Driver()
    driver.set_active(there)
    from moebert_kernels.kernels.triton import configs

    configs.select = lambda *_: CONFIG
    with as_on("sm_90", 132):
        chosen = {name: names(call_of(**changes)) for name, changes in CASES.items()}
        arguments = both_ways(call_of(), there)
        w = torch.empty(4, 128, 128, dtype=torch.bfloat16)
        reached = {}
        for stride in (2**16, 2**20):  # of 4096 rows
            rows = torch.empty_strided((4096, 128), (stride, 1), dtype=torch.bfloat16, device="meta")
            reached[stride] = hopper.fits(rows, w, True, gathered=True)
    print(json.dumps({"chosen": chosen, "arguments": arguments, "reached": reached}))
