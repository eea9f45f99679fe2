"""Exported embedders behind `SentenceTransformer(..., backend=...)`; BACKEND is "onnx" or "openvino"."""

import os

import sentence_transformers
from sentence_transformers import SentenceTransformer
from served import GRAPHS, check, folders

backend = os.environ["BACKEND"]
for served in folders("embedder"):
    for precision, graph in GRAPHS.items():
        options = {"file_name": graph, "subfolder": "onnx"}
        if backend == "openvino":  # by default it looks for OpenVINO's own format, and exports what has none
            options |= {"from_onnx": True, "export": False, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
        model = SentenceTransformer(str(served.folder), backend=backend, model_kwargs=options)
        what = f"sentence-transformers {sentence_transformers.__version__}, {backend}"
        check(served, what, precision, lambda: model.encode(served.texts))  # noqa: B023 - called at once
