"""What the figures of results.json mean, in words."""

from __future__ import annotations

import math
from typing import Any

from moebert_kernels.compress.report.units import short_count
from moebert_kernels.environment import BUSY

_NOTABLE_GAIN = 1.02  # measurements of one model differ by as much
_JUDGED_BY = {
    "cosine": "Models are judged by the cosine of their embedding and the teacher's, the mean over held-out "
    "sentences.",
    "agreement": "Models are judged by how often they say of held-out texts what the teacher says: no labels "
    "were given.",
    "pearson": "Models are judged by how their numbers for held-out texts correlate with the teacher's: no "
    "labels were given.",
    "spearman_pairs": "Models are judged by how their similarities rank the scored pairs (Spearman).",
}


def summarize(results: dict[str, Any]) -> list[str]:
    """What the figures mean, a paragraph each."""
    models = {model["name"]: model for model in results["models"]}
    teacher, student = models.get("teacher"), models.get("student")
    if teacher is None or student is None:
        return []
    task = results["task"]
    metric = task["main_metric"]
    label = metric.replace("_", " ")

    def quality(name: str) -> float:
        return models[name]["quality"][metric]

    paragraphs = []
    if task["kind"] in ("embedding", "text"):
        text = f"{_JUDGED_BY[metric]} The teacher reaches {quality('teacher'):.3f}. "
    else:
        text = f"The fine-tuned teacher reaches {label} {quality('teacher'):.3f} on the validation rows. "
    fitting = results.get("fitting", {}).get("student")
    text += "Its feed-forward networks, cut into experts by the importance of their neurons"
    text += ", each fitted to what they do with its tokens, score " if fitting else ", score "
    if "student before distillation" in models:
        text += f"{quality('student before distillation'):.3f} at once and "
    text += f"{quality('student'):.3f} "
    text += "after distillation from the teacher" if results["losses"] else "without any training"
    text += f": {_difference(quality('student') - quality('teacher'))} against it."
    if fitting and fitting.get("kept") == "fitted":
        text += " It is kept as it was fitted: distilled, it was farther from the teacher on held-out rows."
    if "random split" in models:
        text += " Cut at random instead, the same experts "
        if "random split before distillation" in models:
            text += f"start from {quality('random split before distillation'):.3f} and end at "
        else:
            text += "score "
        text += f"{quality('random split'):.3f}."
    paragraphs.append(text)
    comparison = _comparison(results)
    if comparison:
        paragraphs.append(comparison)

    error = _standard_error(metric, quality("student"), task["validation_rows"])
    if error is not None:
        paragraphs.append(
            f"With {task['validation_rows']:,} validation rows one standard error of {label} is about "
            f"{error:.3f}: read nothing into differences of that size."
        )

    flops = teacher["ffn_flops_per_token"] / student["ffn_flops_per_token"]
    text = f"A token uses few of the experts: {flops:.1f} times less work in the feed-forward networks."
    paragraphs.append(" ".join([text, *_speed_sentences(teacher, student)]))
    paragraphs.append(_storage_sentence(teacher, student))
    return paragraphs


def warnings_of(results: dict[str, Any]) -> list[str]:
    """What the figures show that makes them say less than they seem to."""
    found = (_chance_warning(results), _busy_warning(results))
    return [warning for warning in found if warning]


def _chance_warning(results: dict[str, Any]) -> str | None:
    """That the teacher has learned nothing, or the student nothing from it, if so."""
    metric, constant = results["task"]["main_metric"], results["task"].get("constant_score")
    quality = {model["name"]: model["quality"][metric] for model in results["models"]}
    if constant is None:
        return None
    remedies = {
        "teacher": "Its student learns from it: see that it was fine-tuned on this task, with a learning "
        "rate that is not too high.",
        "student": "The teacher is better: try a lower learning rate, more rows to train on, or wider "
        "experts.",
    }
    for name, remedy in remedies.items():
        if quality[name] <= constant:
            return (
                f"The {name} is no better than one answer to all rows would be: {metric.replace('_', ' ')} "
                f"{quality[name]:.3f}, against {constant:.3f}. {remedy}"
            )
    return None


def _busy_warning(results: dict[str, Any]) -> str | None:
    """That speed was measured on a machine with other work to do, if it was."""
    busy = (results.get("measuring") or {}).get("busy_cpus") or 0.0
    if busy <= BUSY:
        return None
    return (
        f"While speed was measured, other work kept {busy:.1f} processors busy: the times are "
        "longer than on an idle one, and their ratios uncertain."
    )


def _speed_sentences(teacher: dict[str, Any], student: dict[str, Any]) -> list[str]:
    """What was measured, and what to make of it; nothing if nothing was."""
    if not (teacher["latency_ms"] and student["latency_ms"]):
        return []
    before, after = teacher["latency_ms"], student["latency_ms"]
    single = f"a batch of {before['batch_size']}"
    gains = {single: before["median"] / after["median"]}
    measured = (
        f"{capital(single)} ({before['sequence_length']} tokens) takes {after['median']:.2f} ms where the "
        f"teacher takes {before['median']:.2f} ms"
    )
    if teacher["throughput_per_s"] and student["throughput_per_s"]:
        batches, dense = student["throughput_per_s"], teacher["throughput_per_s"]
        many = f"batches of {batches['batch_size']}"
        gains[many] = batches["median"] / dense["median"]
        measured += f", and {many} run at {gains[many]:.2f} times its throughput"
    return [f"{measured}.", _verdict(gains)]


def _verdict(gains: dict[str, float]) -> str:
    """The student's speed in words, from how many times the teacher's it is for each way of measuring."""
    faster = [how for how, gain in gains.items() if gain > _NOTABLE_GAIN]
    slower = [how for how, gain in gains.items() if gain < 1 / _NOTABLE_GAIN]
    if len(faster) == len(gains):
        return "Attention and embeddings are as before, so the whole model gains less than the part."
    found = "slower" if slower else "no faster"
    if faster:
        others = " and ".join(how for how in gains if how not in faster)
        return (
            f"The student is faster in {' and '.join(faster)} alone; in {others} it is {found} here: there "
            "the experts cost the time that their smaller work saves."
        )
    return (
        f"The student is {found} here: the model is too small for the work it saves to outweigh what sorting "
        "tokens by expert costs."
    )


def _comparison(results: dict[str, Any]) -> str:
    """What the models of the same cost reach, and over how many seeds all of this was taken."""
    models = {model["name"]: model for model in results["models"]}
    metric = results["task"]["main_metric"]
    found = []
    if "narrow FFN" in models:
        quality = quality_of(models["narrow FFN"], metric)
        found.append(f"one dense network of the most important neurons in every layer reaches {quality}")
    if "fewer layers" in models:
        model = models["fewer layers"]
        *kept, last = map(str, model["kept_layers"])
        layers = f"layers {', '.join(kept)} and {last}" if kept else f"layer {last}"
        share = model["encoder_flops_per_token"] / models["student"]["encoder_flops_per_token"]
        quality = quality_of(model, metric)
        found.append(f"the teacher's {layers} alone, with {share:.2f} times the work, {quality}")
    text = ""
    if found:
        text = f"Made in the same way and at about the cost of the MoE, {' and '.join(found)}. "
        text += _ahead(models, metric)
    seeds = len(models["student"].get("seeds", ()))
    if seeds:
        text += (
            f"Quality is the mean over {seeds} seeds, \N{PLUS-MINUS SIGN} their sample standard deviation; "
        )
        text += "what is not drawn or trained has one value."
    return text.strip()


def _ahead(models: dict[str, dict[str, Any]], metric: str) -> str:
    """That something simpler of the same cost is better than the student, if it is."""
    compared = ("student", "narrow FFN", "fewer layers")
    quality = {
        name: models[name]["quality"][metric]
        for name in compared
        if name in models and metric in models[name]["quality"]
    }
    best = max(quality, key=quality.__getitem__, default="student")
    ahead = quality[best] - quality["student"] if "student" in quality else 0.0
    if ahead < 5e-4:
        return ""
    return f"The {best} is ahead of the student by {ahead:.3f}: here experts gain nothing on it. "


def _storage_sentence(teacher: dict[str, Any], student: dict[str, Any]) -> str:
    stored, before = student["parameters_stored"], teacher["parameters_stored"]
    text = "The checkpoint does not shrink: " if stored > 0.95 * before else ""
    text += f"every expert is stored, in all {count_text(stored)} parameters against the teacher's "
    text += f"{count_text(before)}. "
    used = count_text(student["parameters_used_per_token"])
    return f"{capital(text)}What shrinks is what one token uses of them: {used}."


def capital(text: str) -> str:
    """The text as a sentence begins."""
    return text[:1].upper() + text[1:]


def _difference(value: float) -> str:
    return "no difference" if abs(value) < 5e-4 else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _standard_error(metric: str, value: float, rows: int) -> float | None:
    if metric != "accuracy" or rows < 1:
        return None
    return math.sqrt(value * (1 - value) / rows)


def count_text(count: float) -> str:
    """A count with three digits and its unit."""
    return short_count(count).replace(" ", "\N{NO-BREAK SPACE}")


def quality_of(model: dict[str, Any], metric: str) -> str:
    """A model's value of a metric, with its spread if several seeds were tried; a dash if it has none."""
    if metric not in model["quality"]:
        return "–"
    spread = f" \N{PLUS-MINUS SIGN} {model['spread'][metric]:.3f}" if "spread" in model else ""
    return f"{model['quality'][metric]:.3f}{spread}"


def has_speed(models: list[dict[str, Any]]) -> bool:
    """Whether the speed of any of them was measured."""
    return any(model["latency_ms"] or model["throughput_per_s"] for model in models)
