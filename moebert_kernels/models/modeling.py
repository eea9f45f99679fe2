"""The MoE encoders: each family's own code, with a `MoEFFN` for the second half of every layer.

How a token's routing travels: model, encoder and head call the forward that transformers gave them, but on
a view of themselves in which the child that needs to know more is called with more. A head's view asks its
base model for the routing decisions, the base model's hands `input_ids` and the mask to the encoder, and the
encoder, having built the plans of all layers, gives each layer its own as an argument. Nothing is kept as
state between calls or between layers, so that recomputation under gradient checkpointing, threads and
compiled graphs see the same plan; and nothing depends on which arguments a family passes on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs

from moebert_kernels.layer import FORMER_NAMES, MoEFFN
from moebert_kernels.models.config import IGNORED_LABEL, MoEConfig
from moebert_kernels.models.families import FAMILIES, HEADS, DenseFFN, Family, LayerShape, find_ffns
from moebert_kernels.models.pack import Pack
from moebert_kernels.models.packing import argument_names, to_padded, to_rows
from moebert_kernels.routing import (
    RouterOutput,
    RoutingPlan,
    SentenceGate,
    TokenGate,
    hash_balance_tables,
    hash_random_tables,
)

_AUTO_CLASSES = (  # of what `MoEClasses.models` holds, in its order
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMaskedLM,
)

_HEADS_OF_TOKENS = ("ForTokenClassification", "ForMaskedLM")

_FORMER_KEYS = {rf"\.ffn\.{former}$": f".ffn.{name}" for former, name in FORMER_NAMES.items()}


class _View:
    """A module as one call sees it: with other children, or called with more arguments. Changes nothing."""

    def __init__(
        self,
        module: nn.Module,
        children: dict[str, Any] | None = None,
        arguments: dict[str, Any] | None = None,
    ):
        self._module = module
        self._children = children or {}
        self._arguments = arguments or {}

    def __getattr__(self, name: str) -> Any:
        children = self.__dict__["_children"]
        return children[name] if name in children else getattr(self.__dict__["_module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs, **self._arguments)


class MoELayer(nn.Module):
    """Attention, then the experts; by type also its family's layer, as transformers' output capture wants.

    Attributes:
        ffn: the experts, with residual and LayerNorms; has a router if and only if routing is learned.
    """

    shape: ClassVar[LayerShape]
    ffn: MoEFFN

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        plan: RoutingPlan | None = None,
        token_mask: Tensor | None = None,
        pack: Pack | None = None,
        **kwargs: Any,
    ) -> tuple:
        """Apply to `hidden_states` [B, S, D], or to rows [1, N, D].

        Args:
            hidden_states: the layer's input.
            args: for the attention, as the family passes them.
            plan: where the tokens go; None asks the layer's router.
            token_mask: [B, S] or [1, N], nonzero at real tokens, for the router.
            pack: which rows belong together.
            kwargs: as args.

        Returns:
            The new hidden states, the three fields of the `RouterOutput` and what the family's layer returns
            beside hidden states, None if nothing: side by side, because reentrant checkpointing carries
            gradients through the top level of a tuple only.
        """
        if pack is not None:
            kwargs["pack"] = pack
        x_BSD, others = self.shape.attend(self, hidden_states, *args, **kwargs)
        if plan is not None:
            routing = RouterOutput(plan, None, None)
        elif pack is not None and isinstance(self.ffn.router, SentenceGate):
            sentence_N = pack.sentence_N()
            routing = self.ffn.router.route_rows(x_BSD.squeeze(0), sentence_N, pack.batch_size)
        else:
            routing = self.ffn.route(x_BSD, mask=token_mask)
        return self.ffn(x_BSD, routing=routing), *routing, others


class MoEEncoder(nn.Module):
    """The layers and, under hash routing, the tables they share; by type also its family's encoder.

    Attributes:
        layer: in order.
        tables_LV: int32, the expert of every token id for each layer; None if routing is learned.
    """

    dense: ClassVar[type[nn.Module]]
    layer: nn.ModuleList
    tables_LV: Tensor | None

    def forward(
        self,
        *args: Any,
        routing_ids: Tensor | None = None,
        routing_mask: Tensor | None = None,
        router_outputs: list[RouterOutput] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run all layers, called as the family's encoder is.

        Args:
            args: as the family passes them.
            routing_ids: [B, S] or [1, N] token ids; needed under hash routing.
            routing_mask: like them, nonzero at real tokens; None if all are. The others skip the experts.
            router_outputs: each layer's `RouterOutput` is appended to it.
            kwargs: as args.

        Raises:
            ValueError: there are no token ids to route by, or (on the CPU) one lies outside the tables.
        """
        plans: Iterable[RoutingPlan | None] = [None] * len(self.layer)
        if self.tables_LV is not None:
            if routing_ids is None:
                raise ValueError(
                    "hash routing goes by token id: pass input_ids; inputs_embeds alone cannot be routed"
                )
            num_experts = cast(MoELayer, self.layer[0]).ffn.num_experts
            plans = RoutingPlan.from_input_ids(routing_ids, self.tables_LV, num_experts, routing_mask)

        def routed(layer: nn.Module, plan: RoutingPlan | None) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                output = layer(*args, plan=plan, token_mask=routing_mask, **kwargs)
                hidden_states, *routing, others = output
                if router_outputs is not None:
                    router_outputs.append(RouterOutput(*routing))
                return hidden_states if others is None else (hidden_states, *others)

            return call

        layers = [routed(layer, plan) for layer, plan in zip(self.layer, plans, strict=True)]
        return self.dense.forward(_View(self, {"layer": layers}), *args, **kwargs)


class MoEPreTrainedModel(PreTrainedModel):
    """What all MoE models share: initialisation, vocabulary changes; by type also its family's model."""

    family: ClassVar[Family]
    _skip_keys_device_placement = ["router_outputs"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEFFN):
            for weight in (module.w1_EFD, module.w2_EDF, module.shared_w1_CD, module.shared_w2_DC):
                if weight is not None:
                    init.normal_(weight, std=self.config.initializer_range)
            of_norm, shared = module.layernorm_bias_ED, module.shared_bias1_C
            for bias in (module.bias1_EF, module.bias2_ED, of_norm, shared):
                if bias is not None:
                    init.zeros_(bias)
            if module.layernorm_weight_ED is not None:
                init.ones_(module.layernorm_weight_ED)
        elif isinstance(module, MoEEncoder) and module.tables_LV is not None:
            init.copy_(module.tables_LV, _tables_from_scratch(self.config))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but for what it would draw at random in silence.

        Parameters under names that they had once are found, too.

        Raises:
            ValueError: the checkpoint lacks experts or tables (a dense model's has none), or its tables name
                experts that there are not.
        """
        source = pretrained_model_name_or_path
        loaded: Any = super().from_pretrained(
            source,
            *args,
            output_loading_info=True,
            key_mapping=_FORMER_KEYS | (key_mapping or {}),
            **kwargs,
        )
        model, found = loaded
        seeded = model.config.routing == "hash-random"  # its tables are drawn again as they were at first
        lacking = sorted(
            name
            for name in found["missing_keys"]
            if ".ffn." in name or (name.endswith("tables_LV") and not seeded)
        )
        if lacking:
            raise ValueError(
                f"{source} has no {lacking[0]} ({len(lacking)} such tensors are missing): it is not a whole "
                f"{cls.__name__}; to_moe makes one of a dense model"
            )
        for name, buffer in model.named_buffers():
            if name.endswith("tables_LV") and buffer.device.type != "meta":
                low, high = (int(v) for v in buffer.aminmax())
                if low < 0 or high >= model.config.num_experts:
                    raise ValueError(
                        f"{source}: {name} must name experts in [0, {model.config.num_experts}), found {low} "
                        f"to {high}"
                    )
        return (model, found) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but parameters get today's names, whichever they were loaded by."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; under hash routing, the tables change with the vocabulary.

        Ids that are new get random experts, by a seed made of `hash_seed` and the old vocabulary's size.
        """
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, MoEEncoder) and module.tables_LV is not None:
                module.tables_LV = _resized(module.tables_LV, embeddings.num_embeddings, self.config)
        return embeddings


class MoEModel(MoEPreTrainedModel):
    """A family's base model with experts.

    It is called as the family's is, and takes two arguments more: `router_outputs`, a list to which every
    layer appends its `RouterOutput`, in order, and `pack`. Tokens that a [B, S] `attention_mask` marks as
    padding use no expert.

    Nor are they computed at all where the family's attention allows it: real tokens are packed, and hidden
    states are 0 at padding. That is decided for each batch; a batch whose sequences do not all begin with a
    real token, and any call in a graph that is compiled or captured, is computed as it is. `pack` decides it
    otherwise: False packs nothing, a `Pack` of the batch's mask packs by it, in compiled and captured graphs
    too.

    Example:
        >>> model = MoEBertModel(MoEBertConfig())
        >>> router_outputs = []
        >>> hidden = model(**tokenizer("Hello", return_tensors="pt"), router_outputs=router_outputs)[0]
        >>> router_outputs[0].plan.counts_E  # tokens of each expert in the first layer
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        put_in_new_experts(self, self)
        self.post_init()


class MoEHead(MoEPreTrainedModel):
    """A family's head over its base model with experts.

    It is called as the family's is, and takes `router_outputs` as `MoEModel` does. While a gate is trained
    and labels are given, `loss` includes `balance_loss_weight` times the mean of the layers' load-balance
    losses.
    """

    accepts_loss_kwargs = False  # these losses are means over the batch: a Trainer averages its micro-batches

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        put_in_new_experts(self, cast(PreTrainedModel, self.base_model))
        self.post_init()


def _model_forward(family: Family) -> Callable[..., Any]:
    """The family's base model's forward, which hands its encoder what routing needs.

    transformers' decorators go around ours: they need the model itself, where the family's code sees a view.
    """
    dense = inspect.unwrap(family.model.forward)
    names = argument_names(family)
    always = {"return_dict": True} if "return_dict" in names else {}

    @capture_outputs
    def compute(self, router_outputs: list[RouterOutput] | None, **given):
        pack, mask = given.get("pack"), given.get("attention_mask")
        if pack is not None:
            routing_mask = None if pack.real_N is None else pack.real_N.unsqueeze(0)
        else:
            # A mask that is not [B, S] says nothing about padding: every token is routed.
            routing_mask = mask != 0 if mask is not None and mask.dim() == 2 else None
        arguments = {
            "routing_ids": given.get("input_ids"),
            "routing_mask": routing_mask,
            "router_outputs": router_outputs,
        }
        children: dict[str, Any] = {
            family.encoder_name: _View(getattr(self, family.encoder_name), arguments=arguments)
        }
        if pack is not None:
            children["pooler"] = None  # it reads of sequences, and is asked when they are padded again
        return dense(_View(self, children), **given, **always)

    @merge_with_config_defaults
    @functools.wraps(family.model.forward)
    def forward(
        self,
        *args,
        router_outputs: list[RouterOutput] | None = None,
        pack: Pack | Literal[False] | None = None,
        read_BS: Tensor | None = None,
        **kwargs,
    ):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("input_ids") is not None:
            _check_in_vocabulary(given["input_ids"], self.config.vocab_size)
        as_tuple = not given.get("return_dict", self.config.return_dict)
        given = to_rows(self, family, given, pack, read_BS)
        pack = given.get("pack")
        if pack is None:
            return compute(self, router_outputs, **given)
        ours: list[RouterOutput] = []
        output = to_padded(self, compute(self, ours, **given), pack)
        if router_outputs is not None:
            router_outputs += ours if pack.keep_rows else [_at_places(routing, pack) for routing in ours]
        return output.to_tuple() if as_tuple else output

    return forward


def _at_places(routing: RouterOutput, pack: Pack) -> RouterOutput:
    """What was decided for rows, for the tokens of the padded batch; padding has no expert."""
    plan, gate_NK, balance_loss = routing
    expert_ids_BSK = pack.padded(plan.expert_ids_TK, fill=-1)
    gate_TK = None if gate_NK is None else pack.padded(gate_NK).flatten(0, 1)
    plan = RoutingPlan.from_expert_ids(expert_ids_BSK.flatten(0, 1), plan.num_experts)
    return RouterOutput(plan, gate_TK, balance_loss)


def _check_in_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    """Say of a foreign tokenizer's ids, on the CPU, what the embedding would call "index out of range"."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
        return
    low, high = (int(v) for v in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids must lie in [0, {vocab_size}), the model's vocabulary and that of its routing "
            f"tables, found values from {low} to {high}: tokenize with the model's own tokenizer"
        )


def _head_forward(family: Family, dense_head: type[PreTrainedModel]) -> Callable[..., Any]:
    """The dense head's forward, which takes `router_outputs` and adds the load-balance loss to its own."""

    names = list(inspect.signature(dense_head.forward).parameters)[1:]

    @can_return_tuple
    @functools.wraps(dense_head.forward)
    def forward(
        self,
        *args,
        router_outputs: list[RouterOutput] | None = None,
        pack: Pack | Literal[False] | None = None,
        **kwargs,
    ):
        ours: list[RouterOutput] = []
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if pack is None and given.get("start_positions") is not None:
            pack = False  # its loss is over all places, padding among them
        arguments = {"router_outputs": ours, "pack": pack}
        labels = given.get("labels")
        if labels is not None and dense_head.__name__.endswith(_HEADS_OF_TOKENS):
            arguments["read_BS"] = labels != IGNORED_LABEL
        base = _View(self.base_model, arguments=arguments)
        view = _View(self, {family.base_name: base})
        output = dense_head.forward(view, *args, return_dict=True, **kwargs)
        balance = [routing.balance_loss for routing in ours if routing.balance_loss is not None]
        if balance and self.training and output.loss is not None:
            output.loss = output.loss + self.config.balance_loss_weight * torch.stack(balance).mean()
        if router_outputs is not None:
            router_outputs.extend(ours)
        return output

    return forward


class MoEClasses(NamedTuple):
    """What a family's classes become; `models` has an entry for the base model and each head."""

    config: type[PreTrainedConfig]
    models: dict[type[PreTrainedModel], type[MoEPreTrainedModel]]
    encoder: type[MoEEncoder]
    layer: type[MoELayer]

    def named(self) -> dict[str, type]:
        """All of them by name."""
        return {cls.__name__: cls for cls in (self.config, *self.models.values(), self.encoder, self.layer)}


def _declare(family: Family) -> MoEClasses:
    """Make `MoE<Family>Config`, `MoE<Family>Model`, its heads and what they are built of."""

    def subclass(name: str, *bases: type, **body: Any) -> Any:
        return type(name, bases, {"__module__": __name__, "__doc__": bases[0].__doc__, **body})

    config = strict(subclass(f"MoE{family.name}Config", MoEConfig, family.config, model_type=family.moe_type))
    encoder = subclass(f"MoE{family.encoder_class}", MoEEncoder, family.encoder, dense=family.encoder)
    layer = subclass(f"MoE{family.layer_class}", MoELayer, family.layer, shape=family.shape)
    shared = {
        "family": family,
        "config_class": config,
        "_no_split_modules": [f"{family.name}Embeddings", "Embeddings", encoder.__name__],
    }
    models = {
        family.model: subclass(
            f"MoE{family.name}Model", MoEModel, family.model, forward=_model_forward(family), **shared
        )
    }
    for suffix, head in zip(HEADS, family.heads, strict=True):
        forward = _head_forward(family, head)
        models[head] = subclass(f"MoE{family.name}{suffix}", MoEHead, head, forward=forward, **shared)
    return MoEClasses(config, models, encoder, layer)


@functools.cache
def moe_classes(family: Family) -> MoEClasses:
    """A family's classes with experts; made when first asked for, and known to the Auto classes then."""
    classes = _declare(family)
    AutoConfig.register(family.moe_type, classes.config, exist_ok=True)
    AutoTokenizer.register(classes.config, tokenizer_class=TOKENIZER_MAPPING[family.config], exist_ok=True)
    for auto, model in zip(_AUTO_CLASSES, classes.models.values(), strict=True):
        auto.register(classes.config, model, exist_ok=True)
    return classes


def __getattr__(name: str) -> type:
    """Any of the families' classes by name; pickle finds them so, too."""
    for family in FAMILIES:
        if name in family.moe_names:
            return moe_classes(family).named()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def put_in_new_experts(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Give a MoE model that was built dense its experts, with weights and tables still to be initialised."""
    config = model.config
    ffns = [new_experts(dense, config) for dense in find_ffns(base)]
    tables_LV = None
    if not config.is_gated:
        tables_LV = torch.zeros(len(ffns), config.vocab_size, dtype=torch.int32)
    family = cast(MoEPreTrainedModel, model).family
    become_moe(base, family, ffns, tables_LV)
    getattr(base, family.encoder_name)._is_hf_initialized = False  # its tables are not


def new_experts(dense: DenseFFN, config: Any) -> MoEFFN:
    """Experts to put in the place of `dense`, with no weights of it."""
    router = None  # under hash routing, where one table serves all layers
    if config.is_gated:
        gate = TokenGate if config.routing == "gate-token" else SentenceGate
        router = gate(dense.w1.in_features, config.num_experts, config.top_k)
    return MoEFFN(
        dense.w1.in_features,
        config.expert_size,
        config.num_experts,
        num_shared=config.num_tied_neurons,
        router=router,
        activation=dense.activation,
        norm_eps=dense.norm.eps,
        dropout=dense.dropout,
    )


def become_moe(
    base: PreTrainedModel, family: Family, ffns: Sequence[MoEFFN], tables_LV: Tensor | None
) -> None:
    """Turn a dense base model into its MoE class, in place, with `ffns` in its layers.

    Layers, encoder and model keep their hooks, their checkpointing and their place, because it is their class
    that changes, as torch.nn.utils.parametrize does it: transformers installs the hooks that capture hidden
    states once, and a new layer would not have them.
    """
    classes = moe_classes(family)
    encoder = getattr(base, family.encoder_name)
    for layer, ffn in zip(encoder.layer, ffns, strict=True):
        for name in family.shape.replaced:
            delattr(layer, name)
        layer.__class__ = classes.layer
        layer.ffn = ffn.train(layer.training)
    encoder.__class__ = classes.encoder
    encoder.register_buffer("tables_LV", tables_LV)
    set_class(base, classes.models[family.model])


def set_class(model: PreTrainedModel, moe_class: type[MoEPreTrainedModel]) -> None:
    """Change a model's class, in place."""
    model.__class__ = moe_class
    # What PreTrainedModel.__init__ does for the classes of models that are built. The key is a class's name,
    # also where the registry's own __setitem__ takes a model, as newer versions of transformers have it.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(moe_class), moe_class._can_record_outputs)


def _tables_from_scratch(config: Any) -> Tensor:
    """The tables of a model that has none yet. With no corpus to balance by, ids are dealt out in turn."""
    num_layers, vocab_size = config.num_hidden_layers, config.vocab_size
    if config.routing == "hash-balance":
        counts_V = torch.ones(vocab_size, device="cpu")
        return hash_balance_tables(num_layers, counts_V, config.num_experts)
    return hash_random_tables(num_layers, vocab_size, config.num_experts, seed=config.hash_seed)


def _resized(tables_LV: Tensor, vocab_size: int, config: Any) -> Tensor:
    num_layers, old_size = tables_LV.shape
    num_new = max(vocab_size - old_size, 0)
    new = hash_random_tables(num_layers, num_new, config.num_experts, seed=config.hash_seed + old_size)
    return torch.cat([tables_LV[:, :vocab_size], new.to(tables_LV.device)], dim=1)
