"""The graph in ONNX Runtime: what it is made of, and that any batch gives what the model gives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_kernels.export import graph as graph_module
from moebert_kernels.export.quantize import large_products, quantize_products
from moebert_kernels.models import to_moe
from tests.export.exported import Graph, batch, outputs_of, session, student, worst_difference
from tests.tiny import OWN, SHARED, build_family, some_shared

LENGTHS = st.lists(st.integers(0, 24), min_size=1, max_size=5).filter(any)


@pytest.fixture(scope="module")
def hashed(tmp_path_factory) -> Graph:
    """Under hash routing, of as many positions as an encoder usually has."""
    model = student("Bert", "ForSequenceClassification", max_position_embeddings=512, num_hidden_layers=2)
    return Graph(model, tmp_path_factory.mktemp("hashed") / "model.onnx")


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> Graph:
    model = student("Roberta", "ForTokenClassification", "gate-token", 2, num_hidden_layers=1)
    return Graph(model, tmp_path_factory.mktemp("gated") / "model.onnx")


def worst(graph: Graph, inputs) -> float:
    return worst_difference(graph(inputs), outputs_of(graph.model, inputs), inputs["attention_mask"])


@given(lengths=LENGTHS, seed=st.integers(0, 99), more=st.integers(0, 9))
def test_any_batch_gives_what_the_model_gives(hashed, lengths, seed, more):
    """Rows of nothing but padding, single tokens, experts without any, padding to more than the longest."""
    assert worst(hashed, batch(lengths, longest=max(lengths) + more, seed=seed)) < 1e-4


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_any_batch_through_a_gate_gives_what_the_model_gives(gated, lengths, seed):
    assert worst(gated, batch(lengths, seed=seed)) < 1e-4


def test_the_longest_row_and_the_shortest(hashed):
    for lengths in ([512], [1], [1, 512], [512, 511, 2]):
        assert worst(hashed, batch(lengths)) < 1e-4


def test_padding_alone_gives_numbers(hashed, gated):
    """Stops a batch, or a row, without a token from ending in an error or in NaN, which would spread."""
    for graph in (hashed, gated):
        for lengths in ([0], [0, 0]):
            inputs = batch(lengths, longest=4)
            assert all(np.isfinite(values).all() for values in graph(inputs))
        alone, beside = graph(batch([6], seed=3))[0], graph(batch([6, 0], seed=3))[0]
        np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)


def test_one_expert_takes_all_or_none(hashed):
    table_V = hashed.model.bert.encoder.tables_LV[0]
    ids_T = torch.arange(2, len(table_V))[table_V[2:] == 3][:7]
    inputs = {"input_ids": ids_T.unsqueeze(0), "attention_mask": torch.ones(1, len(ids_T), dtype=torch.long)}
    assert worst(hashed, inputs) < 1e-4


def test_operators_are_standard_and_plain(hashed, gated):
    for graph in (hashed, gated):
        content = onnx.load(graph.path)
        onnx.checker.check_model(content, full_check=True)
        assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", 18)]
        assert {node.domain for node in content.graph.node} == {""}
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in content.graph.node}
        assert not content.functions


def test_batch_and_length_are_dynamic(hashed, gated):
    for graph, last in ((hashed, 1), (gated, 2)):
        for value in graph.session.get_inputs():
            assert value.shape == ["batch_size", "sequence_length"]
            assert value.type == "tensor(int64)"
        (output,) = graph.session.get_outputs()
        assert output.name == "logits"
        assert output.shape[:last] == ["batch_size", "sequence_length"][:last]


def test_each_experts_matrices_are_its_own(hashed):
    """Stops weights from reaching a product through a Gather or a Transpose, unseen by quantizers."""
    content = onnx.load(hashed.path).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in content.initializer}
    weights = [node.input[1] for node in content.node if node.op_type == "MatMul" and node.input[1] in shapes]
    of_experts = [name for name in weights if ".ffns." in name]
    assert len(of_experts) == len(set(of_experts)) == 2 * 4 * 2
    assert {shapes[name] for name in of_experts} == {(32, 16), (16, 32)}


def test_rows_stay_rows(hashed):
    """Stops hidden states from having a batch's padded shape between the embeddings and the head."""
    content = onnx.shape_inference.infer_shapes(onnx.load(hashed.path)).graph
    rank = {value.name: len(value.type.tensor_type.shape.dim) for value in content.value_info}
    of_layers = [node for node in content.node if ".ffns." in " ".join(node.input)]
    norms = [node for node in of_layers if node.op_type == "LayerNormalization"]
    assert len(norms) == 8
    assert {rank[node.input[0]] for node in norms} == {2}
    assert sum(node.op_type == "Softmax" for node in content.node) == 2


def test_a_family_that_differs_in_the_encoder(tmp_path):
    """The other that does, MPNet, is in test_export.py."""
    graph = Graph(student("DebertaV2", "ForQuestionAnswering", num_hidden_layers=1), tmp_path / "model.onnx")
    for lengths in ([9, 5, 1], [30], [2, 0, 17]):
        assert worst(graph, batch(lengths)) < 1e-4
    inputs = batch([3, 9])
    start, end = graph(inputs)
    assert (start[0, 3:] == -10000).all()
    assert (end[0, 3:] == -10000).all()


def test_int8_is_of_the_large_products_alone(hashed, tmp_path):
    products = large_products(hashed.path)
    assert {part: len(nodes) for part, nodes in products.items()} == {
        "attention of layer 1": 2,
        "feed-forward of layer 1": 8,
        "attention of layer 2": 2,
        "feed-forward of layer 2": 8,
    }
    for parts, count in ((list(products), 20), (["attention of layer 2"], 2)):
        path = tmp_path / f"{count}.onnx"
        quantize_products(hashed.path, path, [name for part in parts for name in products[part]])
        content = onnx.load(path)
        assert sum(node.op_type == "MatMulInteger" for node in content.graph.node) == count
        assert {node.domain for node in content.graph.node} == {""}
        inputs = batch([9, 0, 1, 5])
        (logits,) = session(path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        expected = outputs_of(hashed.model, inputs)[0]
        assert 0 < worst_difference([logits], [expected], inputs["attention_mask"]) < 0.5


def test_shared_neurons_are_there_once_as_one_product(tmp_path):
    dense = build_family("Bert", "ForSequenceClassification", num_hidden_layers=1)
    how = {"num_shared_neurons": SHARED, "tie_shared": True, "routing": "gate-token"}
    graph = Graph(to_moe(dense, some_shared()[:1], **how), tmp_path / "model.onnx")
    for lengths in ([9, 5, 1], [1], [7, 7, 7, 7]):
        assert worst(graph, batch(lengths, longest=max(lengths) + 2)) < 1e-4
    content = onnx.load(graph.path).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in content.initializer}
    products = [node.input[1] for node in content.node if node.op_type == "MatMul"]
    of_ffns = [shapes[name] for name in products if ".ffns." in name and "gate" not in name]
    for shape, times in (((32, SHARED), 1), ((SHARED, 32), 1), ((32, OWN), 4), ((OWN, 32), 4)):
        assert of_ffns.count(shape) == times, shape
    assert len(of_ffns) == 10


def test_weights_go_beside_a_graph_that_is_too_large(tmp_path, monkeypatch):
    """Stops models over 2 GiB from failing to be written, or to be found by tools, which know one name.

    Of a sentence gate, which no other graph here has.
    """
    monkeypatch.setattr(graph_module, "MOST_BYTES", 1000)
    path = tmp_path / "model.onnx"
    graph = Graph(student("Bert", None, "gate-sentence", num_hidden_layers=1), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert path.stat().st_size < (tmp_path / "model.onnx_data").stat().st_size
    for lengths in ([9, 5, 1], [7, 0, 3, 3]):
        inputs = batch(lengths)
        assert worst(graph, inputs) < 1e-4
        assert (graph(inputs)[0][inputs["attention_mask"].numpy() == 0] == 0).all()
    small = tmp_path / "small"
    small.mkdir()
    names = [name for part in large_products(path).values() for name in part]
    quantize_products(path, small / "model_quantized.onnx", names)
    assert {file.name for file in small.iterdir()} == {"model_quantized.onnx", "model_quantized.onnx_data"}
    session(small / "model_quantized.onnx")
