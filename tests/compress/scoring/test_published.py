import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moebert_kernels.compress.experts.adaptation import split_neurons
from moebert_kernels.compress.scoring.published import convert_published
from moebert_kernels.errors import UserError


def published(scores_LF):
    """The pickle's content, made as the authors' merging script makes it: sorted scores and their neurons."""
    order_LF = [sorted(range(len(scores)), key=lambda j: (-scores[j], -j)) for scores in scores_LF]
    sorted_LF = [[scores[j] for j in order] for scores, order in zip(scores_LF, order_LF, strict=True)]
    return {"importance": sorted_LF, "idx": order_LF}


def authors_split(content, num_experts, expert_size, num_shared):
    """What the authors' code makes of the file: it reads the order of neurons alone."""
    split = []
    for order in content["idx"]:
        shared, rest = order[:num_shared], order[num_shared:]
        split.append([(shared + rest[e::num_experts])[:expert_size] for e in range(num_experts)])
    return torch.tensor(split)


def write(path, content, protocol=3):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@given(
    # Few values, so that most neurons tie; 1e-45 is the least float32 above 0.
    scores_LF=arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 12)),
        elements=st.sampled_from([0.0, 1e-45, 0.5, 1.0, 111.97811889648438]),
    ).map(np.ndarray.tolist),
    num_experts=st.integers(1, 4),
    num_shared=st.integers(0, 4),
    protocol=st.sampled_from([2, 3, 4, 5]),
)
def test_a_converted_file_gives_the_split_of_the_authors_code(
    tmp_path_factory, scores_LF, num_experts, num_shared, protocol
):
    """Stops ties from swapping neurons between experts: five of the nine published files have such ties."""
    content = published(scores_LF)
    path = write(tmp_path_factory.mktemp("published") / "importance_rte.pkl", content, protocol)
    importance = convert_published(path)
    width = len(scores_LF[0])
    num_shared = min(num_shared, width)
    expert_size = num_shared + (width - num_shared) // num_experts
    if expert_size:
        expected = authors_split(content, num_experts, expert_size, num_shared)
        assert torch.equal(
            split_neurons(importance.scores_LF, num_experts, expert_size, num_shared), expected
        )
    torch.testing.assert_close(importance.scores_LF, torch.tensor(scores_LF), rtol=1e-5, atol=1e-40)
    assert (importance.task, importance.num_samples) == ("rte", 0)


def test_scores_without_ties_stay_as_they_are(tmp_path):
    scores_LF = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "importance_cola.pkl", published(scores_LF.tolist()))
    assert torch.equal(convert_published(path).scores_LF, scores_LF)


class _Call:
    """Pickles as a call of `function(*args)`, which unpickling would make."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


ORDER = {"importance": [[1.0]], "idx": [[0]]}
HOSTILE = {
    "os.system": lambda file: {**ORDER, "idx": _Call(os.system, f"touch {file}")},
    "eval": lambda file: _Call(eval, f"open({str(file)!r}, 'w').close()"),
    "protocol 0": lambda file: f"cos\nsystem\n(S'touch {file}'\ntR.".encode(),
    "instance": lambda file: f"(S'touch {file}'\nios\nsystem\n.".encode(),
    "object array": lambda file: {
        **ORDER,
        "idx": np.array([_Call(os.system, f"touch {file}")], dtype=object),
    },
    "numpy array": lambda _: {**ORDER, "importance": np.ones((1, 1))},
    "tensor": lambda _: {**ORDER, "importance": torch.ones(1, 1)},
    "set": lambda _: {**ORDER, "idx": {1, 2}},
    "persistent id": lambda _: b"\x80\x03Pname\n.",
    "extension": lambda _: b"\x80\x03\x82\x01.",
    "memo of 64 GiB": lambda _: b"\x80\x03}r\xff\xff\xff\xff.",
    "huge integer": lambda _: {**ORDER, "idx": [[1 << 80]]},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", HOSTILE)
def test_pickles_that_hold_more_than_numbers_are_refused_and_run_nothing(tmp_path, case, protocol):
    marker = tmp_path / "ran"
    path = write(tmp_path / "importance.pkl", HOSTILE[case](marker), protocol)
    older = case in ("protocol 0", "instance")
    words = "is not one of the published" if older else "is refused: its pickle has "
    with pytest.raises(UserError, match=rf"importance\.pkl {words}"):
        convert_published(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not one of the published importance files"),
        (b"label,text\nyes,a table\n", "is not one of the published importance files"),
        (b"\x80", "damaged or not a pickle"),
        (pickle.dumps({"importance": [[1.0]], "idx": [[0]]}, 3)[:-9], "damaged or not a pickle"),
        (b"\x80\x03}(u.", "damaged or not a pickle|not of"),
        (b"\x80\x03e.", "damaged or not a pickle"),
        ([1.0], "but not of"),
        ({"importance": [[1.0]]}, "but not of"),
        ({"importance": [[1.0]], "idx": [[0]], "more": 1}, "but not of"),
        ({"importance": [], "idx": []}, "not two lists of layers"),
        ({"importance": [[]], "idx": [[]]}, "not two lists of layers"),
        ({"importance": 1.0, "idx": 0}, "not two lists of layers"),
        ({"importance": [[1.0], [1.0, 0.0]], "idx": [[0], [0, 1]]}, "not two lists of layers"),
        ({"importance": [[1.0]], "idx": [[0], [0]]}, "not two lists of layers"),
        ({"importance": [[1.0]], "idx": [[0.0]]}, "not two lists of layers"),
        ({"importance": [["a"]], "idx": [[0]]}, "not two lists of layers"),
        ({"importance": [[1.0, 0.5]], "idx": [[0, 0]]}, "layer 0 does not name each of 2 neurons once"),
        ({"importance": [[1.0, 0.5]], "idx": [[0, 2]]}, "layer 0 does not name each of 2 neurons once"),
        ({"importance": [[0.5, 1.0]], "idx": [[0, 1]]}, "layer 0 are not finite, falling"),
        ({"importance": [[1.0, -1.0]], "idx": [[0, 1]]}, "layer 0 are not finite, falling"),
        ({"importance": [[float("inf"), 1.0]], "idx": [[0, 1]]}, "layer 0 are not finite, falling"),
        ({"importance": [[1.0, float("nan")]], "idx": [[0, 1]]}, "layer 0 are not finite, falling"),
        ({"importance": [[1.0]] * 2, "idx": [[0], [0]]}, "not two lists of layers"),
    ],
)
def test_other_files_are_refused_with_a_sentence(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        convert_published(write(tmp_path / "importance.pkl", content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        convert_published(tmp_path / "absent.pkl")


def test_a_file_far_larger_than_any_published_is_not_read(tmp_path):
    path = tmp_path / "importance.pkl"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="more than 16777216 bytes"):
        convert_published(path)
