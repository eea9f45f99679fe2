"""A dense model as exporters write it: hidden states [B, S, D], padding included, in every layer.

The mask alone is not theirs: a number that underflows no exponential, as in our own graphs. With the usual
one, the least float or minus infinity, the weights of padding are denormal numbers, which cost the runtime
half of its time.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MASKED_SCORE = -60.0  # e^-60 of any weight is far below what float32 tells from 0


class PaddedModel(nn.Module):
    """A dense model with explicit attention and one mask for all layers.

    Args:
        model: of transformers, a base model or one with a head for sequences.
        pool: for a base model: makes embeddings [B, D] of states [B, S, D] and a mask; None with a head.
    """

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, model: Any, pool: Any = None):
        super().__init__()
        model.set_attn_implementation("eager")
        self.model, self.pool = model, pool
        self.output_names = ["logits"] if pool is None else ["last_hidden_state", "sentence_embedding"]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits [B, C], or states and embeddings."""
        mask_B11S = (1 - attention_mask[:, None, None, :].float()) * MASKED_SCORE
        found = self.model(input_ids=input_ids, attention_mask=mask_B11S, token_type_ids=token_type_ids)
        if self.pool is None:
            return (found.logits,)
        states_BSD = found.last_hidden_state
        return states_BSD, self.pool(states_BSD, attention_mask)


def write_padded(model: PaddedModel, path: Path) -> None:
    """Write the graph, batch and length dynamic."""
    batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    example = tuple(torch.ones(2, 7, dtype=torch.long) for _ in model.input_names)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            model.eval(),
            example,
            dynamo=True,
            dynamic_shapes=tuple({0: batch, 1: length} for _ in example),
            opset_version=18,
            input_names=list(model.input_names),
            output_names=model.output_names,
            verbose=False,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
