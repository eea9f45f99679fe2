import copy
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest

from moebert_kernels.compress.report.page import render_report, write_report
from moebert_kernels.compress.report.plots import plot_importance
from moebert_kernels.compress.report.summary import summarize, warnings_of

VOID = {"meta", "br", "img", "link", "input", "hr"}


def timing(median, batch_size):
    spread = {"median": median, "low": 0.9 * median, "high": 1.2 * median}
    return spread | {"batch_size": batch_size, "sequence_length": 64}


def model(name, accuracy, stored, used, flops, latency, throughput):
    return {
        "name": name,
        "quality": {"accuracy": accuracy, "macro_f1": accuracy - 0.01},
        "parameters_stored": stored,
        "parameters_used_per_token": used,
        "ffn_flops_per_token": flops,
        "latency_ms": timing(latency, 1),
        "throughput_per_s": timing(throughput, 32),
    }


@pytest.fixture
def results():
    return make_results()


@pytest.fixture(scope="module")
def page():
    return render_report(make_results())


def make_curve():
    terms = {"ce": 2, "layer": 1, "prediction": 0.5, "total": 3.5}
    return [{"step": step, **{name: value / step for name, value in terms.items()}} for step in (1, 2, 3)]


def make_results():
    moe = (22_740_000, 17_400_000, 3_538_944)
    return {
        "format": 1,
        "environment": {
            "python": "3.11.7",
            "cpu": "Some <CPU>",
            "threads": 2,
            "devices": [],
            "commit": None,
            "versions": {"torch": "2.11.0", "triton": None},
            "backends": [{"name": "Triton kernels", "usable": False, "detail": "torch finds no CUDA device"}],
        },
        "task": {
            "name": "docstrings",
            "kind": "classification",
            "main_metric": "accuracy",
            "train_rows": 3000,
            "validation_rows": 1000,
        },
        "settings": {"experts": 4, "routing": "hash-random", "learning_rate": 1e-4, "publish": False},
        "models": [
            model("teacher", 0.87, 22_713_000, 22_713_000, 14_155_776, 9.1, 310),
            model("student before distillation", 0.74, *moe, 6.6, 390),
            model("student", 0.862, *moe, 6.5, 392),
            model("random split before distillation", 0.31, *moe, 6.6, 391),
            model("random split", 0.85, *moe, 6.7, 388),
        ],
        "importance": {
            "model": "teacher",
            "task": "docstrings",
            "num_samples": 3000,
            "share_curve_LQ": [[0, 0.5, 0.75, 0.9, 1], [0, 0.6, 0.8, 0.95, 1]],
        },
        "expert_load_LE": [[0.3, 0.3, 0.2, 0.2], [0.1, 0.4, 0.25, 0.25]],
        "training_load_NLE": {
            "student": [
                [[0.3, 0.3, 0.2, 0.2], [0.1, 0.6, 0.15, 0.15]],
                [[0.25, 0.25, 0.25, 0.25], [0.2, 0.35, 0.2, 0.25]],
            ]
        },
        "losses": {"student": make_curve(), "random split": make_curve()},
        "timings_s": {"finetune": 41.25, "distill": 130.0},
    }


class Reader(HTMLParser):
    """Collects text, alternatives and ids, and checks that every element is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.alternatives, self.text, self.links = [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        if values.get("role") == "img":
            self.alternatives.append(values["aria-label"])
        self.links += [values[key] for key in ("href", "src") if key in values]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def words(page):
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(" ".join(Reader(text).text).split())


def test_it_holds_every_model_figure_and_fact(results, page):
    text = words(page)
    for entry in results["models"]:
        assert entry["name"] in text
        assert f"{entry['quality']['accuracy']:.3f}" in text
    figures = ("22.7 M", "17.4 M", "3.54 M", "9.10", "8.19 to 10.92", "hash-random", "0.0001")
    facts = ("Some <CPU>", "not installed", "torch finds no CUDA device", "2 min 10 s", "2 min 51 s")
    for expected in (*figures, *facts):
        assert expected in text
    assert page.count("<svg") == 5


def test_it_asks_nothing_of_the_network(page):
    assert not re.search(r"https?:|//\w+\.\w|@import|<script|<link", page)
    assert all(link.startswith("#") for link in Reader(page).links)


def test_figures_have_their_own_ids_and_their_alternatives(page):
    """Inline drawings share the page's ids: a clip path of one must not cut another."""
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    expected = (
        "student 0.862 at 392 sequences/s",
        "between 50% and 60%",
        "from 10% to 40%",
        "student: at most 60% in the first epoch, 35% in the last",
        "student: total from 3.5 to 1.17",
    )
    for told, alternative in zip(expected, reader.alternatives, strict=True):
        assert told in alternative


def test_figures_take_their_colours_from_the_page(page):
    assert "#a100" not in page
    assert "var(--student)" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_same_results_give_the_same_page(results, page):
    assert render_report(json.loads(json.dumps(results))) == page


def test_it_says_in_words_what_the_numbers_mean(results):
    text = " ".join(summarize(results)).replace("\N{NO-BREAK SPACE}", " ")
    assert "reaches accuracy 0.870" in text
    assert "0.740 at once and 0.862 after distillation" in text
    assert "\N{MINUS SIGN}0.008 against it" in text
    assert "start from 0.310 and end at 0.850" in text
    assert "one standard error of accuracy is about 0.011" in text
    assert "4.0 times less work" in text
    assert "1.26 times its throughput" in text
    assert "The checkpoint does not shrink: every expert is stored, in all 22.7 M" in text


@pytest.mark.parametrize(
    ("latency", "throughput", "words"),
    [
        (6.5, 392, "Attention and embeddings are as before, so the whole model gains less than the part."),
        (9.6, 392, "faster in batches of 32 alone; in a batch of 1 it is slower here"),
        (9.1, 392, "faster in batches of 32 alone; in a batch of 1 it is no faster here"),
        (6.5, 250, "faster in a batch of 1 alone; in batches of 32 it is slower here"),
        (9.6, 250, "The student is slower here: the model is too small for"),
        (9.1, 312, "The student is no faster here: the model is too small for"),
    ],
)
def test_the_speed_is_told_as_it_was_measured(results, latency, throughput, words):
    """A student that was slower than its teacher was said to gain less than its part."""
    student = next(entry for entry in results["models"] if entry["name"] == "student")
    student |= {"latency_ms": timing(latency, 1), "throughput_per_s": timing(throughput, 32)}
    text = " ".join(summarize(results))
    assert f"takes {latency:.2f} ms where the teacher takes 9.10 ms" in text
    assert f"run at {throughput / 310:.2f} times its throughput" in text
    assert words in text
    assert ("gains less than the part" in text) == ("gains less than the part" in words)


def test_the_speed_of_one_sequence_alone(results):
    for entry in results["models"]:
        entry["throughput_per_s"] = None
    text = " ".join(summarize(results))
    assert "takes 6.50 ms where the teacher takes 9.10 ms. Attention" in text
    assert "batches of" not in text


def test_speed_that_was_not_measured_is_left_out(results):
    for entry in results["models"]:
        entry |= {"latency_ms": None, "throughput_per_s": None}
    text = words(render_report(results | {"measuring": None}))
    assert "speed not measured; made on Some <CPU>" in text
    assert "latency" not in text.lower()
    assert "sequences per second" not in text


def test_a_teacher_no_better_than_chance_is_told_of(results):
    """Stops the student of a teacher that has learned nothing from being reported without a word."""
    task, teacher = results["task"], results["models"][0]
    quality = teacher["quality"][task["main_metric"]]
    for constant, told in ((quality, True), (quality - 0.01, False), (None, False)):
        changed = results | {"task": task | {"constant_score": constant, "validation_rows": 500}}
        assert [text[:26] for text in warnings_of(changed)] == ["The teacher is no better t"] * told
    student = next(model for model in results["models"] if model["name"] == "student")
    student["quality"] = dict.fromkeys(student["quality"], 0.5)
    changed = results | {"task": task | {"constant_score": 0.5}}
    assert [text[:26] for text in warnings_of(changed)] == ["The student is no better t"]


def test_warnings_stand_before_everything_else(results, page):
    told = ["t.csv, line 4: the text in column '<b>' is empty; such rows are kept.", "Scores say little."]
    warned = render_report(results | {"warnings": told})
    assert warned.count('<p class="warning">') == 2
    text = words(warned)
    assert text.index(told[0]) < text.index(told[1]) < text.index("The fine-tuned teacher reaches")
    assert '<p class="warning">' not in page


def test_it_says_what_speed_was_measured_under(results):
    quiet = results | {"measuring": {"dtype": "float32", "busy_cpus": 0.1}}
    assert "speed measured in float32 on Some <CPU>, 2 CPU threads." in words(render_report(quiet))
    for busy in (0.1, None):
        assert warnings_of(results | {"measuring": {"dtype": "float32", "busy_cpus": busy}}) == []
    (warning,) = warnings_of(results | {"measuring": {"dtype": "float32", "busy_cpus": 1.24}})
    assert warning.startswith("While speed was measured, other work kept 1.2 processors busy")


def test_layers_have_colours_that_can_be_told_apart():
    """The third to the fifth of six layers had nearly one colour."""
    svg = plot_importance([[0.0, 0.5 + layer / 20, 1.0] for layer in range(6)])
    drawn = list(dict.fromkeys(re.findall(r"stroke: #([0-9a-f]{6})", svg)))
    assert len(drawn) == 6
    colours = [[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in drawn]
    assert min(math.dist(a, b) for a, b in itertools.combinations(colours, 2)) > 75


def of_equal_cost(results):
    """The results of `--compare random,narrow,layers --seeds 3`."""
    dense, narrow, fewer = results["models"][0], *(copy.deepcopy(results["models"][2]) for _ in range(2))
    narrow |= {"name": "narrow FFN", "quality": {"accuracy": 0.858, "macro_f1": 0.85}}
    fewer |= {"name": "fewer layers", "quality": {"accuracy": 0.841, "macro_f1": 0.83}}
    fewer["kept_layers"] = [2, 4, 6]
    results["models"] += [fewer | {"name": "fewer layers before distillation"}, narrow, fewer]
    for entry in results["models"]:
        entry["encoder_flops_per_token"] = 21_200_000 if entry is dense else 10_600_000
        if "before" not in entry["name"] and entry is not dense:
            entry["spread"] = {"accuracy": 0.004, "macro_f1": 0.005}
            entry["seeds"] = [{"seed": seed, "quality": entry["quality"]} for seed in range(3)]
    results["losses"] |= {name: results["losses"]["student"] for name in ("narrow FFN", "fewer layers")}
    return results


def test_models_of_equal_cost_stand_beside_the_student(results):
    page = render_report(of_equal_cost(results))
    for expected in (
        *("encoder FLOPs per token", "10.6 M", "0.858 ± 0.004", "0.841 ± 0.004", "0.862 ± 0.004"),
        "neurons in every layer reaches 0.858 ± 0.004 and the teacher's layers 2, 4 and 6 alone",
        "with 1.00 times the work, 0.841 ± 0.004",
        "the mean over 3 seeds",
    ):
        assert expected in words(page)
    for colour in ("narrow", "layers"):
        assert page.count(f"var(--{colour})") >= 3  # its point, its row, its definition is apart
        assert page.count(f"--{colour}: #") == 3  # light, dark, print
    alternatives = Reader(page).alternatives
    assert "fewer layers 0.841 ± 0.004 at 392 sequences/s" in alternatives[0]
    assert "fewer layers: total from 3.5 to 1.17" in alternatives[4]


def test_a_simpler_model_that_is_better_is_said_to_be(results):
    """The report praised the student beside a narrow network that had left it behind."""
    models = {entry["name"]: entry for entry in of_equal_cost(results)["models"]}
    models["student"]["quality"]["accuracy"] = 0.9
    assert "ahead" not in " ".join(summarize(results))
    models["narrow FFN"]["quality"]["accuracy"] = 0.92
    text = "The narrow FFN is ahead of the student by 0.020: here experts gain nothing on it."
    assert text in " ".join(summarize(results))


def test_a_single_layer_is_named_as_one(results):
    of_equal_cost(results)["models"][-1]["kept_layers"] = [6]
    assert "the teacher's layer 6 alone" in " ".join(summarize(results))


def test_a_checkpoint_that_does_shrink_is_not_said_to_stay(results):
    for entry in results["models"][1:]:
        entry["parameters_stored"] = 15_000_000
    text = " ".join(summarize(results))
    assert "does not shrink" not in text
    assert "15.0\N{NO-BREAK SPACE}M parameters against the teacher's 22.7\N{NO-BREAK SPACE}M" in text


def test_names_from_outside_are_escaped(results):
    results["task"]["name"] = "<script>alert(1)</script>"
    results["settings"]["teacher"] = "a&b<c>"
    page = render_report(results)
    assert "<script" not in page
    assert "a&amp;b&lt;c&gt;" in page


def test_a_plain_compression_without_extras(results):
    """`compress` has no random split, and may have measured, logged and scored less."""
    results["models"] = [entry for entry in results["models"] if entry["name"] in ("teacher", "student")]
    for entry in results["models"]:
        entry |= {"quality": {"pearson": 0.8}, "latency_ms": None, "throughput_per_s": None}
    results["task"] |= {"kind": "regression", "main_metric": "pearson"}
    results |= {"importance": None, "losses": {"student": []}, "timings_s": {}}
    del results["expert_load_LE"], results["training_load_NLE"]
    page = render_report(results)
    assert "<svg" not in page
    assert "Cut at random" not in page
    assert "standard error" not in page
    assert "0.800" in words(page)


def test_one_layer_and_many_experts(results):
    results["training_load_NLE"] = {"student": [[[1 / 64] * 64]]}
    results["importance"]["share_curve_LQ"] = [[0.0, 0.7, 1.0]]
    results["expert_load_LE"] = [[1 / 64] * 64]
    text = words(render_report(results))
    assert "layer 1" in text
    assert "layer 2" not in text


def test_terms_that_are_zero_or_absent_are_not_drawn(results):
    """A logarithmic axis has no place for the layer loss of weight 0."""
    for point in results["losses"]["student"]:
        point["layer"] = 0.0
        del point["prediction"]
    assert render_report(results).count("<svg") == 5


@pytest.mark.parametrize("found", [2, None, "1"])
def test_another_format_is_refused(results, found):
    results["format"] = found
    with pytest.raises(ValueError, match=f"format 1, found {found!r}"):
        render_report(results)


def test_no_models_is_refused(results):
    results["models"] = []
    with pytest.raises(ValueError, match="no models"):
        render_report(results)


def test_a_page_that_cannot_be_made_leaves_the_old_one(results, tmp_path):
    path = tmp_path / "report.html"
    write_report(results, path)
    before = path.read_text()
    broken = copy.deepcopy(results)
    del broken["models"][0]["quality"]
    with pytest.raises(KeyError):
        write_report(broken, path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_summary_of_what_was_only_fitted_and_of_what_training_made_worse(results):
    fitting = {"num_tokens": 9, "cut_L": [0.3], "fitted_L": [0.1], "divergence": {"cut": 2.0, "fitted": 1.0}}
    results["fitting"] = {"student": {**fitting, "kept": "fitted"}}
    text = " ".join(summarize(results))
    assert "each fitted to what they do with its tokens" in text
    assert "kept as it was fitted" in text
    results["models"] = [m for m in results["models"] if not m["name"].endswith("before distillation")]
    results |= {"losses": {}, "training_load_NLE": {}, "fitting": {"student": fitting}}
    text = " ".join(summarize(results))
    assert "without any training" in text
    assert "distill" not in text
    assert "Distillation losses" not in render_report(results)
