import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads_as_before():
    """Benchmarks choose how many threads there are, and their processors."""
    threads = torch.get_num_threads()
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    torch.set_num_threads(threads)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
