"""A graph under the interface of the model that it was made of, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput


class GraphModel(nn.Module):
    """What `compress.evaluate` takes for a model: called with a batch, it returns outputs by name.

    Args:
        graph: the .onnx file.
        config: of the model.
        num_threads: of ONNX Runtime; None for its own choice.
    """

    device = torch.device("cpu")

    def __init__(self, graph: Path, config: PreTrainedConfig, *, num_threads: int | None = None):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        self.config = config
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.input_names = [value.name for value in self.session.get_inputs()]
        self.output_names = [value.name for value in self.session.get_outputs()]

    def forward(self, **batch: Any) -> ModelOutput:
        """Run the graph; what it has no input for is left out, and missing token types are 0."""
        shape = batch["input_ids"].shape
        missing = {"attention_mask": np.ones, "token_type_ids": np.zeros}
        inputs = {
            name: batch[name].numpy() if name in batch else missing[name](shape, dtype=np.int64)
            for name in self.input_names
        }
        found = self.session.run(self.output_names, inputs)
        outputs: dict[str, Tensor] = {
            name: torch.from_numpy(values) for name, values in zip(self.output_names, found, strict=True)
        }
        return ModelOutput(outputs)
