"""Python processes that need not wait for imports: each is forked from one that has made them.

    python("-c", "print(1)", imported=("torch",)).stdout

Otherwise they are as new: they have arguments, folder and standard streams of their own, and end as any.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests import ROOT

_SERVER = """
import json, os, runpy, sys

for name in sys.argv[1:]:
    __import__(name)


def call():
    for line in sys.stdin:
        if os.fork() == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    os._exit(0)


asked = call()
for number, path in enumerate(asked["streams"]):
    os.dup2(os.open(path, os.O_RDWR), number)
os.chdir(asked["folder"])
os.environ.update(asked["environment"])
kind, what, *arguments = asked["words"]
sys.argv = [kind if kind == "-c" else what, *arguments]
if kind == "-c":
    exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
elif kind == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


@functools.cache
def _server(imported: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    command = [sys.executable, "-c", _SERVER, *imported]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=dict(environment), cwd=ROOT, **pipes)
    atexit.register(server.communicate)
    return server


# What transformers imports of others.
BELOW_TRANSFORMERS = ("torch._dynamo", "huggingface_hub", "tokenizers", "safetensors", "sklearn.metrics")


def compiling() -> dict[str, str]:
    """The environment of a process whose Triton compiles, whatever this one's does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Lines of source are not looked at, and take ptxas a tenth of its time.
    quick = {"OMP_NUM_THREADS": "1", "TRITON_DISABLE_LINE_INFO": "1"}
    return environment | {"PYTHONPATH": str(ROOT), **quick}


def python(
    *words: object,
    imported: tuple[str, ...] = ("torch",),
    environment: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> subprocess.CompletedProcess:
    """Run `python -c CODE ...` or `python -m MODULE ...`.

    Args:
        words: the command.
        imported: modules that it finds there.
        environment: all that it has, and of which that process is made; None for this process's.
        more: of this process alone.
        folder: where it runs.
    """
    inherited = dict(os.environ if environment is None else environment)
    inherited.pop("PYTEST_CURRENT_TEST", None)
    server = _server(imported, tuple(sorted(inherited.items())))
    with tempfile.TemporaryDirectory() as streams:
        out, errors = Path(streams) / "out", Path(streams) / "errors"
        out.touch()
        errors.touch()
        asked = {
            "streams": [os.devnull, str(out), str(errors)],
            "folder": str(folder),
            "environment": dict(more or {}),
            "words": [*map(str, words)],
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(), errors.read_text())
