"""Students that store shared neurons once, as graphs: one dense product, of tensors that are there once."""

import onnx
import pytest
import torch

from moebert_kernels.models import to_moe
from tests.export.exported import Graph, batch, outputs_of, worst_difference
from tests.tiny import OWN, SHARED, build_family, some_shared


@pytest.fixture(scope="module", params=["hash-random", "gate-token"])
def graph(request, tmp_path_factory):
    dense = build_family("Bert", "ForSequenceClassification", num_hidden_layers=1)
    student = to_moe(
        dense, some_shared()[:1], num_shared_neurons=SHARED, tie_shared=True, routing=request.param
    )
    return Graph(student, tmp_path_factory.mktemp("graph") / "model.onnx")


@pytest.mark.parametrize("lengths", [[9, 5, 1], [1], [7, 7, 7, 7]])
def test_any_batch_gives_what_the_model_gives(graph, lengths):
    inputs = batch(lengths, longest=max(lengths) + 2)
    difference = worst_difference(
        map(torch.as_tensor, graph(inputs)), outputs_of(graph.model, inputs), inputs["attention_mask"]
    )
    assert difference < 1e-4


def test_shared_matrices_are_there_once(graph):
    content = onnx.load(graph.path).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in content.initializer}
    products = [node.input[1] for node in content.node if node.op_type == "MatMul"]
    of_ffns = [shapes[name] for name in products if ".ffns." in name and "gate" not in name]
    for shape, times in (((32, SHARED), 1), ((SHARED, 32), 1), ((32, OWN), 4), ((OWN, 32), 4)):
        assert of_ffns.count(shape) == times, shape
    assert len(of_ffns) == 10
