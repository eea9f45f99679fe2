"""One model in one runtime, alone in its process: runs when it is told to, and waits without spinning.

    python -m bench.serving.worker RUNTIME MODEL INPUTS OUTPUTS THREADS

It imports nothing but numpy and the runtime. INPUTS is a .npz of arrays named `case|input`; what the model
makes of every case is written to OUTPUTS, .npz, before the line "ready" is said. From then on a line
`case seconds` on stdin is answered by one with the seconds of a call: the median of as many as take that
long, the first one left out.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RUNTIMES = ("torch", "onnxruntime", "openvino")
LEAST_CALLS = 2

Feed = dict[str, np.ndarray]
Call = Callable[[Feed], np.ndarray]


def start(runtime: str, model: str, threads: int) -> Call:
    """Load a model; the function returned gives its last output, the logits or the sentences' embeddings."""
    return {"torch": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino}[runtime](model, threads)


def _onnxruntime(model: str, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads would compute at the next worker's expense; within a call they spin as ever.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}
    output = [session.get_outputs()[-1].name]
    return lambda feed: session.run(output, {name: feed[name] for name in names})[0]


def _openvino(model: str, threads: int) -> Call:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16, OpenVINO would take it unasked
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    names = {entry.get_any_name() for entry in compiled.inputs}
    last = len(compiled.outputs) - 1
    return lambda feed: request.infer({name: feed[name] for name in names})[last]


def _torch(model: str, threads: int) -> Call:
    import torch

    from .contenders import load_module

    torch.set_num_threads(threads)
    module = load_module(model)

    @torch.inference_mode()
    def call(feed: Feed) -> np.ndarray:
        return module(**{name: torch.from_numpy(feed[name]) for name in module.input_names})[-1].numpy()

    return call


def time_calls(call: Call, feed: Feed, seconds: float) -> float:
    """The median of at least two calls after one that brings everything back into the caches."""
    call(feed)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - begin < seconds:
        start_s = time.perf_counter()
        call(feed)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def main(runtime: str, model: str, inputs: str, outputs: str, threads: str) -> None:
    """Load, answer every case once, then time what is asked for until stdin ends."""
    feeds: dict[str, Feed] = {}
    with np.load(inputs) as arrays:
        for name in arrays.files:
            case, _, entry = name.partition("|")
            feeds.setdefault(case, {})[entry] = arrays[name]
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        call = start(runtime, model, int(threads))
        answers: dict[str, Any] = {case: np.array(call(feed)) for case, feed in feeds.items()}
    np.savez(outputs, **answers)
    print("ready", flush=True)
    for line in sys.stdin:
        case, seconds = line.split()
        print(time_calls(call, feeds[case], float(seconds)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
