"""The runs of a study, one after the other or several at a time."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .study import StudentBudget, Task, TeacherBudget, run, say


@dataclass(frozen=True)
class Study:
    """What the runs of a study have in common.

    Attributes:
        name: of the study.
        data: folder of the tasks' folders.
        model: folder of a pre-trained model; None for the demonstration's.
        out: folder of everything that is made.
        teaching: of teachers.
        budget: of every student.
    """

    name: str
    data: Path
    model: Path | None
    out: Path
    teaching: TeacherBudget
    budget: StudentBudget


def go_through(
    study: Study,
    tasks: Sequence[str],
    contenders: Sequence[str],
    seeds: int,
    *,
    jobs: int,
    limit: float | None,
) -> None:
    """Make teachers and contenders, or go on with them: all tasks with one seed, then with the next.

    Args:
        study: what they have in common.
        tasks: names in `TASKS`.
        contenders: names in `CONTENDERS`.
        seeds: how many.
        jobs: processes; with several of them teachers come first, then importance, then contenders.
        limit: seconds after which nothing more is started; None for no limit.
    """
    until = None if limit is None else time.time() + limit
    pairs = [(task, seed) for seed in range(seeds) for task in tasks]
    runs = [(study, task, name, seed, until) for task, seed in pairs for name in contenders]
    if jobs == 1:
        for arguments in runs:
            if not _run(*arguments):
                return
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, _begin, (threads,)) as pool:
        steps: Sequence[tuple[Callable[..., object], Sequence[tuple]]] = (
            (_prepare, [(study, task, until) for task in tasks]),
            (_score, [(study, *pair, until) for pair in pairs]),
            (_run, runs),
        )
        for work, given in steps:
            for done in as_completed([pool.submit(work, *arguments) for arguments in given]):
                if (error := done.exception()) is not None:
                    say(f"stopping, once the runs that have begun are done: {error}")
                    pool.shutdown(cancel_futures=True)
                    raise error


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Otherwise a study that is killed would go on beside the one that takes its place."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@cache
def _task(study: Study, name: str) -> Task:
    task = Task(name, study.data, study.model, study.teaching, study.out)
    task.prepare()
    return task


def _is_over(until: float | None) -> bool:
    return until is not None and time.time() >= until


def _prepare(study: Study, task: str, until: float | None) -> None:
    if not _is_over(until):
        _task(study, task)


def _score(study: Study, task: str, seed: int, until: float | None) -> None:
    if not _is_over(until):
        _task(study, task).importance(seed)


def _run(study: Study, task: str, name: str, seed: int, until: float | None) -> bool:
    """Whether there was time for it."""
    if _is_over(until):
        say(f"time is up before {task}, {name}, seed {seed}; the same command goes on from here")
        return False
    run(study.name, _task(study, task), name, study.budget, seed)
    return True
