"""Hashes of the machine code of warp-specialised kernels, as BERT-base in bfloat16 launches them, as JSON.

Of nvdisasm's instructions, one a line, without addresses. Run in a process of its own: kernels are compiled.
"""

import hashlib
import json
import re
import subprocess
import tempfile

import torch
import triton

from bench import binaries
from bench.binaries import Variant
from moebert_kernels.kernels.triton import configs


def instructions(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.MULTILINE)
    return "".join(re.sub(r"\s+", " ", one) + "\n" for one in found)


if __name__ == "__main__":
    config, told = configs.TABLE["sm_90", "half", "large"], {}
    for training, names in (
        (False, ("gather", "scatter")),
        (True, ("", "", "gather_backward", "scatter_backward")),
    ):
        variant = Variant(training=training, gate=False)
        launches = binaries.launches(config, torch.bfloat16, variant, T=16384)
        gemms = [one for one in launches if one.kernel.__name__.startswith(("gather", "scatter"))]
        for name, launch in zip(names, gemms, strict=True):
            if name:
                assert "pingpong" in launch.kernel.__name__
                code = instructions(binaries.compiled(launch, "sm_90").asm["cubin"])
                told[name] = hashlib.sha256(code.encode()).hexdigest()
    print(json.dumps(told))
