"""A teacher that is asked about the same rows again and again, and answers from memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class RememberedTeacher(nn.Module):
    """Stands in for a frozen teacher with a classification head, whose forward is some 40 % of a step.

    A row's hidden states and logits do not depend on the rows around it (beyond rounding), so that they are
    kept by its token ids the first time they are asked for: 4 (L + 1) D bytes a token, on the device.

    Args:
        teacher: in eval mode; pads on the right.
    """

    def __init__(self, teacher: PreTrainedModel):
        super().__init__()
        self.teacher = copy.deepcopy(teacher)  # training freezes it; what contenders are cut from stays
        self.config = teacher.config
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = True,
    ) -> SequenceClassifierOutput:
        """What the teacher says of a batch; hidden states are 0 at padding."""
        lengths = attention_mask.sum(1).tolist()
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        keys = [
            (*ids[:n], *kinds[:n])
            for ids, kinds, n in zip(input_ids.tolist(), types.tolist(), lengths, strict=True)
        ]
        if any(key not in self._kept for key in keys):
            features = {"input_ids": input_ids, "attention_mask": attention_mask}
            if token_type_ids is not None:
                features["token_type_ids"] = token_type_ids
            outputs = self.teacher(**features, output_hidden_states=True)
            states_BSLD = torch.stack(outputs.hidden_states, dim=2).float()
            for row, (key, n) in enumerate(zip(keys, lengths, strict=True)):
                self._kept[key] = states_BSLD[row, :n].clone(), outputs.logits[row].float()
        kept = [self._kept[key] for key in keys]
        states_BSLD = pad_sequence([states_SLD for states_SLD, _ in kept], batch_first=True)
        return SequenceClassifierOutput(
            logits=torch.stack([logits for _, logits in kept]),  # type: ignore[arg-type]
            hidden_states=tuple(states_BSLD.unbind(2)),  # type: ignore[arg-type]
        )
