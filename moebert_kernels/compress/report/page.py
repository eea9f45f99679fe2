"""report.html: what results.json holds, as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from moebert_kernels.compress.report import plots
from moebert_kernels.compress.report.summary import capital, count_text, has_speed, quality_of, summarize
from moebert_kernels.compress.storage.artifacts import replace_whole

FORMAT = 1

_NAMES = {
    "teacher": "the dense model",
    "student": "the MoE",
    "random split": "the same MoE from a split at random",
    "narrow FFN": "dense, with as many of the most important neurons as a token meets in the MoE",
    "fewer layers": "the dense model with so many of its layers as cost what the MoE does",
}


def write_report(results: dict[str, Any], path: str | Path) -> None:
    """Write the page, whole or not at all.

    Args:
        results: the content of results.json, format 1.
        path: of the file to write; its folder is made if need be.

    Raises:
        OutputError: the disk is full, or something else keeps it from being written.
        ValueError: `results` is of another format, or holds no models.
    """
    page = render_report(results)
    with replace_whole(Path(path)) as fresh:
        fresh.write_text(page, encoding="utf-8")


def render_report(results: dict[str, Any]) -> str:
    """The page as text; see `write_report`."""
    if results.get("format") != FORMAT:
        raise ValueError(f"results must be of format {FORMAT}, found {results.get('format')!r}")
    if not results["models"]:
        raise ValueError("results hold no models")
    task, environment = results["task"], results["environment"]
    title = f"MoEBERT on {task['name']}"
    device = ", ".join(environment.get("devices") or ()) or environment.get("cpu", "CPU")
    subtitle = (
        f"{task['train_rows']:,} training and {task['validation_rows']:,} validation rows; "
        f"{_measured(results)} {device}, {environment.get('threads', '?')} CPU threads."
    )
    template = Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        warnings="\n".join(
            f'<p class="warning">{escape(sentence)}</p>' for sentence in results.get("warnings", ())
        ),
        summary="\n".join(f"<p>{escape(sentence)}</p>" for sentence in summarize(results)),
        tiles=_tiles(results),
        table=_models_table(results),
        table_note=f'<p class="note">{escape(_table_note(results))}</p>',
        figures="\n".join(_figures(results)),
        facts="\n".join(_facts(results)),
    )


def _measured(results: dict[str, Any]) -> str:
    if not has_speed(results["models"]):
        return "speed not measured; made on"
    dtype = (results.get("measuring") or {}).get("dtype")
    return f"speed measured in {dtype} on" if dtype else "measured on"


def _tiles(results: dict[str, Any]) -> str:
    models = {model["name"]: model for model in results["models"]}
    teacher, student = models.get("teacher"), models.get("student")
    if teacher is None or student is None:
        return ""
    metric = results["task"]["main_metric"]
    tiles = [
        (
            metric.replace("_", " ").capitalize(),
            quality_of(student, metric),
            f"teacher {teacher['quality'][metric]:.3f}",
        ),
        (
            "Feed-forward work per token",
            f"{student['ffn_flops_per_token'] / teacher['ffn_flops_per_token']:.0%}",
            "of the teacher's",
        ),
        (
            "Parameters used per token",
            count_text(student["parameters_used_per_token"]),
            f"of {count_text(student['parameters_stored'])} stored",
        ),
    ]
    for key, name in (("latency_ms", "Speed"), ("throughput_per_s", "Throughput")):
        if teacher[key] and student[key]:
            ratio = student[key]["median"] / teacher[key]["median"]
            ratio = 1 / ratio if key == "latency_ms" else ratio
            detail = f"the teacher's, batch {student[key]['batch_size']}"
            tiles.append((name, f"{ratio:.2f}\N{MULTIPLICATION SIGN}", detail))
    cells = (
        f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="small">{escape(detail)}</dd></div>'
        for name, value, detail in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _models_table(results: dict[str, Any]) -> str:
    main = results["task"]["main_metric"]
    others = sorted({name for model in results["models"] for name in model["quality"]} - {main})
    encoder: list[tuple[str, Callable[[dict[str, Any]], str]]] = []
    if all("encoder_flops_per_token" in model for model in results["models"]):
        encoder = [("encoder FLOPs per token", lambda m: count_text(m["encoder_flops_per_token"]))]
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        *((name.replace("_", " "), lambda m, name=name: quality_of(m, name)) for name in (main, *others)),
        ("parameters stored", lambda m: count_text(m["parameters_stored"])),
        ("used per token", lambda m: count_text(m["parameters_used_per_token"])),
        ("FFN FLOPs per token", lambda m: count_text(m["ffn_flops_per_token"])),
        *encoder,
    ]
    if has_speed(results["models"]):
        columns += [
            ("latency, ms", lambda m: _timing(m["latency_ms"], 2)),
            ("sequences per second", lambda m: _timing(m["throughput_per_s"], 0)),
        ]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in columns)
    rows = []
    for model in results["models"]:
        name = model["name"]
        cells = "".join(f"<td>{cell(model)}</td>" for _, cell in columns)
        kind = "student" if name == "student" else ""
        rows.append(f'<tr class="{kind}"><th scope="row">{_dot(name)}{escape(name)}</th>{cells}</tr>')
    head = f'<thead><tr><th scope="col">model</th>{head}</tr></thead>'
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _dot(name: str) -> str:
    kind = plots.model_colour(name)
    fill = "transparent" if name.endswith("before distillation") else f"var(--{kind})"
    return (
        f'<span class="dot" aria-hidden="true" style="border-color:var(--{kind});background:{fill}"></span>'
    )


def _timing(timing: dict[str, Any] | None, digits: int) -> str:
    if not timing:
        return "–"
    low, high = (f"{timing[key]:,.{digits}f}" for key in ("low", "high"))
    return f'{timing["median"]:,.{digits}f}<span class="range">{low} to {high}</span>'


def _table_note(results: dict[str, Any]) -> str:
    present = [name for name in _NAMES if any(model["name"] == name for model in results["models"])]
    note = "; ".join(f"{name}: {_NAMES[name]}" for name in present)
    note = f"{capital(note)}." if note else ""
    for key, name in (("latency_ms", "Latency"), ("throughput_per_s", "Throughput")):
        timing = next((model[key] for model in results["models"] if model[key]), None)
        if timing:
            note += f" {name}: batch {timing['batch_size']} of {timing['sequence_length']} tokens, "
            note += "median, and below it the middle four fifths of the measurements."
    return note + " A FLOP is a multiplication or an addition, biases and attention scores not counted."


def _figures(results: dict[str, Any]) -> Iterable[str]:
    metric = results["task"]["main_metric"]
    models = [model for model in results["models"] if model["throughput_per_s"]]
    svg = plots.plot_quality_against_speed(results["models"], metric)
    if svg:
        points = "; ".join(
            f"{m['name']} {quality_of(m, metric)} at {m['throughput_per_s']['median']:.0f} sequences/s"
            for m in models
        )
        yield _figure(
            "Quality against speed",
            svg,
            f"Scatter plot. {points}.",
            "Hollow: before distillation. Lines: the middle four fifths of the measurements.",
        )
    importance = results.get("importance")
    if importance:
        curves = importance["share_curve_LQ"]
        quarter = [curve[(len(curve) - 1) // 4] for curve in curves]
        yield _figure(
            "Importance of neurons",
            plots.plot_importance(curves),
            "A curve per layer. The most important quarter of a layer's neurons holds between "
            f"{min(quarter):.0%} and {max(quarter):.0%} of its importance.",
            f"Taken on {importance['num_samples']:,} training rows with one backward pass per batch. The "
            "further a curve bends from the dotted line, the more a split that ignores importance loses.",
        )
    load = results.get("expert_load_LE")
    if load:
        shares = [value / (sum(load_E) or 1) for load_E in load for value in load_E]
        yield _figure(
            "Load of the experts",
            plots.plot_expert_load(load),
            f"A bar per layer, cut by expert. Shares run from {min(shares):.0%} to {max(shares):.0%}; "
            f"even ones would be {1 / len(load[0]):.0%}.",
            "Share of the validation rows' tokens that each expert gets; padding is not routed.",
        )
    training_load = results.get("training_load_NLE")
    if training_load:
        ends = "; ".join(
            f"{name}: at most {_fullest(load_NLE[0]):.0%} in the first epoch, "
            f"{_fullest(load_NLE[-1]):.0%} in the last"
            for name, load_NLE in training_load.items()
        )
        yield _figure(
            "Load of the experts in training",
            plots.plot_training_load(training_load),
            f"A curve per layer of what its fullest expert gets in each epoch of distillation. {ends}.",
            "Share of the tokens that went through training, padding not counted. A table of token ids sends "
            "as many in every epoch; a learned gate moves. The shares of all experts are in results.json.",
        )
    svg = plots.plot_losses(results.get("losses") or {})
    if svg:
        ends = "; ".join(
            f"{name}: total from {points[0]['total']:.3g} to {points[-1]['total']:.3g}"
            for name, points in results["losses"].items()
            if points and "total" in points[0]
        )
        yield _figure(
            "Distillation losses by term",
            svg,
            f"Curves of each term by training step. {ends}.",
            "layer: squared error against the teacher's hidden states, every layer. "
            + (
                "embedding: squared distance from the teacher's embeddings."
                if results["task"]["kind"] == "embedding"
                else "ce: from labels, if there are any. prediction: distance from the teacher's predictions."
            )
            + (" balance: of the gates; 1 is even." if _is_gated(results) else ""),
        )


def _is_gated(results: dict[str, Any]) -> bool:
    return any("balance" in points[0] for points in results["losses"].values() if points)


def _fullest(load_LE: list[list[float]]) -> float:
    return max(share for load_E in load_LE for share in load_E)


def _figure(heading: str, svg: str, alternative: str, caption: str) -> str:
    return (
        f'<h2>{escape(heading)}</h2>\n<figure><div role="img" aria-label="{escape(alternative)}">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _facts(results: dict[str, Any]) -> Iterable[str]:
    yield _facts_table("Settings", results.get("settings", {}))
    yield _facts_table("Environment", _flatten_environment(results["environment"]))
    timings = {stage: _duration(seconds) for stage, seconds in results.get("timings_s", {}).items()}
    if timings:
        timings["all together"] = _duration(sum(results["timings_s"].values()))
    yield _facts_table("Time of the stages", timings)


def _flatten_environment(environment: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in environment.items() if key not in ("versions", "backends")}
    flat |= {name: version or "not installed" for name, version in environment.get("versions", {}).items()}
    for backend in environment.get("backends", ()):
        flat[backend["name"]] = ("" if backend["usable"] else "no: ") + backend["detail"]
    return flat


def _facts_table(heading: str, facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key).replace("_", " "))}</th><td>{escape(_plain(value))}</td></tr>'
        for key, value in facts.items()
    )
    return f"<table><caption>{escape(heading)}</caption><tbody>{rows}</tbody></table>"


def _plain(value: Any) -> str:
    if value is None or value in ([], ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"
