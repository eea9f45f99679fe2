"""The losses of distillation: from labels, from every layer of the teacher, from its predictions.

Each is a mean over its own units (labelled items, real tokens, sequences), in float32 or wider whatever the
dtype of its inputs, without a host synchronisation. Notation: B sequences of S tokens, D hidden size, C
classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_kernels.compress.data.predictions import ONE_TENSOR_KINDS, PREDICTION_KINDS, Prediction
from moebert_kernels.models.config import IGNORED_LABEL


def layer_loss(
    student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], mask_BS: Tensor | None = None
) -> Tensor:
    """The sum over the embedding output and every layer of MSE(X^l, X^l_tea) (Eq. 5).

    Args:
        student_states: the L + 1 hidden states, [B, S, D] each.
        teacher_states: as many, of the same shapes.
        mask_BS: nonzero at real tokens, the only ones compared, whatever the others hold; None if all are.

    Returns:
        A scalar: each state's squared error averaged over real tokens and D, summed over states. 0 without
        real tokens.

    Raises:
        ValueError: the two have different numbers of states, or states of different shapes.
    """
    if len(student_states) != len(teacher_states):
        raise ValueError(
            f"student_states has {len(student_states)} states and teacher_states {len(teacher_states)}; "
            "layers are compared one to one, so both models need the same number of them"
        )
    total = None
    for level, (student_BSD, teacher_BSD) in enumerate(zip(student_states, teacher_states, strict=True)):
        if student_BSD.shape != teacher_BSD.shape:
            raise ValueError(
                f"hidden state {level} is {tuple(student_BSD.shape)} in the student and "
                f"{tuple(teacher_BSD.shape)} in the teacher; both need the same hidden size"
            )
        error_BSD = _wide(student_BSD) - _wide(teacher_BSD)
        if mask_BS is not None:
            error_BSD = error_BSD.masked_fill((mask_BS == 0).unsqueeze(-1), 0)
        state_error = error_BSD.square().sum()
        total = state_error if total is None else total + state_error
    if total is None:
        raise ValueError("student_states and teacher_states are empty; pass output_hidden_states=True")
    num_tokens = (
        student_states[0].shape[:-1].numel() if mask_BS is None else (mask_BS != 0).sum().clamp(min=1)
    )
    return total / (num_tokens * student_states[0].shape[-1])


def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """1/2 (KL(p || q) + KL(q || p)) = 1/2 sum_c (p - q)(log p - log q), mean over the batch (Eq. 6).

    p is the student's softmax, q the teacher's. Taken from log-probabilities: finite where a probability
    rounds to 0.

    Args:
        student_logits: [..., C]; all axes but the last are batch.
        teacher_logits: of the same shape.
        mask: [...], nonzero where a distribution counts; None if all do.
    """
    if mask is None:
        return _divergence(
            *(_wide(logits).log_softmax(-1) for logits in (student_logits, teacher_logits))
        ).mean()
    ignored = (mask == 0).unsqueeze(-1)
    # Equal logits where the mask is 0: they diverge by 0 and pass no gradient, whatever was there.
    log_p, log_q = (
        _wide(logits).masked_fill(ignored, 0).log_softmax(-1) for logits in (student_logits, teacher_logits)
    )
    return _divergence(log_p, log_q).sum() / (mask != 0).sum().clamp(min=1)


def prediction_loss(
    kind: str, student: Prediction, teacher: Prediction, mask_BS: Tensor | None = None
) -> Tensor:
    """L_pred of Eq. 7 for each kind of task.

    * "classification": `symmetric_kl` of logits [B, C].
    * "multi_label_classification": `symmetric_kl` of each class's yes and no, mean over classes: of logits s
      and t, 1/2 (sigmoid(s) - sigmoid(t)) (s - t). The paper has no such task.
    * "regression": mean squared error of the outputs, as in the authors' code.
    * "question_answering": student and teacher are (start logits, end logits), [B, S] each; the mean of their
      symmetric KL over a sequence's real positions, averaged over the batch.
    * "token_classification": `symmetric_kl` of logits [B, S, C] over the real tokens.

    Args:
        kind: one of `PREDICTION_KINDS`.
        student: logits, or the pair of them.
        teacher: the same of the teacher.
        mask_BS: nonzero at real tokens; read by the last two kinds. None if all are.

    Raises:
        ValueError: `kind` is unknown, or a pair is given to a kind of one tensor or the reverse.
    """
    if isinstance(student, tuple) and isinstance(teacher, tuple) and kind == "question_answering":
        start, end = (_position_kl(s, t, mask_BS) for s, t in zip(student, teacher, strict=True))
        return (start + end) / 2
    if isinstance(student, tuple) or isinstance(teacher, tuple) or kind not in ONE_TENSOR_KINDS:
        raise _wrong_kind(kind, student, teacher)
    if kind == "regression":
        return F.mse_loss(_wide(student), _wide(teacher))
    if kind == "multi_label_classification":
        student, teacher = _wide(student), _wide(teacher)
        return 0.5 * ((student.sigmoid() - teacher.sigmoid()) * (student - teacher)).mean()
    return symmetric_kl(student, teacher, mask_BS if kind == "token_classification" else None)


def label_loss(
    kind: str,
    student: Prediction,
    labels: Prediction,
    mask_BS: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The task's own loss, as the transformers heads take it: cross-entropies, or MSE for regression.

    But for padding, which is not among the places that start and end of an answer are chosen from: what a
    model gives there depends on how its batch was computed.

    Args:
        kind: one of `PREDICTION_KINDS`.
        student: logits of the shape `prediction_loss` takes.
        labels: [B] or [B, 1] classes, [B, C] of 0 and 1 for multi-label classification, [B] or [B, C] targets
            for regression, [B, S] classes of tokens, or the pair of start and end positions [B]. Items
            labelled -100, and positions outside the sequence, do not count.
        mask_BS: nonzero at real tokens; read for question answering. None if all are.
        label_smoothing: of the cross-entropies over classes.
        reduction: "mean" over labelled items; or "sum", which is over samples: of a sample's tokens it is the
            sum, of several outputs of a sequence the mean.

    Returns:
        A scalar; 0 if there are no labelled items.

    Raises:
        ValueError: as `prediction_loss`.
    """
    if isinstance(student, tuple) and isinstance(labels, tuple) and kind == "question_answering":
        pairs = zip(student, labels, strict=True)
        start, end = (_position_ce(*pair, mask_BS, label_smoothing, reduction) for pair in pairs)
        return (start + end) / 2
    if isinstance(student, tuple) or isinstance(labels, tuple) or kind not in ONE_TENSOR_KINDS:
        raise _wrong_kind(kind, student, labels)
    if kind in ("regression", "multi_label_classification"):
        loss_of = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        student = _wide(student)
        mean = loss_of(student, labels.to(student.dtype).view_as(student))
        return mean if reduction == "mean" else mean * len(student)
    return _cross_entropy(student.flatten(0, -2), labels.flatten(), label_smoothing, reduction)


def embedding_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """The squared distance of two embeddings in units of the teacher's squared length, mean over sentences.

    Of embeddings of length 1, it is 2 (1 - cosine).

    Args:
        student_BD: one embedding per sentence.
        teacher_BD: of the same shape.
    """
    student_BD, teacher_BD = _wide(student_BD), _wide(teacher_BD)
    squared_length_B = teacher_BD.square().sum(-1).clamp(min=torch.finfo(teacher_BD.dtype).eps)
    return ((student_BD - teacher_BD).square().sum(-1) / squared_length_B).mean()


def _wrong_kind(kind: str, first: Prediction, second: Prediction) -> ValueError:
    if kind not in PREDICTION_KINDS:
        return ValueError(f"kind must be one of {', '.join(PREDICTION_KINDS)}; got {kind!r}")
    wanted = "a (start, end) pair" if kind == "question_answering" else "one tensor"
    return ValueError(
        f"kind {kind!r} needs {wanted} on both sides, got {type(first).__name__} and {type(second).__name__}"
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def _position_kl(student_BS: Tensor, teacher_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Eq. 6 with the real positions of a sequence as its classes."""
    if mask_BS is None:
        return symmetric_kl(student_BS, teacher_BS)
    log_p_BS, log_q_BS = (_log_probs_of_real(logits_BS, mask_BS) for logits_BS in (student_BS, teacher_BS))
    return _divergence(log_p_BS, log_q_BS).mean()


def _cross_entropy(logits_NC: Tensor, labels_N: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    total = F.cross_entropy(
        _wide(logits_NC),
        labels_N,
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total if reduction == "sum" else total / (labels_N != IGNORED_LABEL).sum().clamp(min=1)


def _position_ce(
    logits_BS: Tensor, positions: Tensor, mask_BS: Tensor | None, label_smoothing: float, reduction: str
) -> Tensor:
    """Cross-entropy with the real positions of a sequence as its classes."""
    positions_B = positions.reshape(-1)
    outside_B = (positions_B < 0) | (positions_B >= logits_BS.shape[1])
    labels_B = positions_B.masked_fill(outside_B, IGNORED_LABEL)
    if mask_BS is None:
        return _cross_entropy(logits_BS, labels_B, label_smoothing, reduction)
    log_p_BS = _log_probs_of_real(logits_BS, mask_BS)
    exact_B = log_p_BS.gather(1, positions_B.masked_fill(outside_B, 0).unsqueeze(1)).squeeze(1)
    even_B = log_p_BS.sum(1) / (mask_BS != 0).sum(1).clamp(min=1)
    total = torch.lerp(exact_B, even_B, label_smoothing).neg().masked_fill(outside_B, 0).sum()
    return total if reduction == "sum" else total / (~outside_B).sum().clamp(min=1)


def _log_probs_of_real(logits_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """A sequence's log-probabilities over its real positions; 0 at the others."""
    logits_BS, padding_BS = _wide(logits_BS), mask_BS == 0
    # The lowest finite number, not -inf: a sequence without real positions must not become NaN.
    lowest = torch.finfo(logits_BS.dtype).min
    return logits_BS.masked_fill(padding_BS, lowest).log_softmax(-1).masked_fill(padding_BS, 0)
