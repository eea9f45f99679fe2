"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter, which must be chosen before
anything imports Triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        reason = "needs a CUDA device, and torch finds none"
    elif INTERPRETING:
        reason = "TRITON_INTERPRET=1 keeps the kernels off the GPU"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["interpreter", "gpu"])
def device(request):
    """Where a test runs the kernels: CPU tensors in the interpreter, and the GPU."""
    if request.param == "cpu" and not INTERPRETING:
        pytest.skip("Triton is not interpreting: with a GPU, it compiles")
    return request.param


@pytest.fixture
def poisoned_memory():
    """Memory nobody has written reads as NaN: a row that a kernel forgets is seen, and so is one it reads."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
