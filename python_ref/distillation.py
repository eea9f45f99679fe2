"""Distillation: the losses that the student is trained on.

Gradients reach both student and teacher; freezing the teacher is for the caller. Masks are True (or 1) at
real tokens. Every mask must have a real token, and in question answering one in every sample.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

PREDICTION_KINDS = ("classification", "regression", "question_answering", "token_classification")


def layer_loss(student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], mask_BS: Tensor) -> Tensor:
    """Eq. 5: the sum over the embedding output and every layer of MSE(X^l, X^l_tea).

    The mean is over the real tokens and D. (In the authors' modeling_bert_moe.py padding was part of it.)

    Args:
        student_states: the L + 1 hidden states, [B, S, D] each.
        teacher_states: as many, of the same shapes.
        mask_BS: real tokens.

    Raises:
        ValueError: the two have different numbers of states.
    """
    if len(student_states) != len(teacher_states):
        raise ValueError(
            f"student_states has {len(student_states)} states, teacher_states {len(teacher_states)}"
        )
    real = mask_BS.bool()
    pairs = zip(student_states, teacher_states, strict=True)
    return torch.stack([functional.mse_loss(s_BSD[real], t_BSD[real]) for s_BSD, t_BSD in pairs]).sum()


def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Eq. 6: 1/2 (KL(p || q) + KL(q || p)) = 1/2 sum over c of (p - q)(log p - log q), mean over the batch.

    p is the student's softmax, q the teacher's. From log-probabilities: finite also where a probability
    rounds to 0.

    Args:
        student_logits: [..., C]; all dimensions but the last are batch.
        teacher_logits: of the same shape.
    """
    log_p, log_q = torch.log_softmax(student_logits, dim=-1), torch.log_softmax(teacher_logits, dim=-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1).mean()


def prediction_loss(
    kind: str,
    student: Tensor | tuple[Tensor, Tensor],
    teacher: Tensor | tuple[Tensor, Tensor],
    mask_BS: Tensor | None = None,
) -> Tensor:
    """L_pred of Eq. 7 for each kind of task.

    * "classification": `symmetric_kl` of logits [B, C].
    * "regression": mean squared error of the outputs (the authors' modeling_bert_moe.py).
    * "question_answering": student and teacher are (start logits, end logits), [B, S] each; the mean of the
      two `symmetric_kl` over positions (the same file). Under a mask, over real positions only.
    * "token_classification": `symmetric_kl` of logits [B, S, C], mean over real tokens; not in the paper.

    Without mask_BS every position is real; the first two kinds have no positions and make no use of it.

    Raises:
        ValueError: kind is none of these, or student and teacher are not of the form it takes.
    """
    if kind not in PREDICTION_KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(PREDICTION_KINDS)}")
    if kind == "question_answering":
        if not (isinstance(student, tuple) and isinstance(teacher, tuple)):
            raise ValueError(f"{kind} expects student and teacher as tuples (start logits, end logits)")
        start = _position_loss(student[0], teacher[0], mask_BS)
        end = _position_loss(student[1], teacher[1], mask_BS)
        return (start + end) / 2
    if isinstance(student, tuple) or isinstance(teacher, tuple):
        raise ValueError(f"{kind} expects student and teacher as one tensor each, found a tuple")
    if kind == "regression":
        return functional.mse_loss(student, teacher)
    if kind == "token_classification" and mask_BS is not None:
        return symmetric_kl(student[mask_BS.bool()], teacher[mask_BS.bool()])
    return symmetric_kl(student, teacher)


def _position_loss(student_BS: Tensor, teacher_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Eq. 6 with the real positions of a sample as the classes."""
    mask_BS = torch.ones_like(student_BS) if mask_BS is None else mask_BS
    samples = zip(student_BS, teacher_BS, mask_BS.bool(), strict=True)
    return torch.stack([symmetric_kl(s_S[real_S], t_S[real_S]) for s_S, t_S, real_S in samples]).mean()


def total_loss(ce: Tensor, layer: Tensor, prediction: Tensor, weight: float) -> Tensor:
    """Eq. 7 and section 3.3: CE + lambda (L_trm + L_pred).

    For a learned gate the authors add `routing.load_balance_loss`, summed over layers and weighted by itself.
    """
    return ce + weight * (layer + prediction)
