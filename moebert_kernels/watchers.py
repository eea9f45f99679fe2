"""Whether anybody but autograd would notice an operator: if not, what it does may be called directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether there is no compiler, tracer, mode, subclass or transform.

    Only then may a call go past the dispatcher, whose Python layers cost more than all else that happens on
    the host.
    """
    return (
        not torch.compiler.is_compiling()
        and _PLAIN.issuperset(map(type, tensors))
        and not has_torch_function(tensors)  # of these types none has, unless a mode is on
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def differentiated_by_transform(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one of torch.func's transforms takes the gradient of a tensor."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    # Within a transform everything is of its kind of tensor, whether it is differentiated or not.
    return any(
        t is not None and t.requires_grad and torch._C._functorch.is_gradtrackingtensor(t) for t in tensors
    )
