"""The `moebert` command: parses, calls, prints.

torch and transformers, seconds to import, are imported inside the commands: help and wrong usage answer at once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

Task = Literal["sst2", "cola", "mrpc", "stsb", "csv"]
Routing = Literal["hash-random", "hash-balance", "gate-token", "gate-sentence"]
Kind = Literal["classification", "regression"]
Comparison = Literal["random", "none"]

_DATA = "Task and data"
_CSV = "Your own table (--task csv)"
_EXPERTS = "Experts"
_TRAINING = "Training"

app = typer.Typer(
    name="moebert",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Turn a fine-tuned BERT into MoEBERT: its feed-forward networks become experts, cut by the importance of "
        "their neurons and distilled from the model itself (Zuo et al., NAACL 2022).\n\n"
        "[bold]See it work[/bold], no data needed:\n\n"
        "    moebert demo\n\n"
        "[bold]Compress a model of yours[/bold], fine-tuned on SST-2 or on a table of your own:\n\n"
        "    moebert compress --teacher my-bert --task sst2 --data SST-2 --output runs/sst2\n\n"
        "    moebert compress --teacher my-bert --task csv --data reviews.csv --text review --label stars "
        "--output runs/reviews\n\n"
        "Interrupt any run and give the same command again: it goes on where it was."
    ),
)
