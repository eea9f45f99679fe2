"""How a command of `moebert` begins, and ends: in a sentence, where its user can put right what is wrong."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType, MappingProxyType
from typing import Any

import typer
from rich.console import Console

from moebert_kernels.cli_options import expand_options, option_of

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130

_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


def run_app(app: typer.Typer) -> None:
    """Run the command line of this process; it may be interrupted at any time."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding than UTF-8 must not end work with an error when it is told of.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Before and after a command's work an interruption ends the process at once: while libraries are imported
    # and while Python shuts down, a KeyboardInterrupt may be swallowed, or come out as another error.
    _on_interruption(_leave)
    try:
        app()
    finally:
        _on_interruption(_leave)


def command(
    app: typer.Typer, name: str, *, by_many: bool = False, names: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command.

    Args:
        app: to register it with.
        name: as it is typed.
        by_many: whether several processes can do it together, started by torchrun or accelerate.
        names: what arguments of the library are called here, but for those that are options of that name.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        expanded = expand_options(function)

        @functools.wraps(expanded)
        def run(**arguments: Any) -> None:
            try:
                import_libraries()
                # From here on what is being written is removed, and the user is told how to go on.
                _on_interruption(signal.default_int_handler, instead_of=_leave)
                _run(name, by_many, functools.partial(expanded, **arguments))
            except KeyboardInterrupt:
                _say_once("interrupted; run the same command again to go on")
                raise typer.Exit(INTERRUPTED) from None
            except (ValueError, OSError) as error:
                sentence, code = _explain(error, lambda argument: names.get(argument) or option_of(argument))
                _say_once(sentence, style="red")
                raise typer.Exit(code) from None

        return app.command(name)(run)

    return register


def import_libraries() -> None:
    """Import what commands need, and let their bars and warnings not run through ours."""
    import warnings

    import datasets
    import transformers

    # The parts that import all the others.
    from moebert_kernels.compress import demo  # noqa: F401
    from moebert_kernels.compress.runs import stage_by_stage  # noqa: F401

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Other warnings are said without source lines.
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # asked for by default, also without a GPU


def _run(name: str, by_many: bool, work: Callable[[], None]) -> None:
    from moebert_kernels.compress import distributed
    from moebert_kernels.errors import UserError

    with distributed.one_voice():
        if distributed.world_size() > 1 and not by_many:
            raise UserError(f"moebert {name} runs in one process: start it without torchrun or accelerate")
        work()


def _explain(error: ValueError | OSError, name_of: Callable[[str], str]) -> tuple[str, int]:
    """What to say of an error, and the exit code; a defect of ours is raised again."""
    from moebert_kernels.compress.storage.writing import explain
    from moebert_kernels.errors import OutputError, UserError

    known = error if isinstance(error, UserError) else explain(error)
    if known is None:
        raise error
    return known.told(name_of), FAILED if isinstance(known, OutputError) else USER_ERROR


def _say_once(sentence: str, style: str | None = None) -> None:
    from moebert_kernels.compress import distributed

    distributed.say_once(lambda: _say_on_stderr(sentence, style))


def _say_on_stderr(sentence: str, style: str | None = None) -> None:
    Console(stderr=True, soft_wrap=True, emoji=False).print(
        sentence, style=style, markup=False, highlight=False
    )


def _on_interruption(
    handler: Callable[[int, FrameType | None], Any],
    *,
    instead_of: Callable[[int, FrameType | None], Any] | None = None,
) -> None:
    for number in _INTERRUPTIONS:
        before = signal.getsignal(number)
        # A shell lets what it runs in the background ignore Ctrl-C.
        if before is not signal.SIG_IGN and instead_of in (None, before):
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
