"""Exported classifiers and embedders behind optimum's ORTModel classes."""

import importlib.metadata

from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForSequenceClassification
from served import GRAPHS, check, folders
from transformers import AutoTokenizer

for served in folders():
    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    kind = ORTModelForFeatureExtraction if served.is_embedder else ORTModelForSequenceClassification
    inputs = tokenizer(served.texts, padding=True, return_tensors="pt")
    for precision, graph in GRAPHS.items():
        model = kind.from_pretrained(served.folder, subfolder="onnx", file_name=graph)

        def answer(model=model, inputs=inputs, served=served):
            found = model(**inputs)
            if not served.is_embedder:
                return found.logits.numpy()
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (found.last_hidden_state * mask).sum(1) / mask.sum(1)
            return (mean / mean.norm(dim=-1, keepdim=True)).numpy()

        check(served, f"optimum-onnx {importlib.metadata.version('optimum-onnx')}", precision, answer)
