"""Small cases for NVIDIA's compute-sanitizer, outside pytest so that its report is the process's own.

    python tests/kernels/sanitize.py [TOOL ...]  run all four tools or those named, each in its own process
    python tests/kernels/sanitize.py --cases     run the cases only: what a tool wraps

Whatever one tool finds, the next one runs; the exit status is the first that is not 0. `--cases
--interpreted`, with TRITON_INTERPRET=1 in the environment, runs the smallest case without a GPU: does the
script start?
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def run_cases(*, interpreted: bool = False) -> None:
    import dataclasses

    import pytest
    import torch

    from moebert_kernels.kernels import triton as kernels
    from moebert_kernels.kernels.triton import configs
    from tests.cases import Case
    from tests.kernels.checks import inputs, run, send_to, use_config

    device, dtype = ("cpu", torch.float16) if interpreted else ("cuda", torch.bfloat16)
    cases = (
        Case(7),
        Case(200, D=72, F=136, routing="dropped", gate=True),
        Case(150, D=40, F=88, K=2, routing="skewed", gate=True, norm=True),
        Case(200, D=128, F=256, routing="dropped"),  # on Hopper warp-specialised
    )
    if interpreted:
        send_to(kernels, pytest.MonkeyPatch())
        cases = cases[:1]
    key = (configs.family(torch.device(device)), "half", "large")
    large = configs.TABLE.get(key, configs.SAFE)
    # Descriptor loads bring in whole tiles, unwritten rows included, which nothing uses: initcheck would
    # report them, so it looks at the pointer loads.
    tma = large.tma and "--pointers" not in sys.argv
    for config in (large, configs.SAFE):
        specialised = config.specialised if tma else ()
        config = dataclasses.replace(config, tma=tma and config.tma, specialised=specialised)
        use_config(config, pytest.MonkeyPatch())
        for case in cases:
            run(case, inputs(case, dtype, device), **({"dropout_p": 0.1} if case.norm else {}))
    if not interpreted:
        torch.cuda.synchronize()


def main(tools: list[str]) -> int:
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        sys.exit(f"there is no tool {unknown[0]!r}; there are {', '.join(TOOLS)}")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # one allocation per tensor: overruns land outside
    }
    statuses = []
    for tool in tools or TOOLS:
        pointers = ["--pointers"] if tool == "initcheck" else []
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--cases"]
        print(f"== {tool}", flush=True)
        statuses.append(subprocess.run(command + pointers, env=environment).returncode)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    if "--cases" in sys.argv:
        run_cases(interpreted="--interpreted" in sys.argv)
    else:
        sys.exit(main(sys.argv[1:]))
