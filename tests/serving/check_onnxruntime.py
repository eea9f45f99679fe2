"""Exported folders in ONNX Runtime, as its users and those of text-embeddings-inference have them."""

import onnxruntime
from served import GRAPHS, batch, check, folders

for served in folders():
    for precision, graph in GRAPHS.items():
        session = onnxruntime.InferenceSession(
            served.folder / "onnx" / graph, providers=["CPUExecutionProvider"]
        )
        inputs = batch(served)
        feed = {value.name: inputs[value.name] for value in session.get_inputs()}
        output = ["sentence_embedding" if served.is_embedder else "logits"]
        what = f"onnxruntime {onnxruntime.__version__}"
        check(served, what, precision, lambda: session.run(output, feed)[0])  # noqa: B023 - called at once
