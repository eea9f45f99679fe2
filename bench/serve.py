"""Encoders in the runtimes that serve them: `python -m bench serve`.

Every model in every runtime has a process of its own, since the threads of two sessions in one process take
each other's time; one process at a time runs, and all have their turn in every round. Nothing is timed whose
answers are not PyTorch's.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebert_kernels.environment import BUSY
from moebert_kernels.timing import spread

from . import ceilings
from .cases import Request, token_ids
from .plot import NotDrawn
from .results import Results, Row, Run, slug, write
from .run import Settings, describe_run
from .serving.contenders import MODELS, TIED, Contender, load_module, prepare
from .serving.picture import draw
from .serving.rounds import Workers, take_turns, workers
from .serving.tables import AIMS_LEGEND, LEGEND, main_tables, more_tables
from .serving.worker import RUNTIMES, Feed
from .tables import plain_text
from .text import read_batch

SHAPES = ("minilm", "bert-base")
BATCHES = ((1, 16), (1, 32), (1, 128), (8, 128))
TOY_BATCHES = ((1, 5), (2, 6))
VOCABULARY = 30522
_WORKS = {"teacher": "dense", "narrow": "bound", "ours": "experts", TIED: "tied"}
_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")
# rms of what a graph answers that PyTorch does not, relative: beyond, it is another model and not timed.
LIMITS = {"fp32": 1e-4, "int8": 0.35}


Expected = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class ServeSettings:
    """What to measure.

    Attributes:
        shapes: of `SHAPES`, or "toy".
        text: file of sentences for a padded batch; None for none.
        threads: of each process.
        rounds: turns of each contender in a case.
        seconds: of each turn, at least.
        limit: seconds that a shape's rounds may take, shared out to its cases.
        only: runtimes; None for all that are installed.
        models: of `contenders.MODELS`, or `contenders.TIED`.
        graphs: folder where models and graphs are kept for the next run; None for a temporary one.
    """

    shapes: tuple[str, ...] = SHAPES
    text: str | None = None
    threads: int = 2
    rounds: int = 7
    seconds: float = 0.1
    limit: float = 360.0
    only: tuple[str, ...] | None = None
    models: tuple[str, ...] = MODELS
    graphs: Path | None = None


def measure(
    settings: ServeSettings, out: Path | None, say: Callable[[str], None], prepare_only: bool = False
) -> Results | None:
    """Make what is missing, time it, print tables and with `out` write a result file.

    Raises:
        ValueError: a shape or a runtime does not exist, or is not installed.
    """
    runtimes = _runtimes(settings.only)
    room = settings.graphs or Path(tempfile.mkdtemp(prefix="bench-serve-"))
    try:
        made = {shape: prepare(shape, room, runtimes, settings.models, say) for shape in settings.shapes}
        if prepare_only:
            return None
        run = _describe(settings)
        if (run.busy_cpus or 0) > BUSY:
            say(f"Other work keeps {run.busy_cpus:.1f} processors busy: it will distort the figures.")
        kept: list[Row] = []
        rows = _kept(_rows(made, settings), kept)
        if out is None:
            for _ in rows:
                pass
        else:
            say(f"{write(out, run, rows)} written")
    finally:
        if settings.graphs is None:
            shutil.rmtree(room)
    results = Results(run, tuple(kept))
    if out is not None:
        try:
            say(f"{draw(results, out, out / f'{slug(run)}.svg')} drawn")
        except NotDrawn as error:
            say(f"no picture: {error}")
    for table in (*main_tables(results), *more_tables(results)):
        say(f"\n{plain_text(table)}")
    say(f"\n{LEGEND}. {AIMS_LEGEND.replace('**', '')}")
    return results


def _kept(rows: Iterator[Row], kept: list[Row]) -> Iterator[Row]:
    for row in rows:
        kept.append(row)
        yield row


def _runtimes(only: tuple[str, ...] | None) -> tuple[str, ...]:
    unknown = [name for name in only or () if name not in RUNTIMES]
    if unknown:
        raise ValueError(f"there is no runtime {', '.join(unknown)}; there are: {', '.join(RUNTIMES)}")
    missing = [name for name in only or ("onnxruntime",) if _version(name) is None]
    if missing:
        raise ValueError(f"the benchmark serve needs packages not installed here: {', '.join(missing)}")
    return tuple(name for name in RUNTIMES if name in (only or RUNTIMES) and _version(name) is not None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe(settings: ServeSettings) -> Run:
    described = Settings(
        request=Request(shapes=settings.shapes, text=settings.text),
        threads=settings.threads,
        rounds=settings.rounds,
        seconds=settings.seconds,
        limit=settings.limit,
        only=settings.only,
        probes=ceilings.TOY if "toy" in settings.shapes else None,
    )
    run = describe_run("serve", ("float32",), torch.device("cpu"), described)
    versions = run.environment["versions"] | {name: _version(name) for name in _PACKAGES}
    return replace(run, environment=run.environment | {"versions": versions})


@dataclass(frozen=True, eq=False)
class Batch:
    """One case: its name, what rows record of it, and the models' inputs."""

    name: str
    case: dict[str, Any]
    feed: Feed


def batches(toy: bool, text: str | None) -> list[Batch]:
    """Full sequences, of the text's tokens if there is one, and then its padded batch."""
    found = []
    padded = None if text is None else read_batch(text, VOCABULARY)
    for count, length in TOY_BATCHES if toy else BATCHES:
        if padded is None:
            ids_BS = token_ids(count, length, VOCABULARY, 0).numpy()
        else:
            ids_BS = np.resize(padded.ids_BS[padded.mask_BS != 0].numpy(), (count, length))
        found.append(_batch(f"{count}×{length}", ids_BS, np.ones_like(ids_BS)))
    if padded is not None:
        where = "/".join(Path(str(text)).parts[-2:])
        found.append(_batch("text", padded.ids_BS.numpy(), padded.mask_BS.numpy(), where))
    return found


def _batch(name: str, ids_BS: np.ndarray, mask_BS: np.ndarray, text: str | None = None) -> Batch:
    feed = {"input_ids": ids_BS, "attention_mask": mask_BS, "token_type_ids": np.zeros_like(ids_BS)}
    case = {
        "case": name,
        "T": ids_BS.size,
        "sequence": ids_BS.shape[1],
        "text": text,
        "real": int(mask_BS.sum()),
    }
    return Batch(name, case, feed)


def _rows(made: dict[str, list[Contender]], settings: ServeSettings) -> Iterator[Row]:
    for shape, contenders in made.items():
        cases = batches(shape == "toy", settings.text)
        expected = _references(contenders, cases)
        with tempfile.TemporaryDirectory(prefix="bench-serve-") as room:
            inputs = Path(room) / "inputs.npz"
            arrays: dict[str, Any] = {f"{b.name}|{name}": x for b in cases for name, x in b.feed.items()}
            np.savez(inputs, **arrays)
            with workers(contenders, inputs, settings.threads, _show) as running:
                for batch in cases:
                    limit = settings.limit / len(cases)
                    yield from _case_rows(batch, shape, running, expected, settings, limit)
    _show("")


def _references(contenders: list[Contender], cases: list[Batch]) -> Expected:
    """What PyTorch answers, by model and case."""
    found = {}
    for model, folder in {c.model: c.folder for c in contenders}.items():
        module = load_module(folder / "torch")
        with torch.inference_mode():
            for batch in cases:
                feed = {name: torch.from_numpy(x) for name, x in batch.feed.items()}
                found[model, batch.name] = module(**feed)[-1].numpy()
    return found


def _case_rows(
    batch: Batch, shape: str, running: Workers, expected: Expected, settings: ServeSettings, limit: float
) -> Iterator[Row]:
    errors, reasons = {}, dict(running.failed)
    for name, worker in running.started.items():
        contender = worker.contender
        errors[name] = relative_error(worker.answers[batch.name], expected[contender.model, batch.name])
        if not errors[name] <= LIMITS[contender.precision]:
            reasons[name] = f"wrong: the answer is off by {errors[name]:.2g} (rms, relative)"
    right = {name: worker for name, worker in running.started.items() if name not in reasons}
    _show(f"{shape}, {batch.name}: {len(right)} in turn")
    deadline = time.monotonic() + limit
    samples, ended = take_turns(right, batch.name, settings.rounds, settings.seconds, deadline)
    running.failed.update(ended)
    reasons |= ended
    for contender in running.contenders:
        name = contender.name
        described = {"runtime": contender.runtime, "precision": contender.precision, "form": contender.form}
        yield Row(
            case={"shape": shape, **batch.case, **described},
            entry=contender.model,
            work=_WORKS[contender.model],
            pass_="forward",
            launch="eager",
            cache="warm",
            dispatch="inside",
            seconds=spread(samples[name]) if name in samples else None,
            did_not_run=reasons.get(name),
            errors={"y": errors[name]} if name in errors else {},
        )


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """rms of the difference by rms of what is expected; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def _show(words: str) -> None:
    """On stderr, in one line that the next one replaces; a log needs none."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{words}", end="", file=sys.stderr, flush=True)
