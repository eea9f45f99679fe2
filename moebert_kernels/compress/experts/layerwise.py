"""An encoder run a layer at a time: every batch through one layer before any goes on to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.models import is_moe


class Layerwise:
    """Runs an encoder's own code, in which each layer computes when it is its turn and hands on otherwise.

    So every family's masks, position biases and what else it does between layers are its own, and no layer
    computes a batch twice. Between turns the hidden states of all batches are kept: 4 D bytes a token.

    Args:
        base: a base model, in evaluation mode.
        layers: its layers, in order.
        batches: its inputs, on its device as they are run.

    Attributes:
        states: of every batch, the hidden states [B, S, D] that the next layer takes; None before the first.
            Whoever runs a layer puts them there.
    """

    def __init__(self, base: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]):
        self._base = base
        self._layers = list(layers)
        self._batches = batches
        # States are [B, S, D] in every model, whatever a model with experts would make of padding.
        self._as_it_is = {"pack": False} if is_moe(getattr(base, "config", None)) else {}
        self._beside: tuple | None = (
            None  # what a layer returns beside hidden states; None: it returns them alone
        )
        self.states: list[Tensor | None] = [None] * len(batches)

    def run(self, index: int, number: int) -> Tensor:
        """Run layer `index` on batch `number`, whose states are those after layer `index` - 1.

        Returns:
            The layer's hidden states [B, S, D].
        """
        state = self.states[number]
        made: list[Tensor] = []

        def turn(place: int) -> Callable[..., Any]:
            compute = self._layers[place].forward

            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if place == index:
                    output = compute(hidden_states, *args, **kwargs)
                    hidden_states = output if isinstance(output, Tensor) else output[0]
                    made.append(hidden_states)
                    self._remember(output)
                elif place == index - 1:
                    assert state is not None
                    hidden_states = state
                return hidden_states if self._beside is None else (hidden_states, *self._beside)

            return forward

        with ExitStack() as replaced:
            for place, layer in enumerate(self._layers):
                replaced.enter_context(forward_replaced(layer, turn(place)))
            self._base(**self._batches[number], **self._as_it_is)
        (output,) = made
        return output

    def _remember(self, output: Any) -> None:
        # The layers of an encoder return alike; of what is not hidden states, nothing is read here.
        if not isinstance(output, Tensor):
            self._beside = tuple(part if isinstance(part, tuple) else None for part in output[1:])


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else when it is called; its hooks and its place are as before."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Have models in evaluation mode, and no gradients; afterwards they are in the modes they were in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
