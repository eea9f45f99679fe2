"""Quality: ways to make an encoder cheaper, compared on real tasks: cut, fitted and distilled.

    python -m bench.quality run --data DATA --out runs/quality --contenders narrow,affinity-16
    python -m bench.quality collect runs/quality --to bench/results/quality
    python -m bench.quality table bench/results/quality/fitted.jsonl

DATA is a folder that holds Banking77 (train.csv, test.csv) and GLUE's SST-2, CoLA, MRPC and STS-B in their
original layout. For every task a teacher is fine-tuned once; then each contender is cut from it, its experts
fitted and, with --distill, distilled, for every seed, and evaluated after each step. Each of these writes a
record when it is done: the same command given again goes on where it was, in the middle of a distillation
too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebert_kernels.compress.storage.artifacts import exclusive

from .contenders import CONTENDERS
from .records import collect, read, read_rows
from .study import TASKS, StudentBudget, TeacherBudget, TrainingBudget
from .tables import likeness_table, table
from .workers import Study, go_through

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command("run")
def run_command(
    data: Annotated[Path, typer.Option(help="Folder of the tasks' folders.")],
    out: Annotated[Path, typer.Option(help="Folder for teachers, scores, checkpoints and records.")],
    study: Annotated[str, typer.Option(help="Name of these runs.")] = "main",
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pre-trained BERT; default: the demonstration's MiniLM.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(TASKS),
    contenders: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(CONTENDERS),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    cost: Annotated[int, typer.Option(min=1, help="A token meets the dense width divided by this.")] = 4,
    fit: Annotated[bool, typer.Option("--fit/--no-fit", help="Fit experts.")] = True,
    distill: Annotated[bool, typer.Option("--distill/--no-distill", help="Distil at the end.")] = False,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 64,
    teacher_epochs: Annotated[float | None, typer.Option(help="Of fine-tuning; else the task's.")] = None,
    teacher_lr: Annotated[float | None, typer.Option(help="Of fine-tuning; else the task's.")] = None,
    importance_rows: Annotated[int, typer.Option(min=1, help="Training rows to score neurons on.")] = 2048,
    fit_rows: Annotated[int, typer.Option(min=1, help="Training rows to fit to, at most.")] = 4096,
    train_rows: Annotated[int, typer.Option(min=1, help="To distil on, at most.")] = 20_000,
    epochs: Annotated[float, typer.Option(help="Of distillation.")] = 2.0,
    lr: Annotated[float, typer.Option(help="Of distillation.")] = 3e-5,
    distill_weight: Annotated[float, typer.Option(help="Lambda.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Of all training.")] = 32,
    bf16: Annotated[bool, typer.Option("--bf16", help="Matrix products in bfloat16.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes beside each other, each with its models.")] = 1,
    limit: Annotated[float | None, typer.Option(help="Start nothing more after so many seconds.")] = None,
) -> None:
    """Make teachers and contenders, or go on with them: all tasks with one seed, then with the next."""
    unknown = [name for name in tasks.split(",") if name not in TASKS]
    unknown += [name for name in contenders.split(",") if name not in CONTENDERS]
    if unknown:
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; tasks are {', '.join(TASKS)}, contenders {', '.join(CONTENDERS)}"
        )
    teaching = TeacherBudget(teacher_epochs, teacher_lr, batch_size, max_length, importance_rows, bf16)
    training = TrainingBudget(train_rows, epochs, lr, distill_weight, batch_size) if distill else None
    budget = StudentBudget(cost, fit_rows if fit else None, training)
    with exclusive(out):
        plan = Study(study, data, model, out, teaching, budget)
        go_through(plan, tasks.split(","), contenders.split(","), seeds, jobs=jobs, limit=limit)


@app.command("collect")
def collect_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `run`.")],
    to: Annotated[Path, typer.Option(help="Folder to write to: a file of json lines for each study.")],
) -> None:
    """Put the records of finished runs together."""
    for file, count in collect(folders, to).items():
        typer.echo(f"{count} records in {file}")


@app.command("table")
def table_command(file: Annotated[Path, typer.Argument(help="Of `collect`.")]) -> None:
    """Print a study: qualities and, where every row's outcome is known, likeness to the teacher."""
    records, rows = read(file), read_rows(file)
    typer.echo(table(records, rows))
    if rows is not None:
        typer.echo(f"\n{likeness_table(records, rows)}")


if __name__ == "__main__":
    app()
