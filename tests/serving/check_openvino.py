"""Exported folders in OpenVINO, which reads the ONNX graphs as they are."""

import openvino
from served import GRAPHS, batch, check, folders

core = openvino.Core()
for served in folders():
    for precision, graph in GRAPHS.items():
        # Where the processor has bfloat16, OpenVINO takes it unasked: another number, no other graph.
        model = core.compile_model(served.folder / "onnx" / graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        inputs = batch(served)
        feed = {value.get_any_name(): inputs[value.get_any_name()] for value in model.inputs}
        output = model.output("sentence_embedding" if served.is_embedder else "logits")
        what = f"openvino {openvino.__version__.split('-')[0]}"
        check(served, what, precision, lambda: model(feed)[output])  # noqa: B023 - called at once
