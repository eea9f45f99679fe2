"""The command line of the benchmarks: `python -m bench`, and `moebert bench`."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from .options import PARAMETERS, TAKES, flag
from .usage import PlainGroup

if TYPE_CHECKING:
    from .cases import Request
    from .registry import Op

app = typer.Typer(
    name="bench",
    cls=PlainGroup,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure the expert FFN, its dispatch, whole models and importance, the peers beside them.",
)
_SHAPES, _METHOD = "Shapes (default: a range that suits the device)", "Method"
_HELP = {
    "ffn": "The expert FFN against the dense FFN it replaces, loops, and other grouped GEMMs.",
    "dispatch": "From token ids to every layer's sorted order.",
    "model": "Whole encoders: MoEBERT, the dense BERT, a DistilBERT shape.",
    "importance": "Scoring neurons: one backward pass per batch against the published procedure.",
    "all": "The four of them; each takes of the options what its own help lists.",
}


def _words(option: str, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise typer.BadParameter(
            f"expected words with commas between them, got {text!r}", param_hint=f"'{option}'"
        )
    return words


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9]\d*\s*", word) for word in words):
        raise typer.BadParameter(
            f"expected whole numbers from 1 with commas between them, got {text!r}", param_hint=f"'{option}'"
        )
    return tuple(int(word) for word in words)


def _among(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...] | None:
    words = _words(option, text)
    unknown = [word for word in words or () if word not in known]
    if unknown:
        raise typer.BadParameter(f"{option} must be among {', '.join(known)}, got {', '.join(unknown)}")
    return words


def _check_taken(op: Op, asked: Request) -> None:
    """A size that a benchmark has no use for must not seem to have been measured."""
    for field in PARAMETERS:
        if getattr(asked, field) is not None and field not in op.takes:
            taken = ", ".join(flag(known) for known in PARAMETERS if known in op.takes)
            raise typer.BadParameter(f"{op.name} has no {flag(field)}; its shapes are chosen by {taken}")


def measure(
    context: typer.Context,
    tokens: Annotated[str | None, typer.Option(help="T, e.g. 64,512,4096.", rich_help_panel=_SHAPES)] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="D.", rich_help_panel=_SHAPES)] = None,
    expert_size: Annotated[
        int | None, typer.Option(min=1, help="F, neurons of one expert.", rich_help_panel=_SHAPES)
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="E.", rich_help_panel=_SHAPES)] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="K, experts of one token.", rich_help_panel=_SHAPES)
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="L.", rich_help_panel=_SHAPES)] = None,
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Sequence length.", rich_help_panel=_SHAPES)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16.", rich_help_panel=_SHAPES)
    ] = None,
    skew: Annotated[
        str | None,
        typer.Option(
            help="Routings: balanced (alone by default), zipf, skewed (one expert has 70 %).",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Encoders' sizes: bert-base, minilm.", rich_help_panel=_SHAPES),
    ] = None,
    norm: Annotated[
        bool,
        typer.Option(
            "--norm",
            help="The form that encoders use: residual and each expert's LayerNorm.",
            rich_help_panel=_SHAPES,
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Sentences, a line each or a .tsv's column: a padded batch of 32.",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Tiny shapes: does everything run?")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads on the CPU, pinned; default: all.", rich_help_panel=_METHOD),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            help="E.g. forward,forward+backward; of ffn also dispatch+forward, dispatch+forward+backward.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    launch: Annotated[str | None, typer.Option(help="eager, graph.", rich_help_panel=_METHOD)] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="warm, cold (data rotated past the last cache).", rich_help_panel=_METHOD),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Interleaved samples of each entry.", rich_help_panel=_METHOD)
    ] = 30,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="Stop the rounds of one table column after this.", rich_help_panel=_METHOD),
    ] = 10.0,
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which nothing more is started.", rich_help_panel=_METHOD),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Entries to run, by name; default: all.", rich_help_panel=_METHOD)
    ] = None,
    peer_path: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder with triton_kernels' and scattermoe's sources.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a .jsonl and a plot of each; default: print only.")
    ] = None,
) -> None:
    """Verify every entry against a float64 reference, then time them all in turn."""
    import torch

    from . import ceilings
    from .cases import DTYPES, SHAPES, TIMED_ROUTINGS, TOY, Request
    from .run import Settings
    from .suite import OPS, run_benchmarks
    from .timing import CACHES, LAUNCHES

    if not seconds >= 0:
        raise typer.BadParameter(f"--seconds must not be negative, got {seconds}")
    asked = Request(
        T=_numbers("--tokens", tokens),
        D=hidden,
        F=expert_size,
        E=experts,
        K=top_k,
        L=layers,
        sequence=sequence,
        dtypes=_among("--dtype", dtype, tuple(DTYPES)),
        routings=_among("--skew", skew, TIMED_ROUTINGS),
        shapes=_among("--shape", shape, tuple(SHAPES)),
        norm=norm or None,
        text=None if text is None else str(text),
    )
    name = context.info_name or "all"
    ops = list(OPS.values()) if name == "all" else [OPS[name]]
    settings = Settings(
        request=asked.over(TOY) if toy else asked,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=threads,
        passes=_among("--passes", passes, tuple(dict.fromkeys(p for op in ops for p in op.passes))),
        launches=_among("--launch", launch, LAUNCHES),
        caches=_among("--cache", cache, CACHES),
        rounds=min(rounds, 3) if toy else rounds,
        seconds=seconds,
        limit=limit,
        peer_path=None if peer_path is None else str(peer_path),
        only=_words("--only", only),
        probes=ceilings.TOY if toy else None,
    )
    if name != "all":
        _check_taken(OPS[name], asked)
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        run_benchmarks([op.name for op in ops], settings, out)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None


def _showing(function: Callable[..., None], taken: Collection[str]) -> Callable[..., None]:
    """The function, its help without the options of shapes that are not taken; they are still explained."""
    hints = get_type_hints(function, include_extras=True)
    for field, name in PARAMETERS.items():
        if field not in taken:
            kind, option = get_args(hints[name])
            option = copy.copy(option)
            option.hidden = True
            hints[name] = Annotated[kind, option]

    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> None:
        function(*arguments, **options)

    signature = inspect.signature(function)
    parameters = [p.replace(annotation=hints[name]) for name, p in signature.parameters.items()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    return command


for _name, _text in _HELP.items():
    app.command(_name, help=_text)(_showing(measure, TAKES.get(_name, PARAMETERS)))


@app.command()
def readme(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="A markdown file with <!-- bench:NAME:begin/end --> markers."
        ),
    ],
    results: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of result files.")
    ] = Path("bench/results"),
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Change nothing; if the tables are old, show what would change and fail."
        ),
    ] = False,
) -> None:
    """Write the measured tables into a README."""
    import difflib

    from .readme import update

    text = file.read_text(encoding="utf-8")
    try:
        fresh = update(text, results)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if check and fresh != text:
        lines, new = text.splitlines(), fresh.splitlines()
        for line in difflib.unified_diff(lines, new, str(file), f"{file}, by {results}", lineterm=""):
            typer.echo(line)
        typer.echo(
            f"{file} does not show the results in {results}: run python -m bench readme {file}", err=True
        )
        raise typer.Exit(1)
    if not check:
        file.write_text(fresh, encoding="utf-8")


@app.command("plot")
def plot_command(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A result file.")],
    out: Annotated[
        Path | None, typer.Option(help="Picture to write; default: beside the file, .svg.")
    ] = None,
) -> None:
    """Draw a result file: time against tokens, and the roofline."""
    from .plot import plot
    from .results import read

    try:
        typer.echo(plot(read(file), out or file.with_suffix(".svg")))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
