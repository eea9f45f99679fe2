"""The runs of a study, one after the other or several at a time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
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
            _run(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        list(pool.map(_prepare, [(study, task) for task in tasks]))
        list(pool.map(_score, [(study, *pair) for pair in pairs]))
        for done in [pool.submit(_run, *arguments) for arguments in runs]:
            done.result()


@cache
def _task(study: Study, name: str) -> Task:
    task = Task(name, study.data, study.model, study.teaching, study.out)
    task.prepare()
    return task


def _prepare(arguments: tuple[Study, str]) -> None:
    _task(*arguments)


def _score(arguments: tuple[Study, str, int]) -> None:
    study, task, seed = arguments
    _task(study, task).importance(seed)


def _run(study: Study, task: str, name: str, seed: int, until: float | None) -> None:
    if until is not None and time.time() >= until:
        say(f"time is up before {task}, {name}, seed {seed}; the same command goes on from here")
        return
    run(study.name, _task(study, task), name, study.budget, seed)
