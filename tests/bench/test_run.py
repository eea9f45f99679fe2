"""Every benchmark at toy size, from inputs to files, so that none rots."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from bench import ceilings
from bench.baselines.implementation import bind
from bench.cases import TOY, FFNCase, ModelCase
from bench.encoders import attend_without_mask, build
from bench.ffn import FFN, OURS, make_inputs, ours
from bench.ratios import ratio_tables
from bench.registry import Entry
from bench.results import Results, read, write
from bench.run import Settings, copies_past_cache, pin_threads, start
from bench.suite import OPS, run_benchmarks
from bench.tables import tables
from tests import ROOT

SETTINGS = Settings(request=TOY, rounds=2, seconds=0.0, probes=ceilings.TOY)
NEEDS_CUDA = {"triton_kernels", "scattermoe"}


@pytest.mark.parametrize("name", OPS)
def test_every_entry_passes_verification_and_is_timed(name, tmp_path):
    op = OPS[name]
    settings = replace(SETTINGS, passes=op.passes)
    (results,) = run_benchmarks([name], settings, tmp_path, say=list)
    assert {row.pass_ for row in results.rows} == set(op.passes)
    for row in results.rows:
        if row.entry in NEEDS_CUDA:
            assert row.did_not_run == "needs a CUDA device"
            assert row.seconds is None
        else:
            assert row.did_not_run is None, row
            assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high
            assert max(row.errors.values()) < 1e-4
            assert row.floor_s > 0
    for baseline in op.baselines:
        assert any(row.entry == baseline and row.seconds for row in results.rows)
    assert read(tmp_path / f"{name}-cpu.jsonl").rows == results.rows
    assert (tmp_path / f"{name}-cpu.svg").read_text().count("<svg") == 1


def test_every_entry_runs_with_residual_and_layernorm(tmp_path):
    settings = replace(SETTINGS, request=replace(TOY, norm=True), passes=("dispatch+forward+backward",))
    (results,) = run_benchmarks(["ffn"], settings, tmp_path, say=list)
    for row in results.rows:
        assert row.case["norm"]
        if row.entry in NEEDS_CUDA:
            continue
        assert row.did_not_run is None, row
        assert {"y", "dx", "dw1", "db2", "dln_w", "dln_b"} <= set(row.errors)
    assert (tmp_path / "ffn-norm-cpu.jsonl").is_file()


def test_padded_text_is_a_batch_of_the_model_benchmark(tmp_path):
    """And the folders above it stay out of the file."""
    text = tmp_path / "here" / "text.txt"
    text.parent.mkdir()
    text.write_text("\n".join("word " * (1 + line % 5) for line in range(32)))
    request = replace(TOY, text=str(text), L=1)
    only = (OURS, *OPS["model"].baselines, "authors' loop")
    settings = replace(SETTINGS, request=request, only=only, passes=("forward+backward",), rounds=1)
    (results,) = run_benchmarks(["model"], settings, tmp_path, say=list)
    padded = [row for row in results.rows if row.case["text"]]
    assert [row.entry for row in padded] == list(only)
    for row in padded:
        assert row.did_not_run is None, row
        assert (row.case["T"], row.case["text"]) == (32 * 5, "here/text.txt")
        assert row.case["real"] == sum(1 + line % 5 for line in range(32))
    assert padded[0].flops < next(row for row in padded if row.work == "bound").flops
    assert results.run.settings["request"]["text"] == "here/text.txt"
    (table,) = ratio_tables(read(tmp_path / "model-cpu.jsonl"))
    assert [line.name for line in table.lines] == ["4×6", "text, 32×5, 42% padding"]
    assert table.columns == ("forward+backward", "sequences/s", "dense / ours", "ours / bound")
    assert table.notes == ("text: here/text.txt, by a token per word, the batch of median length",)


@pytest.mark.parametrize("kind", ["experts", "dense", "half"])
def test_in_a_graph_no_mask_is_made_where_there_is_no_padding(kind, monkeypatch):
    """While a graph is captured, transformers makes one of ones, with which attention is slow on a GPU."""
    masks, compute = [], functional.scaled_dot_product_attention

    def attend(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return compute(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = build(ModelCase(32, 16, D=32, F=16, E=2, L=2, V=50, head_size=16), kind)
    ids_BS = torch.arange(32).view(2, 16)
    with torch.no_grad():
        with_mask_BSD = model(input_ids=ids_BS).last_hidden_state
        assert masks.pop() is not None
        masks.clear()
        attend_without_mask(model)
        assert torch.equal(model(input_ids=ids_BS).last_hidden_state, with_mask_BSD)
    assert set(masks) == {None}


def test_modes_are_rows_of_their_own_and_graphs_need_cuda():
    settings = replace(SETTINGS, caches=("warm", "cold"), launches=("eager", "graph"))
    _, rows = start(OPS["dispatch"], settings)
    for row in rows:
        if row.entry not in NEEDS_CUDA:
            assert (row.seconds is None) == (row.launch == "graph")
            assert row.launch == "eager" or row.did_not_run == "CUDA graphs need a CUDA device"


def reason(make, request=TOY) -> str | None:
    """Why an entry is not timed whose function of tokens and plan `make` gives; ours beside it is."""

    def make_entry(inputs):
        return replace(ours(inputs), compute=make(inputs))

    def entries(peer_path):
        return [FFN.entries(peer_path)[0], Entry("other", lambda *of: bind(make_entry, *of))]

    settings = replace(SETTINGS, passes=("forward",), request=request)
    _, rows = start(replace(FFN, entries=entries), settings)
    found = {row.entry: row.did_not_run for row in rows}
    assert found.pop(OURS) is None
    return found["other"]


def test_a_wrong_activation_is_not_timed():
    """A peer shipped tanh GELU behind a loose tolerance."""

    def tanh_gelu(inputs):
        w1, b1, w2, b2 = ours(inputs).parameters.values()

        def compute(x_TD, plan):
            y_TD = torch.empty_like(x_TD)
            for e, rows in enumerate(inputs.expert_ids_TK[:, 0] == e for e in range(inputs.case.E)):
                h = functional.gelu(functional.linear(x_TD[rows], w1[e], b1[e]), approximate="tanh")
                y_TD[rows] = functional.linear(h, w2[e], b2[e])
            return y_TD

        return compute

    assert reason(tanh_gelu).startswith("wrong: y is off by")


def test_a_forgotten_residual_is_not_timed():
    def forgetful(inputs):
        plain = ours(replace(inputs, ln_w_ED=None, ln_b_ED=None))
        return lambda x_TD, plan: functional.layer_norm(plain.compute(x_TD, plan), x_TD.shape[1:])

    assert reason(forgetful, replace(TOY, norm=True)).startswith("wrong: y is off by")


def test_an_entry_that_raises_has_a_reason_and_the_others_run():
    def broken(inputs):
        raise RuntimeError("no such kernel\nand a long trace")

    assert reason(broken) == "RuntimeError: no such kernel"


def test_what_fails_only_when_timed_has_a_reason():
    calls = itertools.count(1)

    def tired(inputs):
        def compute(x_TD, plan):
            if next(calls) > 4:
                raise MemoryError("out of memory")
            return ours(inputs).compute(x_TD, plan)

        return compute

    assert reason(tired) == "MemoryError: out of memory"


def test_batched_mm_is_refused_before_it_gathers_gigabytes():
    entry = next(e for e in FFN.entries(None) if e.name == "transformers batched_mm")
    inputs = make_inputs(FFNCase(4096, D=512, F=512, dtype="bfloat16"), torch.device("cpu"), 0)
    with pytest.raises(Exception, match=r"gathers 4\.0 GiB of weights per pass"):
        entry.bind(inputs, "forward")


def test_top_k_two_runs_wherever_it_can():
    settings = replace(SETTINGS, request=replace(TOY, K=2, T=(11,)), passes=("dispatch+forward+backward",))
    _, rows = start(FFN, settings)
    did_not_run = {row.entry: row.did_not_run for row in rows if row.did_not_run}
    assert set(did_not_run) == NEEDS_CUDA | {"authors' loop"}
    assert did_not_run["authors' loop"] == "gives every token one expert; top_k is 2"


def test_unknown_entries_passes_and_devices_are_named():
    for changes, message in (
        ({"only": ("mine",)}, "no entry mine; there are: moebert_kernels, moebert_kernels tied, dense"),
        ({"passes": ("sideways",)}, "there is no pass sideways; there are: forward, "),
        ({"device": "meta"}, "device must be cpu or cuda, got 'meta'"),
    ):
        with pytest.raises(ValueError, match=message):
            start(FFN, replace(SETTINGS, **changes))
    with pytest.raises(ValueError, match="there is no benchmark ffm; there are: dispatch, "):
        run_benchmarks(["ffm"], SETTINGS)


def test_nothing_is_started_after_the_limit():
    _, rows = start(FFN, replace(SETTINGS, limit=-1.0))
    assert list(rows) == []


def test_a_run_that_is_cut_off_keeps_what_it_has_and_the_run_before_it(tmp_path):
    run, rows = start(OPS["dispatch"], SETTINGS)
    measured = list(rows)
    path = write(tmp_path, run, measured)

    def interrupted():
        yield measured[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, run, interrupted())
    assert read(path).rows == tuple(measured[:1])
    assert read(path.with_name(f"{path.name}.before")).rows == tuple(measured)
    write(tmp_path, run, measured)
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_another_format_are_refused(tmp_path):
    path = tmp_path / "ffn-cpu.jsonl"
    path.write_text('{"format": 99}\n')
    with pytest.raises(ValueError, match="is not a result file of format 1"):
        read(path)


pinning = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors cannot be chosen here")


@pinning
def test_threads_are_pinned_to_as_many_processors(monkeypatch):
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    cpus = pin_threads(1)
    assert len(cpus) == 1
    assert set(cpus) == os.sched_getaffinity(0)
    assert torch.get_num_threads() == 1


@pinning
def test_threads_that_openmp_has_bound_are_all_used(monkeypatch):
    """Every figure of cpu.sh was of one thread: OpenMP leaves the main thread's mask a single processor."""
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    torch.set_num_threads(2)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pin_threads(None)
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are not listed here")
def test_the_processors_that_openmp_has_bound_threads_to_are_recorded():
    """Result files of cpu.sh said `cpus: []`."""
    processors = sorted(os.sched_getaffinity(0))[:2]
    variables = {"OMP_PROC_BIND": "true", "OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in processors)}
    done = subprocess.run(
        [sys.executable, "-c", "from bench.run import pin_threads; print(*pin_threads(None))"],
        env=os.environ | variables | {"OMP_NUM_THREADS": str(len(processors))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(map(int, done.stdout.split())) == processors


def test_cold_copies_exceed_the_cache_and_stay_bounded():
    device = torch.device("cpu")
    assert copies_past_cache(2**40, device) == 2
    assert copies_past_cache(1, device) == 32


def test_the_table_shows_what_did_not_run_and_why():
    shown = (OURS, *FFN.baselines, "authors' loop", "scattermoe")
    run, rows = start(FFN, replace(SETTINGS, passes=("forward",), only=shown))
    (table,) = tables(Results(run, tuple(rows)), FFN.baselines)
    names = [line.name for line in table.lines]
    assert table.title == "forward, float32, skewed, eager, warm"
    assert table.columns == ("T=24",)
    assert names[0] == OURS
    assert table.lines[0].strong
    assert "authors' loop †" in names
    assert names[-2:] == [f"{baseline} / {OURS}" for baseline in FFN.baselines]
    assert "scattermoe did not run: needs a CUDA device" in table.notes
    assert not any("scattermoe" in name for name in names)
