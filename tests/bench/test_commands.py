"""The benchmarks' command line, README tables, scripts and packaging."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from bench import suite
from bench.cases import FFNCase, Request
from bench.ceilings import Ceiling
from bench.commands import main
from bench.ffn import OURS
from bench.options import PARAMETERS, flag
from bench.ratios import ratio_tables
from bench.readme import block, update
from bench.results import Results, Row, Run, slug
from bench.run import Settings
from bench.suite import OPS
from bench.tables import duration, plain_text
from moebert_kernels.timing import Spread
from tests import ROOT


@pytest.fixture
def invoke(capsys, monkeypatch):
    """Run a command line; its exit status and all it says."""

    def invoke(*arguments):
        try:
            main(arguments)
        except SystemExit as ended:
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
            status = ended.code if isinstance(ended.code, int) else 1
        else:
            status = 0
        return status, "".join(capsys.readouterr())

    monkeypatch.setenv("COLUMNS", "300")  # nothing is wrapped in the middle of a word
    return invoke


def test_a_benchmark_on_the_users_shapes(tmp_path, invoke):
    shapes = ["--experts", "5", "--tokens", "10,20"]
    status, said = invoke("dispatch", "--toy", "--device", "cpu", *shapes, "--out", str(tmp_path))
    assert status == 0, said
    assert re.search(r"T=10.*T=20", said)
    results, plot = tmp_path / "dispatch-cpu.jsonl", tmp_path / "again.png"
    status, said = invoke("plot", str(results), "--out", str(plot))
    assert status == 0, said
    assert plot.stat().st_size > 1000
    assert '"E": 5' in results.read_text()


NO_NUMBERS = ("12,many", "0", "-4", "", "8,,9")
NUMBERS = "argument --tokens: expected whole numbers from 1 with commas between them"
NUMBER = "argument --expert-size: expected a whole number from 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((["ffn", "--tokens", wrong], f"{NUMBERS}, got '{wrong}'") for wrong in NO_NUMBERS),
        (["ffn", "--toy", "--experts", "3", "--top-k", "4"], "at most the number of experts, 3, got 4"),
        (["ffn", "--device", "gpu"], "device must be cpu or cuda, got 'gpu'"),
        (["ffn", "--dtype", "a,"], "argument --dtype: expected words with commas between them, got 'a,'"),
        (["ffn", "--only", "a,"], "argument --only: expected words with commas between them, got 'a,'"),
        (["ffn", "--limit", "-1"], "argument --limit: expected seconds, 0 or more, got '-1'"),
        (["ffn", "--peer-path", "nowhere"], "argument --peer-path: there is no folder 'nowhere'"),
        (["ffn", "--toy", "--device", "cpu", "--out", "pyproject.toml/out"], "Not a directory"),
        (["ffn", "--sequence", "8"], "ffn has no --sequence; its shapes are chosen by --tokens, --hidden"),
        (["dispatch", "--top-k", "2"], "dispatch has no --top-k; its shapes are chosen by --tokens"),
        (["model", "--tokens", "5", "--sequence", "6"], "a multiple of the sequence length, 6, got 5"),
        (["importance", "--tokens", "64,65"], "a multiple of the sequence length, 32, got 65"),
        (["plot", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["plot", "pyproject.toml"], "pyproject.toml is not a result file"),
        (["readme", "nowhere.md"], "there is no file 'nowhere.md'"),
        (["ffn", "--dtype", "int8"], "--dtype must be among float32, bfloat16, float16, got int8"),
        (["ffn", "--shape", "tiny"], "--shape must be among bert-base, minilm, got tiny"),
        (["model", "--toy", "--device", "cpu", "--text", "nowhere.txt"], "cannot read the text nowhere.txt"),
        *((["ffn", "--expert-size", wrong], f"{NUMBER}, got '{wrong}'") for wrong in ("0", "x")),
        (["ffn", "--skew", "flat"], "--skew must be among balanced, zipf, skewed, got flat"),
        (["ffn", "--passes", "up"], "--passes must be among"),
        (["dispatch", "--passes", "forward"], "--passes must be among dispatch, got forward"),
        (["ffn", "--toy", "--device", "cpu", "--only", "nobody"], "there is no entry nobody"),
    ],
)
def test_wrong_options_are_explained(arguments, message, invoke):
    status, said = invoke(*arguments)
    assert status == 2
    assert message in said
    assert len(said.splitlines()) <= 2  # the usage in a line, and the reason


@pytest.mark.parametrize("name", OPS)
def test_help_lists_what_a_benchmark_takes_alone(name, invoke):
    shown = set(re.findall(r"--[a-z-]+", invoke(name, "--help")[1]))
    shapes = {flag(field): field in OPS[name].takes for field in PARAMETERS}
    assert {option: option in shown for option in shapes} == shapes
    assert {"--toy", "--rounds", "--out"} < shown
    assert set(shapes) < set(re.findall(r"--[a-z-]+", invoke("all", "--help")[1]))


def test_without_a_command_there_is_help(invoke):
    status, said = invoke()
    assert status == 2
    assert all(re.search(rf"^ +{name}\b", said, re.MULTILINE) for name in (*OPS, "all", "readme", "plot"))


ENVIRONMENT = {"cpu": "A Processor", "versions": {"torch": "2.11.0"}, "commit": "0123456789ab"}


def results(rows=(), device_type="cpu", device="cpu"):
    how = {"threads": 2, "cpus": (0, 1), "settings": {}, "environment": ENVIRONMENT, "busy_cpus": 0.0}
    how |= {"ceilings": {"bfloat16": Ceiling(1e12, 1e11)}, "started": "2026-01-02T03:04:05+00:00"}
    run = Run("ffn", device_type, device, **how)
    return Results(run, tuple(rows))


def row(entry, seconds, *, tokens=512, **options):
    spread = None if seconds is None else Spread(seconds, seconds * 0.9, seconds * 1.1, 30)
    shared = {"work": "experts", "pass_": "forward", "launch": "eager", "cache": "warm", "dispatch": "apart"}
    case = asdict(FFNCase(tokens))
    return Row(case=case, entry=entry, seconds=spread, floor_s=1e-5, **(shared | options))


def test_what_was_never_measured_says_so():
    assert block("ffn-gpu", []) == "*ffn on a GPU: not measured yet.*"
    targets = block("targets-gpu", []).splitlines()
    assert len(targets) == 2 + 10
    assert all(line.endswith("| not measured yet |") for line in targets[2:])


def test_a_measured_table_names_its_origin():
    rows = [
        row(OURS, 2e-5),
        row("dense FFN replaced", 7e-5, work="dense"),
        row("F.grouped_mm", 3e-5, errors={"db1": 0.03}),
        row("authors' loop", 9e-5, dispatch="inside"),
        row("scattermoe", None, did_not_run="needs a CUDA device"),
        row(OURS, 1.0, pass_="forward", cache="cold", launch="graph"),
    ]
    text = block("ffn-cpu", [results(rows=rows[:-1])])
    assert "| forward, bfloat16, balanced, eager, warm | T=512 |" in text
    assert "| **moebert_kernels** | **20 µs ±10% (50%)** |" in text
    assert "| F.grouped_mm ≈ | 30 µs ±10% (33%) |" in text
    assert "- ≈ F.grouped_mm: db1 off by up to 3.0% (rms)" in text
    assert "| authors' loop † |" in text
    assert "| dense FFN replaced / moebert_kernels | 3.50 |" in text
    assert "- scattermoe did not run: needs a CUDA device" in text
    assert "A Processor, 2 threads; torch 2.11.0, commit 0123456789ab, 2026-01-02; 30 interleaved" in text
    # With graphs and cold caches in the file, a reader is shown those.
    assert "eager, warm" not in block("ffn-cpu", [results(rows=rows)])


def test_shapes_are_lines_where_they_matter():
    """The form with LayerNorm has a table of its own: passes across, ratios to the dense networks."""

    def normed(entry, work, *, forward, step, tokens):
        case = asdict(FFNCase(tokens, D=384, F=384, norm=True))
        return [
            replace(row(entry, seconds, work=work, pass_=pass_), case=case)
            for pass_, seconds in (("forward", forward), ("forward+backward", step))
        ]

    rows = [
        *normed(OURS, "experts", forward=2e-5, step=4e-5, tokens=16),
        *normed("dense FFN replaced", "dense", forward=7e-5, step=2e-4, tokens=16),
        *normed("bound: one expert", "bound", forward=1.6e-5, step=5e-5, tokens=16),
        *normed(OURS, "experts", forward=2e-2, step=None, tokens=4096),
        *normed("dense FFN replaced", "dense", forward=6e-2, step=1e-1, tokens=4096),
    ]
    measured = results(rows=rows)
    assert "not measured yet" in block("ffn-norm-cpu", [measured])
    request = {"request": {"norm": True}}
    measured = replace(measured, run=replace(measured.run, settings=request))
    assert "not measured yet" in block("ffn-cpu", [measured])
    assert slug(measured.run) == "ffn-norm-cpu"
    lines = block("ffn-norm-cpu", [measured]).splitlines()
    assert lines[0] == (
        "| MiniLM, bfloat16, balanced, with LayerNorm, eager, warm | forward | dense / ours | ours / bound "
        "| forward+backward | dense / ours | ours / bound |"
    )
    assert lines[2:4] == [
        "| T=16 | 20 µs ±10% | 3.50 | 1.25 | 40 µs ±10% | 5.00 | 0.80 |",
        "| T=4096 | 20 ms ±10% | 3.00 | – | – | – | – |",
    ]
    assert lines[-1].startswith("*Median of ours, ±")
    # Beside peers the whole table follows.
    peer = row("F.grouped_mm", 3e-5, tokens=16)
    with_peer = replace(measured, rows=(*rows, replace(peer, case=rows[0].case)))
    assert "| F.grouped_mm | 30 µs" in block("ffn-norm-cpu", [with_peer])
    assert "F.grouped_mm" not in "\n".join(lines)


def test_a_busy_machine_is_told():
    measured = results(rows=[row(OURS, 1.0)])
    busy = replace(measured, run=replace(measured.run, busy_cpus=1.2))
    assert "**1.2 processors busy with other work at the start**" in block("ffn-cpu", [busy])


def test_targets_are_met_by_the_right_figure_only():
    right = row(OURS, 18.7e-6, tokens=4096, launch="graph", cache="cold")
    others = [
        replace(right, launch="eager", seconds=Spread(1, 1, 1, 1)),
        replace(right, cache="warm", seconds=Spread(1, 1, 1, 1)),
        replace(right, case=asdict(FFNCase(4096, E=8)), seconds=Spread(1, 1, 1, 1)),
    ]
    h200 = results(device_type="cuda", device="NVIDIA H200", rows=[*others, right])
    text = block("targets-gpu", [h200])
    assert "| forward | 4096 | 10 µs | 15.6 µs | 18.7 µs |" in text  # its own floor, times 19 / 12.2
    assert text.count("not measured yet") == 9
    h100 = replace(h200, run=replace(h200.run, device="NVIDIA H100 80GB HBM3"))
    both = block("targets-gpu", [h100, h200]).splitlines()
    assert [line.split(",")[0] for line in both if "T | floor" in line] == [
        "| NVIDIA H100 80GB HBM3",
        "| NVIDIA H200",
    ]
    assert slug(h200.run) == "ffn-nvidia-h200"


def test_only_blocks_change(tmp_path):
    text = "a\n<!-- bench:ffn-gpu:begin -->\nold\n<!-- bench:ffn-gpu:end -->\nb\n"
    fresh = (
        "a\n<!-- bench:ffn-gpu:begin -->\n*ffn on a GPU: not measured yet.*\n<!-- bench:ffn-gpu:end -->\nb\n"
    )
    assert update(text, tmp_path) == fresh
    assert update(fresh, tmp_path) == fresh
    with pytest.raises(ValueError, match="markers without a partner: ffn-cpu"):
        update(text + "<!-- bench:ffn-cpu:begin -->\n", tmp_path)
    with pytest.raises(ValueError, match="there is no table 'ffn-tpu'"):
        update(text.replace("gpu", "tpu"), tmp_path)


def test_readme_check_fails_on_old_tables(tmp_path, invoke):
    file = tmp_path / "README.md"
    file.write_text("<!-- bench:ffn-gpu:begin -->\n<!-- bench:ffn-gpu:end -->\n")
    check = ["readme", str(file), "--results", str(tmp_path), "--check"]
    status, said = invoke(*check)
    assert status == 1
    changes = ["@@ -1,2 +1,3 @@", "+*ffn on a GPU: not measured yet.*"]
    assert [line for line in said.splitlines() if line in changes] == changes
    assert invoke(*check[:-1])[0] == 0
    assert invoke(*check)[0] == 0


def test_the_demonstration_has_a_table_of_its_own(tmp_path):
    text = "<!-- bench:demo:begin -->\n<!-- bench:demo:end -->\n"
    assert "not measured yet" in update(text, tmp_path)
    speed = {"median": 2.0, "low": 1.0, "high": 3.0, "batch_size": 1, "sequence_length": 64}
    results = {
        "task": {"main_metric": "accuracy", "validation_rows": 1076},
        "environment": ENVIRONMENT | {"threads": 2},
        "timings_s": {"importance": 60.0, "measure": 30.0},
        "models": [
            {
                "name": "student",
                "quality": {"accuracy": 0.8125},
                "parameters_stored": 22_700_000,
                "parameters_used_per_token": 17_400_000,
                "ffn_flops_per_token": 3_540_000,
                "latency_ms": speed,
                "throughput_per_s": speed,
            }
        ],
    }
    (tmp_path / "demo.json").write_text(json.dumps(results))
    filled = update(text, tmp_path)
    assert "| student | 0.812 | 22.70 M | 17.40 M | 3.54 M | 2.00 ms | 2 |" in filled
    assert "commit 0123456789ab; the stages took 1.5 minutes" in filled


def test_committed_tables_show_the_committed_results():
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text(encoding="utf-8")
        assert update(text, ROOT / "bench" / "results") == text, f"run python -m bench readme {file.name}"


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.01234, "12.3 ms"), (4.5e-6, "4.5 µs"), (1e-3, "1 ms")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    renamed = {folder: name for name, folder in setuptools["package-dir"].items()}
    found = set()
    for top in ("moebert_kernels", *renamed):
        for file in (ROOT / top).rglob("__init__.py"):
            folder = file.parent.relative_to(ROOT).as_posix()
            found.add((renamed.get(top, top) + folder[len(top) :]).replace("/", "."))
    assert sorted(setuptools["packages"]) == sorted(found)


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
@pytest.mark.parametrize("script", ["cpu.sh", "gpu.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / "bench" / script)], check=True)


def cpu_script(*options, python="false"):
    """Ended, with what is given for Python in its place."""
    command, env = ["bash", "bench/cpu.sh", *options], os.environ | {"PYTHON": python}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@needs_bash
@pytest.mark.parametrize("wrong", [["--fast"], ["--only", "ffn,models"]])
def test_the_cpu_script_refuses_what_it_does_not_know(wrong):
    done = cpu_script(*wrong)
    assert done.returncode == 2
    assert re.search(r"unknown (option: --fast|part: models)$", done.stderr.strip())
    assert "--dry-run  tiny sizes" in done.stderr


@needs_bash
def test_the_cpu_script_calls_each_part(tmp_path):
    """`echo` for Python shows the commands, which must be ones that this version understands."""
    text = tmp_path / "text.txt"
    text.write_text("a b c\n" * 32)
    done = cpu_script("--dry-run", "--text", str(text), "--out", str(tmp_path), python="echo")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("-m bench ")]
    assert [line.split()[2] for line in commands] == ["ffn", "ffn", "dispatch", "model", "importance"]
    assert "--norm --shape bert-base,minilm" in commands[0]
    assert f"--text {text}" in commands[3]
    assert re.findall(r"(\w+): done", done.stdout) == ["ffn", "dispatch", "model", "importance"]
    parts = cpu_script("--dry-run", "--only", "model,dispatch")
    assert parts.returncode == 1
    assert re.findall(r"(\w+): FAILED", parts.stdout) == ["model", "dispatch"]


def test_the_cpu_scripts_selections_exist():
    """Its --only lists name entries; a renamed one would fail after minutes of measuring."""
    script = (ROOT / "bench" / "cpu.sh").read_text(encoding="utf-8")
    selections = re.findall(r'--only "([^"]+)"', script)
    assert [len(names.split(",")) for names in selections] == [3, 3]
    for op, names in zip(("ffn", "model"), selections, strict=True):
        assert names.split(",") == [OURS, *OPS[op].baselines]


def test_a_log_shows_whole_figures(monkeypatch):
    """A wide table's figures were cut short where there is no terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    networks = ((OURS, "experts"), ("dense FFN replaced", "dense"), ("bound: one expert", "bound"))
    passes = ("forward", "forward+backward", "dispatch+forward")
    rows = [row(entry, 1.23e-4, work=work, pass_=pass_) for pass_ in passes for entry, work in networks]
    (table,) = ratio_tables(results(rows=rows))
    _, head, rule, line = plain_text(table).splitlines()
    assert line.count("123 µs ±10%") == 3
    assert len(head) == len(rule) == len(line) > 80


def shown(monkeypatch, capsys, rows, **settings):
    """What the ffn benchmark prints of these rows."""
    monkeypatch.setattr(suite, "start", lambda op, settings: (results().run, iter(rows)))
    suite.run_benchmarks(["ffn"], Settings(**settings))
    return capsys.readouterr().out


def test_few_tables_are_printed_unless_more_are_asked_for(monkeypatch, capsys):
    """`python -m bench ffn` printed some 25 tables."""
    modes = [(launch, cache) for launch in ("eager", "graph") for cache in ("warm", "cold")]
    rows = [row(OURS, 1e-5, launch=launch, cache=cache) for launch, cache in modes]
    text = shown(monkeypatch, capsys, rows)
    assert re.findall("(?:eager|graph), [a-z]+", text) == ["graph, cold"]
    assert "3 more such tables, not printed" in text
    text = shown(monkeypatch, capsys, rows, launches=("eager", "graph"))
    assert re.findall("(?:eager|graph), [a-z]+", text) == ["eager, cold", "graph, cold"]
    assert "2 more such tables" in text


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_by_default_few_cases_of_the_layer_are_timed(device_type):
    cases = OPS["ffn"].cases(Request(), device_type)
    assert {case.routing for case in cases} == {"balanced"}
    assert len({case.dtype for case in cases}) * len(OPS["ffn"].default_passes) <= 4


def test_the_cpu_script_times_every_routing():
    """What README shows must not depend on what is timed by default."""
    text = (ROOT / "bench" / "cpu.sh").read_text(encoding="utf-8")
    assert "--skew balanced,zipf,skewed" in text
    assert "--passes forward,forward+backward,dispatch+forward" in text
