"""The options of the `moebert` command: what each is called, means, and is by default.

Options that belong together are a frozen dataclass. A command that takes one as a parameter has all its
options on the command line, see `expand_options`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from moebert_kernels.compress import defaults

if TYPE_CHECKING:
    from moebert_kernels.compress.data.tasks import TaskData
    from moebert_kernels.compress.runs.settings import CompressSettings

GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
TaskName = Literal[GlueName, "squad", "squad_v2", "conll", "csv", "embed"]
Kind = Literal["classification", "multi_label_classification", "regression"]
Quantization = Literal["int8"]
Routing = Literal["hash-random", "hash-balance", "hash-affinity", "gate-token", "gate-sentence"]

_LABELLED = "With official metrics: GLUE's, SQuAD's, or conll, words with BIO tags. csv: a table of your own."
_data = functools.partial(typer.Option, rich_help_panel="Task and data")
_table = functools.partial(typer.Option, rich_help_panel="Your own table")
_answers = functools.partial(typer.Option, rich_help_panel="Answers, with --task squad or squad_v2")
_experts = functools.partial(typer.Option, rich_help_panel="Experts")
_training = functools.partial(typer.Option, rich_help_panel="Training")


@dataclass(frozen=True)
class DataOptions:
    """The rows to train and validate on."""

    task: Annotated[
        TaskName | None,
        _data(
            "--task",
            help=f"{_LABELLED} embed: sentences without labels, for a model that embeds them.",
        ),
    ] = None
    data: Annotated[
        str | None,
        _data(
            "--data",
            metavar="PATH|hub",
            help="The folder of the original files; for csv the table, .csv, .tsv or .jsonl; for embed a "
            "table too, or a .txt with a sentence per line. Or hub: the data set that the Hugging Face hub "
            "has of the task; hub:NAME or hub:NAME:CONFIG: another one. Without --task, where labels are not "
            "needed, text alone, for a model of any head: a .txt with one a line, or a table.",
        ),
    ] = None
    text_column: Annotated[str | None, _table(help="The text.", show_default="text")] = None
    pair_column: Annotated[str | None, _table(help="A second text, where rows are pairs.")] = None
    label_column: Annotated[str | None, _table(help="The label.", show_default="label")] = None
    validation_data: Annotated[Path | None, _table(help="A second table, to validate on.")] = None
    validation_fraction: Annotated[
        float | None,
        _table(help="Without a second: the part to hold out.", show_default="0.1"),
    ] = None
    split_seed: Annotated[
        int | None,
        _table(help="Of the rows held out. A teacher and its student must have the same.", show_default="0"),
    ] = None
    kind: Annotated[
        Kind | None,
        _table(
            help="By default regression if labels are numbers and not all of them whole. Several labels to a "
            'row have "|" between them, or are a list in a .jsonl.'
        ),
    ] = None
    doc_stride: Annotated[
        int | None,
        _answers(
            help="Tokens that neighbouring windows of a long context have in common.",
            show_default="128, or less in short windows",
        ),
    ] = None
    n_best: Annotated[
        int | None, _answers(help="Starts and ends of a window that are combined.", show_default="20")
    ] = None
    max_answer_length: Annotated[
        int | None, _answers(help="Tokens of the longest answer.", show_default="30")
    ] = None
    null_threshold: Annotated[
        float | None,
        _answers(
            help="squad_v2: by how much no answer must score higher than the best one.", show_default="0"
        ),
    ] = None

    def load(self, *, needs_labels: bool = True, pairs: str | None = None) -> TaskData:
        """Read the rows.

        Args:
            needs_labels: whether what they are for does. If not, and if no task or label column is named, a
                file of text will do: rows have the kind `texts.KIND` then; of --task embed, `sentences.KIND`.
            pairs: of sentences, with scores; for --task embed.

        Raises:
            UserError: the options do not fit each other or the files.
        """
        from moebert_kernels.compress.data.tasks import AnswerOptions, CsvOptions, load_task
        from moebert_kernels.errors import UserError

        if pairs is not None and self.task != "embed":
            raise UserError("--pairs judges models that embed sentences, and belongs to --task embed")
        if not needs_labels and self._has_no_labels():
            return self._load_texts()
        task, data = self._task_and_data()
        if task == "embed":
            if needs_labels:
                raise UserError("--task embed has no labels, which are needed here: name another task")
            return self._load_sentences(data, pairs)
        if self.validation_data is not None and self.validation_fraction is not None:
            raise UserError("give --validation-data or --validation-fraction, not both")
        table = _given(
            text=self.text_column,
            text_pair=self.pair_column,
            label=self.label_column,
            validation_file=self.validation_data,
            validation_fraction=self.validation_fraction,
            kind=self.kind,
            seed=self.split_seed,
        )
        answers = _given(
            doc_stride=self.doc_stride,
            n_best=self.n_best,
            max_answer_length=self.max_answer_length,
            null_threshold=self.null_threshold,
        )
        return load_task(
            task,
            data,
            csv=CsvOptions(**table) if table else None,
            answers=AnswerOptions(**answers) if answers else None,
        )

    def _has_no_labels(self) -> bool:
        import warnings

        from moebert_kernels.compress.data.tasks import CsvOptions
        from moebert_kernels.compress.data.tasks.texts import TEXT_SUFFIXES, has_no_labels

        if self.data is None:
            return False
        suffix = Path(self.data).suffix.lower()
        if suffix not in TEXT_SUFFIXES or (self.task == "csv" and suffix == ".txt"):
            return False
        if self.task == "csv" and self.label_column is None:
            columns = CsvOptions(**_given(text=self.text_column))
            if has_no_labels(self.data, columns):
                warnings.warn(
                    f"{self.data} has no column {columns.label!r}: its texts are taken without labels; for "
                    "labelled rows, give --label-column",
                    stacklevel=2,
                )
                return True
        return self.task is None

    def _load_texts(self) -> TaskData:
        from moebert_kernels.compress.data.tasks import CsvOptions
        from moebert_kernels.compress.data.tasks.texts import load_texts
        from moebert_kernels.errors import UserError

        used = (
            *("task", "data", "text_column", "pair_column"),
            *("validation_data", "validation_fraction", "split_seed"),
        )
        self._check_unused(used, "text without labels; for labelled rows, name a --task")
        if self.validation_data is not None and self.validation_fraction is not None:
            raise UserError("give --validation-data or --validation-fraction, not both")
        columns = _given(
            text=self.text_column,
            text_pair=self.pair_column,
            validation_file=self.validation_data,
            validation_fraction=self.validation_fraction,
            seed=self.split_seed,
        )
        return load_texts(str(self.data), CsvOptions(**columns))

    def _load_sentences(self, data: str, pairs: str | None) -> TaskData:
        from moebert_kernels.compress.data.sentences import load_sentences
        from moebert_kernels.compress.data.tasks import CsvOptions

        used = ("text_column", "pair_column", "label_column", "validation_fraction", "split_seed")
        self._check_unused(("task", "data", *used), "--task embed")
        columns = _given(
            text=self.text_column,
            text_pair=self.pair_column,
            label=self.label_column,
            validation_fraction=self.validation_fraction,
            seed=self.split_seed,
        )
        return load_sentences(data, pairs=pairs, columns=CsvOptions(**columns))

    def _check_unused(self, used: tuple[str, ...], what: str) -> None:
        from moebert_kernels.errors import UserError

        for field in dataclasses.fields(self):
            if field.name not in used and getattr(self, field.name) is not None:
                raise UserError(f"{option_of(field.name)} does not apply to {what}")

    def as_words(self) -> list[str]:
        """What was given, as words of a command line."""
        given = _given(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return [word for name, value in given.items() for word in (option_of(name), str(value))]

    def _task_and_data(self) -> tuple[str, str]:
        from moebert_kernels.errors import UserError

        if self.task is None or self.data is None:
            missing = [name for name in ("task", "data") if getattr(self, name) is None]
            raise UserError(
                f"{' and '.join(f'--{name}' for name in missing)} must be given: "
                "--task sst2 --data SST-2, for instance, or --task csv --data my.csv; where labels are not "
                "needed, --data sentences.txt or my.csv alone"
            )
        return self.task, self.data


@dataclass(frozen=True)
class LabelledDataOptions(DataOptions):
    """Those of a command that has no use for sentences without labels."""

    task: Annotated[
        TaskName | None,
        _data(
            "--task",
            # "embed" is refused with a reason rather than unknown.
            metavar=f"[{'|'.join(name for name in get_args(TaskName) if name != 'embed')}]",
            help=_LABELLED,
        ),
    ] = None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class ExpertOptions:
    """What the feed-forward networks become."""

    experts: Annotated[int, _experts(help="Experts per layer; 4 in the paper.")] = defaults.NUM_EXPERTS
    expert_size: Annotated[
        int | None,
        _experts(
            help="Neurons of an expert; 768 of BERT-base's 3072 in the paper.",
            show_default="dense width / experts",
        ),
    ] = None
    shared: Annotated[
        int | None,
        _experts(
            help="How many of them, the most important, all experts get; 512 in the paper.",
            show_default="two thirds of the expert size",
        ),
    ] = None
    tie_shared: Annotated[
        bool,
        _experts(
            "--tie-shared",
            help="Store these once and keep them the same in all experts: a smaller model, faster on small "
            "batches. By default each expert has a copy, which fit and training make its own.",
        ),
    ] = False
    routing: Annotated[
        Routing | None,
        _experts(
            help="How a token finds its expert. hash-random: a table drawn per layer, as in the paper. "
            "hash-balance: one dealt by token frequency. hash-affinity: one made together with the experts, "
            "each for its own tokens. gate-token, gate-sentence: learned.",
            show_default=f"{defaults.ROUTING}; of adapt {defaults.ROUTING_WITHOUT_DATA}, which needs no rows "
            "and no scores per token",
        ),
    ] = None
    top_k: Annotated[int, _experts(help="Experts per token; more than 1 needs a gate.")] = 1
    no_fit: Annotated[
        bool,
        _experts(
            "--no-fit",
            help="Leave experts as they are cut, as in the paper. By default each is fitted, by least "
            "squares, to what the teacher's layers do with its tokens.",
        ),
    ] = False
    fit_rows: Annotated[int, _experts(help="Training rows to fit experts to; labels are not needed.")] = (
        defaults.FIT_ROWS
    )

    def settings(self) -> dict[str, Any]:
        """As arguments of `CompressSettings`."""
        return {
            "num_experts": self.experts,
            "expert_size": self.expert_size,
            "num_shared": self.shared,
            "tie_shared": self.tie_shared,
            "top_k": self.top_k,
            "fit": not self.no_fit,
            "fit_rows": self.fit_rows,
            **({} if self.routing is None else {"routing": self.routing}),
        }


BFloat16 = Annotated[
    bool, _training("--bf16", help="Encoders' products in bfloat16: faster on GPUs and some processors.")
]


@dataclass(frozen=True)
class DistillOptions:
    """How the student is trained."""

    epochs: Annotated[float, _training(help="Passes over the training rows; 3 to 10 in the paper.")] = (
        defaults.EPOCHS
    )
    lr: Annotated[
        float | None,
        _training(
            help="Learning rate; 1e-5 to 5e-5 in the paper.",
            show_default="3e-5, 1e-4 up to hidden size 512; of fitted students 1e-5 and 3e-5",
        ),
    ] = None
    distill_weight: Annotated[
        float,
        _training(
            help="Weight of the teacher's layers and predictions against the labels'; 1 to 5 in the paper."
        ),
    ] = defaults.DISTILL_WEIGHT
    batch_size: Annotated[
        int, _training(help="Rows of a step, over all processes; 8 to 64 in the paper.")
    ] = defaults.BATCH_SIZE
    weight_decay: Annotated[float, _training(help="Of AdamW; 0 to 0.1 in the paper.")] = defaults.WEIGHT_DECAY
    warmup: Annotated[
        float, _training(help="Share of the steps, from 0 to below 1, in which the learning rate rises.")
    ] = defaults.WARMUP
    labels: Annotated[
        bool | None,
        _training(
            "--labels/--no-labels",
            help="Learn from labels too, where rows have them.",
            show_default="by students that are not fitted",
        ),
    ] = None
    dropout: Annotated[
        bool | None,
        _training(
            "--dropout/--no-dropout",
            help="Train with the teacher's dropout.",
            show_default="of students that are not fitted",
        ),
    ] = None
    bf16: BFloat16 = False

    def refuse(self) -> None:
        """Raise a UserError where any is given that is about training alone, for a run without."""
        from moebert_kernels.errors import UserError

        for field in dataclasses.fields(self):
            if field.name != "bf16" and (value := getattr(self, field.name)) != field.default:
                raise UserError(
                    f"{option_of(field.name)} must not be given where nothing is trained, got {value}"
                )

    def settings(self) -> dict[str, Any]:
        """As arguments of `CompressSettings`."""
        return {
            "epochs": self.epochs,
            "learning_rate": self.lr,
            "distill_weight": self.distill_weight,
            "batch_size": self.batch_size,
            "weight_decay": self.weight_decay,
            "warmup": self.warmup,
            "labels": self.labels,
            "dropout": self.dropout,
            "bf16": self.bf16,
        }


@dataclass(frozen=True)
class FinetuneOptions:
    """How a teacher is trained; the fields are arguments of `finetune`."""

    epochs: Annotated[float, _training(help="Passes over the training rows.")] = defaults.FINETUNE_EPOCHS
    lr: Annotated[float, _training(help="The highest learning rate; small models like 1e-4.")] = (
        defaults.FINETUNE_LEARNING_RATE
    )
    batch_size: Annotated[int, _training(help="Rows of a step, over all processes.")] = defaults.BATCH_SIZE
    weight_decay: Annotated[float, _training(help="Of AdamW.")] = defaults.FINETUNE_WEIGHT_DECAY
    bf16: BFloat16 = False


@dataclass(frozen=True)
class RunOptions:
    """What every stage that reads rows has."""

    max_length: Annotated[
        int | None,
        _data(
            help="Tokens a row is cut to.",
            show_default="128, for questions 384; or the model's most if that is fewer",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of everything random; the same seed, the same result.")] = 0


ScoredRows = Annotated[int, _experts("--importance-rows", help="Training rows to take importance on.")]
Comparisons = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="NAMES",
        help="Models of the same cost to make, distil and measure too, with commas between. random: the same "
        "experts, filled at random; narrow: dense, the most important neurons; layers: fewer layers.",
        show_default="none",
    ),
]
ScoredPairs = Annotated[
    str | None,
    _data(
        "--pairs",
        metavar="PATH",
        help="For embed: pairs of sentences scored by how alike they are, to judge a model by. The "
        "folder of the original STS-B files, or a table with the columns text, text_pair and label, or those "
        "you name.",
    ),
]
Seeds = Annotated[
    int,
    typer.Option("--seeds", help="How many seeds to make each model with, to give mean and spread."),
]
model_folder = functools.partial(typer.Option, exists=True, file_okay=False)  # said before any import
Teacher = Annotated[
    Path,
    model_folder(
        "--teacher", help="Folder of the fine-tuned model and its tokenizer, as transformers saves it."
    ),
]


_OPTION_OF = {
    "num_experts": "--experts",
    "num_shared": "--shared",
    "learning_rate": "--lr",
    "comparisons": "--compare",
    "teacher_dir": "--teacher",
    "student_dir": "--student",
    "model_dir": "--model",
    "output_dir": "--output",
    "validation_file": "--validation-data",
    "text": "--text-column",
    "text_pair": "--pair-column",
    "label": "--label-column",
}


def option_of(argument: str) -> str:
    """The option by which a user gives an argument of the library."""
    return _OPTION_OF.get(argument, "--" + argument.replace("_", "-"))


def compress_settings(*groups: ExpertOptions | DistillOptions | RunOptions, **more: Any) -> CompressSettings:
    """The library's settings of the given options.

    Raises:
        UserError: a value makes no sense.
    """
    from moebert_kernels.compress.runs.settings import CompressSettings

    for group in groups:
        more |= dataclasses.asdict(group) if isinstance(group, RunOptions) else group.settings()
    return CompressSettings(**more)


def expand_options(function: Callable[..., None]) -> Callable[..., None]:
    """Let the parameters that are dataclasses appear as their fields, one option each.

    Returns:
        A function of keyword parameters alone that makes the dataclasses and calls `function`.
    """
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = hints[name]
        field_hints = get_type_hints(hints[name], include_extras=True)
        for field in dataclasses.fields(hints[name]):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=field_hints[field.name],
                )
            )

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        packed = {
            name: group(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        function(**arguments, **packed)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
