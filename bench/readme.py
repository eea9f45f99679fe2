"""README tables from result files, between markers `<!-- bench:NAME:begin -->` and `<!-- bench:NAME:end -->`.

NAME is an operator and a kind of device, such as `ffn-cpu` or `model-gpu`, or `targets-gpu`, or `demo` for
the results of `make demo`, kept as demo.json, or `fit`, `packing`, `choices` or `training` for those of
`bench.fit` and so on, or `quality-STUDY` for a study of `bench.quality`, `quality-likeness-STUDY` for how
alike its students and their teachers are, or `quality-settings` for what its studies change, or
`machine-TABLE` for a table of `bench.predictions`, or `specialised` for that of `bench.specialised`, or
`serve`, `serve-more`, `serve-speedup` and `serve-quality` for `python -m bench serve`. What was never
measured says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from moebert_kernels.environment import BUSY

from . import specialised
from .cases import FFNCase
from .ratios import RATIO_LEGEND, networks, ratio_tables
from .results import Results, Row, read_folder, subject
from .suite import OPS
from .tables import LEGEND, duration, markdown, table, telling
from .targets import TARGETS, Target

NOT_MEASURED = "not measured yet"
_BLOCK = re.compile(
    r"(<!-- bench:(?P<name>[a-z0-9-]+):begin -->\n).*?(<!-- bench:(?P=name):end -->)", re.DOTALL
)
_MARKER = re.compile(r"<!-- bench:([a-z0-9-]+):(?:begin|end) -->")
_SUBJECTS = (*OPS, "ffn-norm")
_BY_RATIO = ("ffn-norm", "model")  # more cases than entries: a line for each
_DEVICE_TYPES = {"cpu": "cpu", "gpu": "cuda"}


def update(text: str, folder: str | Path) -> str:
    """Fill every block of a README anew.

    Args:
        text: the README's.
        folder: of result files.

    Raises:
        ValueError: a marker has no partner, or its name is not known.
    """
    results = list(read_folder(folder))
    names = _MARKER.findall(text)
    blocks = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(blocks * 2):
        odd = sorted({name for name in names if names.count(name) != 2 * blocks.count(name)})
        raise ValueError(f"markers without a partner: {', '.join(odd)}")

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "demo":
            content = demo(Path(folder))
        elif name == "fit":
            content = fit(Path(folder))
        elif name in ("choices", "training"):
            content = made(name, Path(folder))
        elif name == "packing":
            content = packing(Path(folder))
        elif name == "specialised":
            content = specialised.table(Path(folder))
        elif name.startswith("machine-"):
            content = machine(name.removeprefix("machine-"), Path(folder))
        elif name in ("serve", "serve-more", "serve-speedup", "serve-quality"):
            content = serve(name, Path(folder), results)
        elif name.startswith("quality-"):
            content = quality(Path(folder) / "quality" / f"{name.removeprefix('quality-')}.jsonl")
        else:
            content = block(name, results)
        return f"{match[1]}{content}\n{match[3]}"

    return _BLOCK.sub(fill, text)


def demo(folder: Path) -> str:
    """The table of `make demo` from its results.json, kept as demo.json among the results."""
    path = folder / "demo.json"
    if not path.is_file():
        return f"*`make demo`: {NOT_MEASURED}.*"
    results = json.loads(path.read_text(encoding="utf-8"))
    metric, environment = results["task"]["main_metric"], results["environment"]
    latency, throughput = (results["models"][0][name] for name in ("latency_ms", "throughput_per_s"))
    lines = [
        f"| | {metric} | parameters stored | used per token | FFN FLOPs per token | latency, batch "
        f"{latency['batch_size']} | sequences/s, batch {throughput['batch_size']} |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model in results["models"]:
        counts = (
            model[key] / 1e6
            for key in ("parameters_stored", "parameters_used_per_token", "ffn_flops_per_token")
        )
        lines.append(
            f"| {model['name']} | {model['quality'][metric]:.3f} | "
            + "".join(f"{count:.2f} M | " for count in counts)
            + f"{model['latency_ms']['median']:.2f} ms | {model['throughput_per_s']['median']:.0f} |"
        )
    seconds = sum(results["timings_s"].values())
    source = (
        f"*`make demo`, {results['task']['validation_rows']:,} validation rows, sequences of "
        f"{latency['sequence_length']} tokens, medians; {environment['cpu']}, "
        f"{environment['threads']} threads, float32; "
        f"torch {environment['versions']['torch']}, commit {environment['commit']}; "
        f"the stages took {seconds / 60:.1f} minutes.*"
    )
    return "\n".join([*lines, "", source])


def fit(folder: Path) -> str:
    """The table of `python -m bench.fit`, kept as fit.json."""
    from .fit import tables  # it knows of models, and what those import

    path = folder / "fit.json"
    if not path.is_file():
        return f"*`python -m bench.fit`: {NOT_MEASURED}.*"
    return tables(json.loads(path.read_text(encoding="utf-8")))


def made(name: str, folder: Path) -> str:
    """The tables of `python -m bench.choices` or `bench.training`, all testbeds."""
    from . import choices, training  # they know of models, and what those import

    rows = [
        row
        for path in sorted(folder.glob(f"{name}*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    if not rows:
        return f"*`python -m bench.{name}`: {NOT_MEASURED}.*"
    return choices.table(rows) if name == "choices" else training.table(rows)


def packing(folder: Path) -> str:
    """The table of `python -m bench.packing`, kept as packing.json."""
    from .packing import table as packing_table  # it knows of models, and what those import

    path = folder / "packing.json"
    if not path.is_file():
        return f"*`python -m bench.packing`: {NOT_MEASURED}.*"
    return packing_table(json.loads(path.read_text(encoding="utf-8")))


def machine(name: str, folder: Path) -> str:
    """A table of `python -m bench machine`."""
    from .predictions import block  # it knows of kernels, and what those import

    return block(name, folder)


def serve(name: str, folder: Path, results: Iterable[Results]) -> str:
    """Tables of `python -m bench serve`: its main ones, the others, or what the graphs answer."""
    from .serving import quality, tables  # they know of models, and what those import

    if name == "serve-quality":
        path = folder / quality.FILE
        if not path.is_file():
            return f"*`python -m bench serve --quality`: {NOT_MEASURED}.*"
        return quality.table(json.loads(path.read_text(encoding="utf-8")))
    found = [result for result in results if result.run.op == "serve"]
    if not found:
        return f"*`python -m bench serve`: {NOT_MEASURED}.*"
    if name == "serve-speedup":
        return f"{markdown(tables.speedup_table(found[0]))}\n\n{provenance(found[0], tables.SPEEDUP_LEGEND)}"
    drawn = tables.main_tables(found[0]) if name == "serve" else tables.more_tables(found[0])
    return "\n\n".join(
        [*map(markdown, drawn), provenance(found[0], f"{tables.LEGEND}. {tables.AIMS_LEGEND}")]
    )


def quality(file: Path) -> str:
    """A study's tables, as `python -m bench.quality collect` left it; `settings` compares all of them."""
    from .quality.records import read, read_rows  # they know of models, and what those import
    from .quality.tables import likeness_table, settings_table, table

    if file.stem == "settings":
        return settings_table({path.stem: read(path) for path in sorted(file.parent.glob("*.jsonl"))})
    study = file.with_name(file.name.removeprefix("likeness-"))
    if not study.is_file():
        return f"*`python -m bench.quality`, study {study.stem}: {NOT_MEASURED}.*"
    records, rows = read(study), read_rows(study)
    if study == file:
        return table(records, rows)
    if rows is None:
        return f"*`python -m bench.quality`, study {study.stem}, row by row: {NOT_MEASURED}.*"
    return likeness_table(records, rows)


def block(name: str, results: Iterable[Results]) -> str:
    """The markdown between one pair of markers."""
    wanted, _, kind = name.rpartition("-")
    if kind not in _DEVICE_TYPES or wanted not in (*_SUBJECTS, "targets"):
        known = ", ".join(f"{known}-cpu|gpu" for known in _SUBJECTS)
        raise ValueError(f"there is no table {name!r}; there are {known} and targets-gpu")
    measured = "ffn" if wanted == "targets" else wanted
    device_type = _DEVICE_TYPES[kind]
    mine = [
        result
        for result in results
        if (subject(result.run), result.run.device_type) == (measured, device_type)
    ]
    if wanted == "targets":
        return _targets(mine)
    if not mine:
        return f"*{measured} on a {kind.upper()}: {NOT_MEASURED}.*"
    return "\n\n".join(_measured(result) for result in mine)


def _measured(result: Results) -> str:
    groups = telling(result)
    rows = tuple(row for rows in groups.values() for row in rows)
    drawn, legends = [], []
    if subject(result.run) in _BY_RATIO:
        drawn += [markdown(content) for content in ratio_tables(Results(result.run, rows))]
        legends.append(RATIO_LEGEND)
    if not legends or len(list(networks(rows, rows[0].entry))) < len(rows):
        baselines = OPS[result.run.op].baselines
        drawn += [markdown(table(group.title(), rows, baselines)) for group, rows in groups.items()]
        legends.append(LEGEND)
    return "\n\n".join([*drawn, provenance(result, "; ".join(legends))])


def provenance(result: Results, legend: str) -> str:
    """A sentence that says what is shown, how, where and from which commit."""
    run, environment = result.run, result.run.environment
    versions = environment.get("versions", {})
    device = f"{environment.get('cpu')}, {run.threads} threads" if run.device_type == "cpu" else run.device
    samples = [row.seconds.samples for row in result.rows if row.seconds]
    counts = (
        f"{min(samples)} to {max(samples)}"
        if samples and min(samples) != max(samples)
        else f"{max(samples, default=0)}"
    )
    other = run.busy_cpus or 0
    busy = f", **{other:.1f} processors busy with other work at the start**" if other > BUSY else ""
    return (
        f"*{legend}. {device}; torch {versions.get('torch')}, commit {environment.get('commit')}, "
        f"{run.started[:10]}; {counts} interleaved samples{busy}.*"
    )


def _targets(results: list[Results]) -> str:
    """What was aimed at and reached, card by card: floors, and with them the aims, are each card's own."""
    if not results:
        lines = [_target_line(target, target.floor_us * 1e-6, NOT_MEASURED) for target in TARGETS]
        return "\n".join([*_targets_head("H200"), *lines])
    tables = []
    for result in results:
        lines = []
        for target in TARGETS:
            row = _reached(target, result)
            if row is None or row.seconds is None:
                lines.append(f"| {target.pass_} | {target.tokens} | – | – | {NOT_MEASURED} |")
            else:
                lines.append(_target_line(target, row.floor_s, duration(row.seconds.median)))
        tables.append("\n".join([*_targets_head(result.run.device), *lines]))
    return "\n\n".join(tables)


def _targets_head(card: str) -> list[str]:
    return [
        f"| {card}, bfloat16, CUDA graph, cold caches | T | floor | aim | reached |",
        "|---|--:|--:|--:|--:|",
    ]


def _target_line(target: Target, floor_s: float, reached: str) -> str:
    aim_s = target.aim_s(floor_s)
    aim = "–" if aim_s is None else duration(aim_s)
    return f"| {target.pass_} | {target.tokens} | {duration(floor_s)} | {aim} | {reached} |"


def _reached(target: Target, result: Results) -> Row | None:
    """The figure of ours that the target is about."""
    wanted, ours = asdict(FFNCase(target.tokens)), OPS["ffn"].entries(None)[0].name
    for row in result.rows:
        mode = (row.entry, row.pass_, row.launch, row.cache)
        if mode == (ours, target.pass_, "graph", "cold") and row.case == wanted and row.seconds:
            return row
    return None
