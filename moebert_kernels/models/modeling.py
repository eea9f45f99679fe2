"""The MoEBERT models: transformers' BERT with a `MoEFFN` for the second half of every layer.

How a token's routing travels: a hook on the base model hands `input_ids` and `attention_mask` on, the encoder
builds the plans of all layers from them, each layer gets its plan as an argument and returns its routing
decision beside the hidden states. Nothing is kept as state between calls or between layers, so that
recomputation under gradient checkpointing, threads and compiled graphs see the same plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLayer,
    BertModel,
    BertPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from moebert_kernels.layer import MoEFFN
from moebert_kernels.models.config import MoEBertConfig, expert_activation
from moebert_kernels.routing import (
    RouterOutput,
    RoutingPlan,
    SentenceGate,
    TokenGate,
    hash_balance_tables,
    hash_random_tables,
)


class MoEBertLayer(BertLayer):
    """Attention, then the experts. A `BertLayer` by type alone, which transformers' output capture goes by.

    Args:
        attention: self-attention with its residual and LayerNorm.
        ffn: the experts, with residual and LayerNorms; has a router if and only if routing is learned.
    """

    def __init__(self, attention: BertAttention, ffn: MoEFFN):
        super(BertLayer, self).__init__()  # BertLayer's own would build the dense network
        self.attention = attention
        self.ffn = ffn

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        plan: RoutingPlan | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, RoutingPlan, Tensor | None, Tensor | None]:
        """Apply to `hidden_states` [B, S, D].

        Args:
            hidden_states: the layer's input.
            attention_mask: as the attention implementation wants it.
            plan: where the tokens go; None asks the layer's router.
            token_mask: [B, S], nonzero at real tokens, for the router.
            kwargs: for the attention.

        Returns:
            The new hidden states and the three fields of the `RouterOutput`: side by side, because reentrant
            checkpointing carries gradients through the top level of a tuple only.
        """
        x_BSD, _ = self.attention(hidden_states, attention_mask, **kwargs)
        routing = self.ffn.route(x_BSD, mask=token_mask) if plan is None else RouterOutput(plan, None, None)
        return self.ffn(x_BSD, routing=routing), *routing


class MoEBertEncoder(nn.Module):
    """The layers and, under hash routing, the tables they share.

    Args:
        layers: in order.
        tables_LV: int32, the expert of every token id for each layer; None if routing is learned.
    """

    tables_LV: Tensor | None

    def __init__(self, layers: Sequence[MoEBertLayer], tables_LV: Tensor | None):
        super().__init__()
        self.num_experts = layers[0].ffn.num_experts
        self.layer = nn.ModuleList(layers)
        self.register_buffer("tables_LV", tables_LV)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        routing_ids: Tensor | None = None,
        routing_mask: Tensor | None = None,
        router_outputs: list[RouterOutput] | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run all layers over the embeddings `hidden_states` [B, S, D].

        Args:
            hidden_states: the embeddings.
            attention_mask: as the attention implementation wants it.
            routing_ids: [B, S] token ids; needed under hash routing.
            routing_mask: [B, S], nonzero at real tokens; None if all are. The others skip the experts.
            router_outputs: each layer's `RouterOutput` is appended to it.
            position_ids: for the attention.
            kwargs: what `BertModel` hands to an encoder; a decoder's arguments among it are dropped.

        Raises:
            ValueError: there are no token ids to route by, or (on the CPU) one lies outside the tables.
        """
        for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache"):
            kwargs.pop(name, None)
        plans: Iterable[RoutingPlan | None] = [None] * len(self.layer)
        if self.tables_LV is not None:
            if routing_ids is None:
                raise ValueError(
                    "hash routing goes by token id: pass input_ids; inputs_embeds alone cannot be routed"
                )
            plans = RoutingPlan.from_input_ids(routing_ids, self.tables_LV, self.num_experts, routing_mask)
        for layer, plan in zip(self.layer, plans, strict=True):
            hidden_states, *routing = layer(
                hidden_states,
                attention_mask,
                plan=plan,
                token_mask=routing_mask,
                position_ids=position_ids,
                **kwargs,
            )
            if router_outputs is not None:
                router_outputs.append(RouterOutput(*routing))
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states  # type: ignore[arg-type]  # any floating tensor will do
        )


def hand_over_routing_inputs(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Forward pre-hook of a `BertModel` whose encoder is a `MoEBertEncoder`.

    BertModel passes to its encoder the keyword arguments it does not know, but not its `input_ids`, and an
    `attention_mask` that no longer tells one row from another: here both go along under other names. An
    attention mask that is not [B, S] says nothing about padding, and every token is routed.
    """
    given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
    mask = given.get("attention_mask")
    kwargs["routing_ids"] = given.get("input_ids")
    kwargs["routing_mask"] = mask if mask is not None and mask.dim() == 2 else None
    return args, kwargs


class MoEBertPreTrainedModel(BertPreTrainedModel):
    """What all MoEBERT models share: configuration class, initialisation, vocabulary changes."""

    config: MoEBertConfig
    config_class = MoEBertConfig
    _no_split_modules = ["BertEmbeddings", "MoEBertEncoder"]  # noqa: RUF012
    _skip_keys_device_placement = ["router_outputs"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEFFN):
            for weight in (module.w1_EFD, module.w2_EDF):
                init.normal_(weight, std=self.config.initializer_range)
            for bias in (module.b1_EF, module.b2_ED, module.ln_b_ED):
                if bias is not None:
                    init.zeros_(bias)
            if module.ln_w_ED is not None:
                init.ones_(module.ln_w_ED)
        elif isinstance(module, MoEBertEncoder) and module.tables_LV is not None:
            init.copy_(module.tables_LV, _tables_from_scratch(self.config))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; under hash routing, the tables change with the vocabulary.

        Ids that are new get random experts, by a seed made of `hash_seed` and the old vocabulary's size.
        """
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, MoEBertEncoder) and module.tables_LV is not None:
                module.tables_LV = _resized(module.tables_LV, embeddings.num_embeddings, self.config)
        return embeddings


def _tables_from_scratch(config: MoEBertConfig) -> Tensor:
    """The tables of a model that has none yet. With no corpus to balance by, ids are dealt out in turn."""
    num_layers, vocab_size = config.num_hidden_layers, config.vocab_size
    with torch.device("cpu"):
        if config.routing == "hash-balance":
            return hash_balance_tables(num_layers, torch.ones(vocab_size), config.num_experts)
        return hash_random_tables(num_layers, vocab_size, config.num_experts, seed=config.hash_seed)


def _resized(tables_LV: Tensor, vocab_size: int, config: MoEBertConfig) -> Tensor:
    num_layers, old_size = tables_LV.shape
    num_new = max(vocab_size - old_size, 0)
    new = hash_random_tables(num_layers, num_new, config.num_experts, seed=config.hash_seed + old_size)
    return torch.cat([tables_LV[:, :vocab_size], new.to(tables_LV.device)], dim=1)


def _new_layer(config: MoEBertConfig, index: int) -> MoEBertLayer:
    ffn = MoEFFN(
        config.hidden_size,
        config.expert_size,
        config.num_experts,
        router=new_router(config),
        activation=expert_activation(config.hidden_act),
        norm_eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
    )
    return MoEBertLayer(BertAttention(config, layer_idx=index), ffn)


def new_router(config: MoEBertConfig) -> nn.Module | None:
    """The gate of one layer; None under hash routing, where one table serves all layers."""
    if not config.is_gated:
        return None
    gate = TokenGate if config.routing == "gate-token" else SentenceGate
    return gate(config.hidden_size, config.num_experts, config.top_k)


class MoEBertModel(MoEBertPreTrainedModel, BertModel):
    """`BertModel` with experts.

    It is called as `BertModel` is, and takes one argument more: `router_outputs`, a list to which every layer
    appends its `RouterOutput`, in order. Tokens that a [B, S] `attention_mask` marks as padding use no
    expert.

    Example:
        >>> model = MoEBertModel(MoEBertConfig())
        >>> router_outputs = []
        >>> hidden = model(**tokenizer("Hello", return_tensors="pt"), router_outputs=router_outputs)[0]
        >>> router_outputs[0].plan.counts_E  # tokens of each expert in the first layer
    """

    encoder: MoEBertEncoder  # type: ignore[assignment]

    def __init__(self, config: MoEBertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        layers = [_new_layer(config, index) for index in range(config.num_hidden_layers)]
        tables_LV = None
        if not config.is_gated:
            tables_LV = torch.zeros(config.num_hidden_layers, config.vocab_size, dtype=torch.int32)
        self.encoder = MoEBertEncoder(layers, tables_LV)
        self.register_forward_pre_hook(hand_over_routing_inputs, with_kwargs=True)
        self.post_init()


def _with_balance_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A dense head's forward that takes `router_outputs` and adds the load-balance loss to its own."""

    @can_return_tuple
    @functools.wraps(forward)
    def forward_with_balance_loss(self, *args, router_outputs: list[RouterOutput] | None = None, **kwargs):
        ours: list[RouterOutput] = []
        output = forward(self, *args, router_outputs=ours, return_dict=True, **kwargs)
        balance = [routing.balance_loss for routing in ours if routing.balance_loss is not None]
        if balance and self.training and output.loss is not None:
            output.loss = output.loss + self.config.balance_loss_weight * torch.stack(balance).mean()
        if router_outputs is not None:
            router_outputs.extend(ours)
        return output

    return forward_with_balance_loss


class _MoEBertHead(MoEBertPreTrainedModel):
    """A BERT head over a `MoEBertModel`: the dense head is built first, then given its new body."""

    bert: BertModel
    accepts_loss_kwargs = False  # these losses are means over the batch: a Trainer averages its micro-batches

    def __init__(self, config: MoEBertConfig):
        super().__init__(config)
        self.bert = MoEBertModel(config, add_pooling_layer=self.bert.pooler is not None)
        self.post_init()


class MoEBertForSequenceClassification(_MoEBertHead, BertForSequenceClassification):
    """`BertForSequenceClassification` (also regression) with experts; see `MoEBertModel`.

    While a gate is trained and labels are given, `loss` includes `balance_loss_weight` times the mean of the
    layers' load-balance losses; so it does in the other heads.
    """

    forward = _with_balance_loss(BertForSequenceClassification.forward)


class MoEBertForTokenClassification(_MoEBertHead, BertForTokenClassification):
    """`BertForTokenClassification` with experts; see `MoEBertForSequenceClassification`."""

    forward = _with_balance_loss(BertForTokenClassification.forward)


class MoEBertForQuestionAnswering(_MoEBertHead, BertForQuestionAnswering):
    """`BertForQuestionAnswering` with experts; see `MoEBertForSequenceClassification`."""

    forward = _with_balance_loss(BertForQuestionAnswering.forward)


class MoEBertForMaskedLM(_MoEBertHead, BertForMaskedLM):
    """`BertForMaskedLM` with experts; see `MoEBertForSequenceClassification`."""

    forward = _with_balance_loss(BertForMaskedLM.forward)
