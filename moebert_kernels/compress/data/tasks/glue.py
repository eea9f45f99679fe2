"""The tasks of GLUE (arXiv 1804.07461), from their original files or from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from moebert_kernels.compress.data.files import Table, read_table
from moebert_kernels.compress.data.tasks.hub import HubName, as_table
from moebert_kernels.compress.data.tasks.tables import labelled_rows
from moebert_kernels.compress.data.tasks.task import Task, TaskData
from moebert_kernels.errors import UserError

_HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class _Layout:
    """Where one source keeps a task's fields.

    Attributes:
        texts: columns of the text and of the second, if there is one.
        label: column of the label.
        header: the columns, of files that do not name them.
        join_broken: see `read_table`.
    """

    texts: tuple[str, ...]
    label: str = "label"
    header: tuple[str, ...] | None = None
    join_broken: bool = False


@dataclass(frozen=True)
class _GlueTask:
    """A task, the folder it has in the published archive, its fields there and on the hub."""

    task: Task
    folder: str
    files: _Layout
    hub: _Layout
    validation_sets: tuple[str, ...] = ("",)

    def load(self, data: HubName | Path) -> TaskData:
        """Read all rows, see `load_glue`."""
        layout = self.files if isinstance(data, Path) else self.hub
        tables = self._read_files(data) if isinstance(data, Path) else self._read_hub(data)
        splits: list[Dataset] = []
        for table in tables:
            pair = layout.texts[1] if len(layout.texts) > 1 else None
            splits.append(labelled_rows(table, layout.texts[0], pair, layout.label, self._label_ids()))
        train, validation, *further = splits
        return TaskData(
            self.task, train, validation, dict(zip(self.validation_sets[1:], further, strict=True))
        )

    def _label_ids(self) -> dict[str, int] | None:
        names = self.task.label_names
        if not names:
            return None
        # Some files write ids, others names.
        return {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}

    def _read_files(self, folder: Path) -> list[Table]:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; task {self.task.name} needs one with train.tsv")
        if not (folder / "train.tsv").exists() and (folder / self.folder / "train.tsv").exists():
            folder = folder / self.folder
        sets = ["dev"] if len(self.validation_sets) == 1 else ["dev_matched", "dev_mismatched"]
        return [
            read_table(folder / f"{name}.tsv", self.files.header, join_broken=self.files.join_broken)
            for name in ("train", *sets)
        ]

    def _read_hub(self, hub: HubName) -> list[Table]:
        hub = hub.or_default(_HUB, self.task.name)
        sets = ["validation"]
        if len(self.validation_sets) > 1:
            sets = ["validation_matched", "validation_mismatched"]
        found = hub.load("train", *sets)
        return [as_table(found[name], f"{hub} ({name})") for name in ("train", *sets)]


def _classification(
    name: str, label_names: tuple[str, ...], metrics: tuple[str, ...] = ("accuracy",), main: str = "accuracy"
) -> Task:
    return Task(name, "classification", label_names, metrics, main)


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")

_TASKS = (
    _GlueTask(
        _classification("cola", ("unacceptable", "acceptable"), ("matthews",), "matthews"),
        "CoLA",
        files=_Layout(("sentence",), header=("source", "label", "mark", "sentence")),
        hub=_Layout(("sentence",)),
    ),
    _GlueTask(
        _classification("sst2", ("negative", "positive")),
        "SST-2",
        files=_Layout(("sentence",)),
        hub=_Layout(("sentence",)),
    ),
    _GlueTask(
        _classification("mrpc", ("not_equivalent", "equivalent"), ("accuracy", "f1"), "f1"),
        "MRPC",
        files=_Layout(("#1 String", "#2 String"), "Quality"),
        hub=_Layout(_PAIR),
    ),
    _GlueTask(
        Task("stsb", "regression", (), ("pearson", "spearman"), "pearson"),
        "STS-B",
        files=_Layout(_PAIR, "score"),
        hub=_Layout(_PAIR),
    ),
    _GlueTask(
        _classification("qqp", ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        "QQP",
        # Three questions of the training file have a line break.
        files=_Layout(("question1", "question2"), "is_duplicate", join_broken=True),
        hub=_Layout(("question1", "question2")),
    ),
    _GlueTask(
        _classification("mnli", ("entailment", "neutral", "contradiction")),
        "MNLI",
        files=_Layout(_PAIR, "gold_label"),
        hub=_Layout(("premise", "hypothesis")),
        validation_sets=("", "mismatched"),
    ),
    _GlueTask(
        _classification("qnli", _ENTAILED),
        "QNLI",
        files=_Layout(("question", "sentence")),
        hub=_Layout(("question", "sentence")),
    ),
    _GlueTask(_classification("rte", _ENTAILED), "RTE", files=_Layout(_PAIR), hub=_Layout(_PAIR)),
    _GlueTask(
        _classification("wnli", ("not_entailment", "entailment")),
        "WNLI",
        files=_Layout(_PAIR),
        hub=_Layout(_PAIR),
    ),
)
_BY_NAME = {glue.task.name: glue for glue in _TASKS}

GLUE_NAMES = tuple(_BY_NAME)


def load_glue(name: str, data: HubName | Path) -> TaskData:
    """Load one of `GLUE_NAMES`.

    Args:
        name: of the task.
        data: the folder of the original files, or the one above that holds all tasks' folders; or a data set
            of the hub with the splits and columns of "nyu-mll/glue".

    Raises:
        UserError: a missing folder, file, split or column, a row that does not fit (named by its place), an
            unknown label, no rows.
    """
    return _BY_NAME[name].load(data)
