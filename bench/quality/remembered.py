"""A teacher that is asked about the same rows again and again, and answers from memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from moebert_kernels.compress.experts.layerwise import forward_replaced
from moebert_kernels.models import find_ffns
from moebert_kernels.models.families import DenseFFN


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
        self.teacher.set_attn_implementation("eager")  # which is never given rows without padding
        self.config = teacher.config
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Of the teacher."""
        return self.teacher.device

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


class RememberedLayers:
    """Lets a teacher's layers answer from memory when several students are fitted to the same batches.

    What each layer normalises at the end is kept, 4 L D bytes a token: most of a fit's work is the teacher's.

    Args:
        teacher: in eval mode; its layers return hidden states alone.
    """

    def __init__(self, teacher: PreTrainedModel):
        self._ffns = find_ffns(teacher)
        self._sums_LN: list[list[Tensor]] = [[] for _ in self._ffns]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, every layer is run on all batches, always the same in the same order."""
        with ExitStack() as replaced:
            for ffn, sums_N in zip(self._ffns, self._sums_LN, strict=True):
                replaced.enter_context(forward_replaced(ffn.layer, _from_memory(ffn, sums_N)))
            yield


def _from_memory(ffn: DenseFFN, sums_N: list[Tensor]) -> Callable[..., Tensor]:
    compute, turn = ffn.layer.forward, count()

    def forward(*args, **kwargs) -> Tensor:
        number = next(turn)
        if number < len(sums_N):
            return ffn.norm(sums_N[number])
        hook = ffn.norm.register_forward_pre_hook(lambda norm, inputs: sums_N.append(inputs[0]))
        try:
            return compute(*args, **kwargs)
        finally:
            hook.remove()

    return forward
