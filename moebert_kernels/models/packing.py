"""Encoders on packed rows: what a base model is called with in the place of a padded batch, and its results.

A family's own code computes [1, N, D]: to all but attention it is one long sequence, and attention knows by
the `Pack` which rows belong together. Positions are given, since rows no longer say them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_tracing

from moebert_kernels.models.config import is_moe
from moebert_kernels.models.families import FAMILIES, Family, find_base
from moebert_kernels.models.pack import Pack, pack_if_worthwhile
from moebert_kernels.models.packed_attention import PACKED_SDPA, attention_arguments, can_attend_to_rows

_PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "task_type_ids", "position_ids")
# The base models that some `packed` is for, how many are, in all threads, and what ends it.
_entered: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()
_entering = Lock()


def why_not_packed(model: nn.Module) -> str | None:
    """Why batches of an encoder, dense or with experts, cannot be packed; None if they can."""
    try:
        base, family = _base_of(model)
    except ValueError as error:
        return str(error)
    implementation = base.config._attn_implementation
    if not family.attends_by_interface:
        return f"the attention of {family.name} is its own and cannot be given rows"
    if not can_attend_to_rows(implementation):
        return f"attn_implementation={implementation!r} cannot be given rows; 'sdpa' can"
    return None


def drops_weights(config: Any) -> bool:
    """Whether the attention of a model of this configuration has dropout, in training."""
    names = ("attention_probs_dropout_prob", "attention_dropout")  # the latter in DistilBERT
    return any(getattr(config, name, 0.0) > 0 for name in names)


def packed_families() -> tuple[list[str], list[str]]:
    """The families whose encoders compute real tokens alone, and those that compute padding."""
    packs, pads = (
        [family.name for family in FAMILIES if family.attends_by_interface is by_interface]
        for by_interface in (True, False)
    )
    return packs, pads


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Have a dense encoder compute real tokens alone, as models with experts do by themselves.

    It is called as before, with padded batches, and gives what it gave, but for hidden states at padding:
    they are 0. `pack=` is taken, too. A model with experts is left as it is.

    Args:
        model: a dense base model of one of our families or any head on one.

    Example:
        >>> with packed(teacher):
        ...     logits = teacher(**tokenizer(texts, padding=True, return_tensors="pt")).logits

    Raises:
        ValueError: its batches cannot be packed; it says why not.
    """
    reason = why_not_packed(model)
    if reason is not None:
        raise ValueError(f"batches of {type(model).__name__} cannot be packed: {reason}")
    base, family = _base_of(model)
    if is_moe(base.config):
        yield
        return
    with _entering:
        users, hooked = _entered.get(base) or (0, _hooked(base, family))
        _entered[base] = users + 1, hooked
    try:
        yield
    finally:
        with _entering:
            users, hooked = _entered.pop(base)
            if users > 1:
                _entered[base] = users - 1, hooked
            else:
                hooked.close()


def _hooked(base: PreTrainedModel, family: Family) -> ExitStack:
    """Have a base model called with rows until that is closed."""
    names = argument_names(family)

    def before(base: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        pack = given.pop("pack", None)
        if not given.get("return_dict", base.config.return_dict):
            return (), given
        return (), to_rows(base, family, given, pack)

    def after(base: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        pack = kwargs.get("pack")
        return output if pack is None else to_padded(base, output, pack)

    hooked = ExitStack()
    hooked.callback(setattr, base.config, "_attn_implementation", base.config._attn_implementation)
    for hook in (
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True),
    ):
        hooked.callback(hook.remove)
    return hooked


def argument_names(family: Family) -> tuple[str, ...]:
    """What a base model's forward takes, in order."""
    return tuple(inspect.signature(family.model.forward).parameters)[1:]


def to_rows(
    base: PreTrainedModel,
    family: Family,
    given: dict[str, Any],
    pack: Pack | Literal[False] | None,
    read_BS: Tensor | None = None,
) -> dict[str, Any]:
    """What to call a base model with in the place of `given`: with rows and a "pack", or much as it was.

    Args:
        base: with that code of its family that is called.
        family: its.
        given: arguments by name.
        pack: of this batch; None to decide by its mask, False for no packing.
        read_BS: bool, places that are read though they may be padding.

    Raises:
        TypeError: `pack` is something else.
        ValueError: `pack` is of a batch of another shape, or cannot be used with this model or call.
    """
    if pack is False:
        return given
    if pack is None:
        if not _may_pack(base, family, given):
            return given
        dropout = base.training and drops_weights(base.config)
        pack, full = pack_if_worthwhile(given["attention_mask"], read_BS, dropout=dropout)
        if full:
            return {**given, "attention_mask": None}
        if pack is None:
            return given
    else:
        _check_pack(base, given, pack)
    config = base.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = PACKED_SDPA  # which is the same for whatever is not packed
    rows: dict[str, Any] = {**given, "attention_mask": None, "return_dict": True}
    rows["position_ids"] = _positions(base, family, given, pack)
    for name in _PER_TOKEN:
        if rows.get(name) is not None:
            rows[name] = pack.rows(rows[name]).unsqueeze(0)
    return rows | attention_arguments(pack, str(config._attn_implementation))


def to_padded(base: PreTrainedModel, output: Any, pack: Pack) -> Any:
    """A base model's output on rows as its output on the padded batch; 0 at padding."""
    rows_1ND = output.last_hidden_state
    last_BSD = pack.padded(rows_1ND.squeeze(0))

    def converted(state_1ND: Tensor | None) -> Tensor | None:
        if state_1ND is None:  # of a layer that was not asked for
            return None
        if pack.keep_rows:
            return state_1ND.squeeze(0)
        return last_BSD if state_1ND is rows_1ND else pack.padded(state_1ND.squeeze(0))

    padded = {**output, "last_hidden_state": last_BSD}
    if output.get("hidden_states") is not None:
        padded["hidden_states"] = tuple(converted(state_1ND) for state_1ND in output.hidden_states)
    pooler: Any = getattr(base, "pooler", None)
    if pooler is not None:
        padded["pooler_output"] = pooler(last_BSD)
    return type(output)(**padded)  # anew: heads go by the order of what there is


def _base_of(model: nn.Module) -> tuple[PreTrainedModel, Family]:
    for module in model.modules():
        family = getattr(type(module), "family", None)
        if isinstance(family, Family):  # with experts
            return cast(PreTrainedModel, module).base_model, family  # type: ignore[return-value]
    return find_base(model)


def _may_pack(base: PreTrainedModel, family: Family, given: Mapping[str, Any]) -> bool:
    """Whether a call can be packed at all, going by all but the values of its mask."""
    mask = given.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.is_meta or is_tracing(mask):
        return False
    if not family.attends_by_interface or not can_attend_to_rows(base.config._attn_implementation):
        return False
    if given.get("output_attentions", base.config.output_attentions):
        return False
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    # Too long a batch fails by its shape, not by an index that may stop the device.
    return (
        tokens is not None
        and tokens.shape[:2] == mask.shape
        and tokens.device == mask.device
        and mask.shape[1] <= base.config.max_position_embeddings
    )


def _check_pack(base: PreTrainedModel, given: Mapping[str, Any], pack: object) -> None:
    if not isinstance(pack, Pack):
        raise TypeError(f"pack must be a Pack, False or None, got {type(pack).__name__}")
    reason = why_not_packed(base)
    if reason is None and given.get("output_attentions", base.config.output_attentions):
        reason = "attentions are of the padded form alone"
    if reason is not None:
        raise ValueError(f"pack cannot be used: {reason}")
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens is not None and tuple(tokens.shape[:2]) != (pack.batch_size, pack.length):
        raise ValueError(
            f"pack is of a batch of shape {(pack.batch_size, pack.length)}, "
            f"got tokens of shape {tuple(tokens.shape[:2])}"
        )


def _positions(base: Any, family: Family, given: Mapping[str, Any], pack: Pack) -> Tensor:
    """Position ids [B, S] of a batch, or those of its rows' sequences."""
    shape = (pack.batch_size, pack.length)
    if given.get("position_ids") is not None:
        return given["position_ids"].expand(shape)
    if not family.skips_positions:
        return torch.arange(pack.length, device=pack.place_N.device).expand(shape)
    own = base.embeddings
    if given.get("input_ids") is not None:
        return own.create_position_ids_from_input_ids(given["input_ids"], own.padding_idx)
    return own.create_position_ids_from_inputs_embeds(given["inputs_embeds"], own.padding_idx)
