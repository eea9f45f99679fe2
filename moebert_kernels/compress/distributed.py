"""Several processes that work on one thing, as `torchrun` and `accelerate launch` start them.

Process 0, the main one, reads and writes what is shared: it alone locks, saves, prints and tells progress.
All processes must come by every collective call below in the same order. Where there is but one process,
each of them does the obvious thing at once.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from moebert_kernels.errors import ArgumentError, UserError

Result = TypeVar("Result")

# What all of them wait for is a stage that one of them works at, which may take a day. One that has died is
# noticed at once: its connections close, and the launcher ends the others.
_PATIENCE = timedelta(days=7)
_HEARING = timedelta(seconds=10)  # for another process to say why it failed
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class OtherProcessError(RuntimeError):
    """The main process raised an error in `on_main`; it knows which."""


def world_size() -> int:
    """How many processes there are."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1


def rank() -> int:
    """The number of this process, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those on its machine: that of its GPU, too."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def init_process_group() -> None:
    """Connect with the other processes, unless that has been done; every collective call does so first.

    Raises:
        UserError: there are more processes on this machine than GPUs.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank()} of this machine has no GPU to itself: there are "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
            )
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    atexit.register(_leave)  # the group's threads, still running, would abort the interpreter


def on_main(work: Callable[[], Result]) -> Result:
    """Do `work` in the main process while all others wait for it; collective.

    Args:
        work: returns something that can be pickled.

    Returns:
        What it returned, in every process.

    Raises:
        OtherProcessError: in the others, when `work` raises an error; in the main process, that error.
    """
    if world_size() == 1:
        return work()
    init_process_group()
    outcome: list = [None, None]  # whether it went well, and the result
    failure = None
    if is_main():
        try:
            outcome = [True, work()]
        except Exception as error:
            failure = error
            outcome = [False, None]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if not outcome[0]:
        raise OtherProcessError("the main process failed")
    return outcome[1]


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, in their order; collective.

    Args:
        tensor: of the same shape and type in all.
    """
    if world_size() == 1:
        return [tensor]
    init_process_group()
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors


def all_reduce(tensor: Tensor) -> None:
    """Put the sum over all processes in the place of the tensor of each; collective."""
    if world_size() > 1:
        init_process_group()
        dist.all_reduce(tensor)


def barrier() -> None:
    """Return when every process has come here; collective."""
    all_gather(torch.zeros(()))


def rows_each(batch_size: int) -> int:
    """How many of the `batch_size` rows of a training step each process takes.

    Raises:
        ArgumentError: they cannot be dealt out evenly.
    """
    if batch_size % world_size():
        raise ArgumentError(
            "batch_size",
            f"is {batch_size}, expected a multiple of {world_size()}: the processes share the rows of a step",
        )
    return batch_size // world_size()


@contextmanager
def one_voice() -> Iterator[None]:
    """Run a program's body in processes that are to print as one: the main process alone does.

    An error, other than a `UserError` or an interruption, is printed by the first process that raises it, and
    ends all of them.
    """
    if world_size() == 1:
        yield
        return
    # After an error the launcher ends the others, which have nothing to finish: as if they had been killed.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    init_process_group()
    with ExitStack() as muted:
        if not is_main():
            nowhere = muted.enter_context(open(os.devnull, "w", encoding="utf-8"))
            muted.enter_context(redirect_stdout(nowhere))
            warnings.simplefilter("ignore")
        try:
            yield
        except UserError:
            raise
        except OtherProcessError:
            say_once(None)
            raise SystemExit(1) from None
        except Exception as error:
            say_once(functools.partial(_tell_traceback, error))
            raise SystemExit(1) from None


def _tell_traceback(error: Exception) -> None:
    """Here, and in the launcher's own summary of what went wrong."""
    get_error_handler().record_exception(error)
    traceback.print_exception(error)


def say_once(say: Callable[[], None] | None) -> None:
    """Let the first process that fails say why, and the others, failing alike or in consequence, be silent.

    Returns when it has been said: when any process ends, the launcher ends the others, in mid-sentence too.

    Args:
        say: prints the reason; None if another process knows it.
    """
    if not dist.is_initialized():
        if say is not None and is_main():
            say()
        return
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, timeout=_HEARING, wait_for_workers=False)
        if say is not None and store.add("moebert/failures", 1) == 1:
            say()
            store.set("moebert/said", "")
        else:
            store.wait(["moebert/said"], _HEARING)
    except RuntimeError:  # the store has gone with the process that held it, and that one has spoken
        return


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
