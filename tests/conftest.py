"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter, which must be chosen before
anything imports Triton."""

import gc
import importlib.util
import os
import sys
from collections import Counter

import pytest

from tests.interpreter import hasten


def _gpu() -> bool:
    import torch  # of which a process that leaves all tests to others has no need

    return torch.cuda.is_available()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class GpuModule(pytest.Module):
    """A test module under `-m gpu`: left out, with the reason, if it needs a package that is not installed.

    A borrowed GPU machine has PyTorch, Triton and pytest, and rarely more. `test_bare_machine.py` shows that
    no test of a GPU is lost to this. Without `-m gpu` such a module is an error, as ever.
    """

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            package = cause.name.partition(".")[0] if isinstance(cause, ModuleNotFoundError) else None
            if package is None or importlib.util.find_spec(package) is not None:
                raise
            pytest.skip(f"{package} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if parent.config.getoption("-m").split()[:1] == ["gpu"]:
        return GpuModule.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items):
    if not _gpu():
        reason = "needs a CUDA device, and torch finds none"
    elif _interpreting():
        reason = "TRITON_INTERPRET=1 keeps the kernels off the GPU"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """What is imported stays: garbage is collected by every training, and by compilers' many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    if _interpreting() and "triton" in sys.modules:
        hasten()


KERNELS = Counter()  # that were compiled or found in Triton's cache, here and by the workers of xdist


def pytest_configure(config):
    """Where there is no GPU, choose the interpreter.

    Where tests compile kernels, count them: a cache that was brought along should have had them.
    """
    if config.getoption("numprocesses", None):
        return  # the workers do
    if not _gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("hypothesis") is not None:
        from hypothesis import settings

        # The same examples in every run, however slow the machine; a test that needs more or fewer says so.
        settings.register_profile("suite", max_examples=25, derandomize=True, deadline=None)
        settings.load_profile("suite")
    if _interpreting() or importlib.util.find_spec("triton") is None:
        return
    from triton import knobs

    before = knobs.compilation.listener

    def listener(**event):
        KERNELS["found in the cache" if event["cache_hit"] else "compiled"] += 1
        if before is not None:
            before(**event)

    knobs.compilation.listener = listener


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = dict(KERNELS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    KERNELS.update(getattr(node, "workeroutput", {}).get("kernels", {}))


def pytest_terminal_summary(terminalreporter):
    if KERNELS:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(KERNELS.items()))
        terminalreporter.write_line(f"Triton kernels: {counts}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["interpreter", "gpu"])
def device(request):
    """Where a test runs the kernels: CPU tensors in the interpreter, and the GPU."""
    if request.param == "cpu" and not _interpreting():
        pytest.skip("Triton is not interpreting: with a GPU, it compiles")
    return request.param


@pytest.fixture
def interpreter():
    """For a test that can run the kernels in the interpreter alone."""
    if not _interpreting():
        pytest.skip("Triton is not interpreting: with a GPU, it compiles")


@pytest.fixture
def poisoned_memory():
    """Memory nobody has written reads as NaN: a row that a kernel forgets is seen, and so is one it reads."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
