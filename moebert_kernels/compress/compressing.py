"""`compress`, whatever is known of the teacher's task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moebert_kernels.compress import embedding_pipeline, pipeline, sentences, text_pipeline
from moebert_kernels.compress.settings import CompressSettings
from moebert_kernels.compress.stages import Progress
from moebert_kernels.compress.tasks import TaskData, texts

_BY_KIND: dict[str, Callable[..., dict[str, Any]]] = {
    texts.KIND: text_pipeline.compress_texts,
    sentences.KIND: embedding_pipeline.compress_embeddings,
}


def compress(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: str | Path,
    output_dir: str | Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Make a MoE of a fine-tuned encoder: score, cut, fit and distil it, and say what that costs and brings.

    With labelled rows the student is trained and judged by them, see `pipeline.compress`; with texts alone by
    its teacher's predictions, see `text_pipeline`; with sentences for a model that embeds them by its
    embeddings, see `embedding_pipeline`. The student is in `output_dir`/student.

    Args:
        settings: what to make.
        data: of `load_task`, `load_texts` or `load_sentences`.
        teacher_dir: of the fine-tuned model, with its tokenizer.
        output_dir: made if need be; one run at a time. Called again, an interrupted run goes on.
        progress: hears (stage, done, total); in the main process alone.
        say: hears sentences about fit and distillation; in the main process alone.

    Returns:
        The content of results.json.

    Raises:
        UserError: teacher, data, settings or output folder do not fit, said before any long work; or
            distillation diverged.
        OutputError: the output folder cannot be written, for lack of room for instance.
    """
    of_kind = _BY_KIND.get(data.task.kind, pipeline.compress)
    return of_kind(settings, data, teacher_dir, output_dir, progress=progress, say=say)
