"""From a fine-tuned encoder to a distilled MoE and what it is worth, stage by stage.

Every stage's output is reused while its inputs are unchanged; distillation, the long one, also goes on from
its last checkpoint. In the output folder:

    student/                the student, to be loaded from there
    results.json            every figure (format 1)
    importance.safetensors  the scores the split was made by; for hash-affinity, those of token ids too
    work/NAME/adapted/      each model as it is cut
    work/NAME/fitted/       with its experts fitted
    work/NAME/distilled/    and trained
    work/NAME/seed-S/       the same of further seeds
    work/stages/*.json      what each stage was made from, how long it took, its small results

In results.json the load of experts is told twice, as shares of real tokens that add up to 1 in a layer:

    expert_load_LE          the student's on the validation rows: a list per layer, in it each expert's share
    training_load_NLE       while it was trained: by model, as in "losses", such a table for each of N epochs

How experts were fitted is told by model in "fitting": `Fitted`'s fields, and "divergence" from the teacher on
rows held out of the training rows, of the model as it was "cut", "fitted" and, if it was, "distilled": after
the epoch after which it was least. "kept" is the one of the last two that is nearer, and is what all else is
told of; "epochs" are the divergences after each epoch.

What speed was measured under is in "measuring": "dtype", and "busy_cpus", the processors that other work kept
busy meanwhile. Without measurement it is null, as are the models' "latency_ms" and "throughput_per_s".

What makes all this say less than it seems to is in "warnings", a sentence each: of the rows (empty texts, too
few to validate on, others than the teacher's), the models (no better than chance) and the measurement. The
report shows them first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.tasks import TaskData
from moebert_kernels.compress.runs.run import Run
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.runs.stages import Progress
from moebert_kernels.compress.runs.subjects import subject_of
from moebert_kernels.compress.runs.variants import trials
from moebert_kernels.compress.storage.artifacts import claim, discard_unfinished, exclusive
from moebert_kernels.compress.storage.loading import check_no_model
from moebert_kernels.errors import naming


def compress(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: str | Path,
    output_dir: str | Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compress a fine-tuned encoder into a MoE, and measure what that costs and brings.

    With labelled rows the student can be trained, and is judged, by them; with texts alone by its teacher's
    predictions; with sentences for a model that embeds them by its embeddings: see `subjects`.

    On the first CUDA device if there is one, otherwise on the CPU. The same seed gives the same student on
    the same machine. Several processes (torchrun) share importance and training; all return the results.
    Interrupted at any point and called again, it goes on where it was.

    Args:
        settings: what to make.
        data: raw rows, of `load_task`, `load_texts` or `load_sentences`.
        teacher_dir: of the fine-tuned model, with its tokenizer.
        output_dir: made if need be; one run at a time.
        progress: hears about every stage of `stage_names`, in that order; in the main process alone.
        say: hears sentences about fit and distillation; in the main process alone.

    Returns:
        The content of results.json.

    Raises:
        UserError: teacher, data, settings or output folder do not fit, said before any long work; or
            distillation diverged.
        OutputError: the output folder cannot be written, for lack of room for instance.
    """
    with naming("teacher_dir"):
        subject = subject_of(Path(teacher_dir), data)
        subject.check_can_be_cut()
    settings = subject.resolve(settings)
    if settings.distill:
        distributed.rows_each(settings.batch_size)  # refuses what does not divide
    output_dir = Path(output_dir)
    run = Run(settings, subject, output_dir, progress, say)
    with naming("output_dir"):
        check_no_model(output_dir)
        # Before anything is put into a folder that is refused.
        distributed.on_main(lambda: claim(output_dir))
    with exclusive(output_dir):
        distributed.on_main(lambda: discard_unfinished(output_dir))
        return run.results()


def stage_names(settings: CompressSettings) -> list[str]:
    """The stages of `compress` in their order, as `Progress` and "timings_s" of the results name them."""
    made = [
        stage
        for of_seeds in trials(settings).values()
        for trial in of_seeds
        for stage in trial.stages(settings)
    ]
    return [
        "importance",
        "evaluate teacher",
        *made,
        "save student",
        "expert load",
        *(["measure"] if settings.measure else []),
    ]
