"""The command line of the benchmarks: `python -m bench`, and `moebert bench`.

It is made of the standard library alone: a borrowed GPU machine rarely has more than PyTorch and Triton.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import PARAMETERS, TAKES, flag

if TYPE_CHECKING:
    from .cases import Request
    from .registry import Op

SUMMARY = "Measure the expert FFN, its dispatch, whole models and importance, the peers beside them."
_HELP = {
    "ffn": "The expert FFN against the dense FFN it replaces, loops, and other grouped GEMMs.",
    "dispatch": "From token ids to every layer's sorted order.",
    "model": "Whole encoders: MoEBERT, the dense BERT, a DistilBERT shape.",
    "importance": "Scoring neurons: one backward pass per batch against the published procedure.",
    "all": "The four of them; each takes of the options what its own help lists.",
}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench") -> None:
    """Run a command line, by default this process's; wrong options end the process with status 2."""
    parser, commands = make_parser(prog)
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help(sys.stderr)
        sys.exit(2)
    try:
        given.run(given)
    except (ValueError, OSError) as error:
        commands[given.command].error(str(error))


def make_parser(prog: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all commands, and each command's own by name."""
    parser = argparse.ArgumentParser(prog, description=SUMMARY, allow_abbrev=False)
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    for name, text in _HELP.items():
        benchmark = command(name, text, measure)
        benchmark.usage = f"{prog} {name} [options]"
        _add_general(benchmark)
        _add_shapes(benchmark, TAKES.get(name, PARAMETERS))
        _add_method(benchmark)
    _add_general(command("host", "Microseconds of the host per call: no GPU is needed.", measure_host))
    model = command("machine", "What a model of the GPU predicts, and which tiles it would choose.", predict)
    model.add_argument("--card", help="as CUDA names it, for the choice of tiles (default: NVIDIA H200)")
    model.add_argument(
        "--results", type=_folder, default=Path("bench/results"), help="folder of result files"
    )
    _add_serve(
        command("serve", "Encoders in serving runtimes, each in a process: fp32, int8, padded text.", serve)
    )
    readme = command("readme", "Write the measured tables into a README, or several.", update_readme)
    readme.add_argument(
        "files",
        type=_file,
        nargs="+",
        help="a markdown file with <!-- bench:NAME:begin/end --> markers",
        metavar="FILE",
    )
    readme.add_argument(
        "--results",
        type=_folder,
        default=Path("bench/results"),
        help="folder of result files (default: %(default)s)",
    )
    readme.add_argument(
        "--check",
        action="store_true",
        help="change nothing; if the tables are old, show what would change and fail",
    )
    plot = command("plot", "Draw a result file: time against tokens, and the roofline.", draw)
    plot.add_argument("file", type=_file, help="a result file", metavar="FILE")
    plot.add_argument("--out", type=Path, help="picture to write (default: beside the file, .svg)")
    return parser, subparsers.choices


def _add_general(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--toy", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for a .jsonl and a plot of each (default: print only)"
    )


def _add_shapes(parser: argparse.ArgumentParser, taken: Collection[str]) -> None:
    """Sizes that are not taken are left out of the help; who gives one is still told why it is refused."""
    group = parser.add_argument_group("shapes (default: a range that suits the device)")

    def option(field: str, text: str, **more: object) -> None:
        shown = text if field in taken else argparse.SUPPRESS
        group.add_argument(flag(field), help=shown, **more)  # type: ignore[arg-type]

    option("T", "T, e.g. 64,512,4096", type=_numbers, metavar="N,...")
    option("D", "D", type=_count, metavar="N")
    option("F", "F, neurons of one expert", type=_count, metavar="N")
    option("E", "E", type=_count, metavar="N")
    option("K", "K, experts of one token", type=_count, metavar="N")
    option("L", "L", type=_count, metavar="N")
    option("sequence", "sequence length", type=_count, metavar="N")
    option("dtypes", "float32, bfloat16, float16", type=_words, metavar="NAME,...")
    option(
        "routings",
        "balanced (alone by default), zipf, skewed (one expert has 70 %%)",
        type=_words,
        metavar="NAME,...",
    )
    option("shapes", "encoders' sizes: bert-base, minilm", type=_words, metavar="NAME,...")
    option("norm", "the form that encoders use: residual and each expert's LayerNorm", action="store_true")
    option("text", "sentences, a line each or a .tsv's column: a padded batch of 32", metavar="FILE")


def _add_method(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("method").add_argument
    option("--threads", type=_count, metavar="N", help="on the CPU, pinned (default: all)")
    option(
        "--passes",
        type=_words,
        metavar="NAME,...",
        help="e.g. forward,forward+backward; of ffn also dispatch+forward, dispatch+forward+backward",
    )
    option("--launch", type=_words, metavar="NAME,...", help="eager, graph")
    option("--cache", type=_words, metavar="NAME,...", help="warm, cold (data rotated past the last cache)")
    option(
        "--rounds",
        type=_count,
        metavar="N",
        default=30,
        help="interleaved samples of each entry (default: %(default)s)",
    )
    option(
        "--seconds",
        type=_seconds,
        metavar="S",
        default=10.0,
        help="stop the rounds of one table column after this (default: %(default)s)",
    )
    option("--limit", type=_seconds, metavar="S", help="start nothing more after so many seconds")
    option("--only", type=_words, metavar="NAME,...", help="entries to run (default: all)")
    option(
        "--peer-path",
        type=_folder,
        metavar="FOLDER",
        help="with triton_kernels' and scattermoe's sources",
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--toy", action="store_true", help="a tiny model: does everything run?")
    option("--shape", type=_words, metavar="NAME,...", help="of minilm, bert-base (default: both)")
    option("--text", metavar="FILE", help="sentences, a line each or a .tsv's column: a padded batch of 32")
    option("--threads", type=_count, metavar="N", default=2, help="of each process (default: %(default)s)")
    option(
        "--rounds", type=_count, metavar="N", default=7, help="turns of each process (default: %(default)s)"
    )
    option(
        "--seconds",
        type=_seconds,
        metavar="S",
        default=0.1,
        help="of a turn, at least (default: %(default)s)",
    )
    option(
        "--limit",
        type=_seconds,
        metavar="S",
        default=270.0,
        help="seconds for a shape (default: %(default)s)",
    )
    option(
        "--only", type=_words, metavar="NAME,...", help="of torch, onnxruntime, openvino (default: all here)"
    )
    option(
        "--models", type=_words, metavar="NAME,...", help="of teacher, narrow, ours (default: these), tied"
    )
    option("--graphs", type=Path, metavar="FOLDER", help="where models and graphs are kept for the next run")
    option("--prepare", action="store_true", help="fill --graphs, and time nothing")
    option(
        "--quality",
        type=_folder,
        metavar="RUN",
        help="of a finished `moebert compress`: what its graphs answer",
    )
    option("--out", type=Path, metavar="FOLDER", help="for result files and plots (default: print only)")


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise argparse.ArgumentTypeError(f"expected words with commas between them, got {text!r}")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(map(_is_count, words)):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers from 1 with commas between them, got {text!r}"
        )
    return tuple(int(word) for word in words)


def _count(text: str) -> int:
    if not _is_count(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _is_count(text: str) -> bool:
    return re.fullmatch(r"\s*0*[1-9]\d*\s*", text) is not None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return seconds


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text)


def _among(option: str, words: tuple[str, ...] | None, known: tuple[str, ...]) -> tuple[str, ...] | None:
    unknown = [word for word in words or () if word not in known]
    if unknown:
        raise ValueError(f"{option} must be among {', '.join(known)}, got {', '.join(unknown)}")
    return words


def _check_taken(op: Op, asked: Request) -> None:
    """A size that a benchmark has no use for must not seem to have been measured."""
    for field in PARAMETERS:
        if getattr(asked, field) is not None and field not in op.takes:
            taken = ", ".join(flag(known) for known in PARAMETERS if known in op.takes)
            raise ValueError(f"{op.name} has no {flag(field)}; its shapes are chosen by {taken}")


def measure(given: argparse.Namespace) -> None:
    """Verify every entry against a float64 reference, then time them all in turn."""
    import torch

    from . import ceilings
    from .cases import DTYPES, SHAPES, TIMED_ROUTINGS, TOY, Request
    from .run import Settings
    from .suite import OPS, run_benchmarks
    from .timing import CACHES, LAUNCHES

    asked = Request(
        T=given.tokens,
        D=given.hidden,
        F=given.expert_size,
        E=given.experts,
        K=given.top_k,
        L=given.layers,
        sequence=given.sequence,
        dtypes=_among("--dtype", given.dtype, tuple(DTYPES)),
        routings=_among("--skew", given.skew, TIMED_ROUTINGS),
        shapes=_among("--shape", given.shape, tuple(SHAPES)),
        norm=given.norm or None,
        text=given.text,
    )
    ops = list(OPS.values()) if given.command == "all" else [OPS[given.command]]
    settings = Settings(
        request=asked.over(TOY) if given.toy else asked,
        device=given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=given.threads,
        passes=_among("--passes", given.passes, tuple(dict.fromkeys(p for op in ops for p in op.passes))),
        launches=_among("--launch", given.launch, LAUNCHES),
        caches=_among("--cache", given.cache, CACHES),
        rounds=min(given.rounds, 3) if given.toy else given.rounds,
        seconds=given.seconds,
        limit=given.limit,
        peer_path=None if given.peer_path is None else str(given.peer_path),
        only=given.only,
        probes=ceilings.TOY if given.toy else None,
    )
    if given.command != "all":
        _check_taken(ops[0], asked)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    run_benchmarks([op.name for op in ops], settings, given.out)


def measure_host(given: argparse.Namespace) -> None:
    """Time what Python and PyTorch do around the kernels."""
    import torch

    from .host import measure

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    measure(device, toy=given.toy, out=given.out)


def predict(given: argparse.Namespace) -> None:
    """Print the model's tables beside what was measured."""
    from .machine import CARDS, card_of
    from .predictions import show

    card = card_of(given.card or CARDS[0].name)
    if card is None:
        raise ValueError(f"--card must be one of {', '.join(c.name for c in CARDS)}, got {given.card!r}")
    show(given.results, card)


def serve(given: argparse.Namespace) -> None:
    """Time models in serving runtimes, or score what their graphs answer."""
    from .serve import MODELS, SHAPES, TIED, ServeSettings, measure

    if given.prepare and given.graphs is None:
        raise ValueError("--prepare needs --graphs, where to keep what is made")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    if given.quality is not None:
        from .serving.quality import measure_quality

        measure_quality(given.quality, given.out, print)
        return
    settings = ServeSettings(
        shapes=("toy",) if given.toy else _among("--shape", given.shape, SHAPES) or SHAPES,
        text=given.text,
        threads=given.threads,
        rounds=min(given.rounds, 3) if given.toy else given.rounds,
        seconds=0.0 if given.toy else given.seconds,
        limit=given.limit,
        only=given.only,
        models=_among("--models", given.models, (*MODELS, TIED)) or MODELS,
        graphs=given.graphs,
    )
    measure(settings, given.out, print, given.prepare)


def update_readme(given: argparse.Namespace) -> None:
    """Write the tables, or show that they are old."""
    import difflib

    from .readme import update

    old = []
    for file in given.files:
        text = file.read_text(encoding="utf-8")
        fresh = update(text, given.results)
        if not given.check:
            file.write_text(fresh, encoding="utf-8")
        elif fresh != text:
            names = (str(file), f"{file}, by {given.results}")
            for line in difflib.unified_diff(text.splitlines(), fresh.splitlines(), *names, lineterm=""):
                print(line)
            old.append(str(file))
    if old:
        files = " ".join(old)
        sys.exit(f"{files}: not what is in {given.results}: run python -m bench readme {files}")


def draw(given: argparse.Namespace) -> None:
    """Draw a result file."""
    from .plot import plot
    from .results import read

    results, path = read(given.file), given.out or given.file.with_suffix(".svg")
    if results.run.op != "serve":
        print(plot(results, path))
        return
    from .serving.picture import draw as draw_serving

    print(draw_serving(results, given.file.parent, path))
