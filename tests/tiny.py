"""Encoders and tokenizers small enough to build in a blink: what the tests run on.

`build` and `build_family` give weights so large that no layer is near the identity; `initialised` gives those
that transformers starts training from.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertTokenizerFast, PreTrainedModel

from moebert_kernels import hash_random_tables
from moebert_kernels.models import FAMILIES, families, to_moe
from moebert_kernels.models.families import Family

VOCAB, LAYERS, HIDDEN, WIDTH = 100, 3, 32, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": WIDTH,
    "max_position_embeddings": 40,
}
# For whole runs of commands.
SMALLER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"w{i}" for i in range(VOCAB - len(SPECIAL_TOKENS)))

SHARED, OWN = 6, 3  # neurons of an expert in `some_shared`

HEADS = (None, *families.HEADS)
FAMILY = {family.name: family for family in FAMILIES}
each_family = list(FAMILY)
PADDING = 1  # of the families' models, as most of them have it
_FAMILY_CHANGES = {
    "DistilBert": {"hidden_dim": WIDTH},
    "Electra": {"embedding_size": 16},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
}


def bert_config(**changes) -> BertConfig:
    return BertConfig(**{**SIZES, **changes})


def initialised(model_class: type[PreTrainedModel], seed: int = 0, **changes) -> PreTrainedModel:
    """A dense BERT in training mode."""
    torch.manual_seed(seed)
    return model_class(bert_config(**changes))


def build(model_class: type[PreTrainedModel], seed: int = 0, **changes) -> PreTrainedModel:
    """A dense BERT in eval mode."""
    return _far_from_identity(initialised(model_class, seed, **{"initializer_range": 0.3, **changes}))


def class_of(family: Family, head: str | None) -> type[PreTrainedModel]:
    """The dense class with that head, "ForMaskedLM" for example; None for the base model."""
    return family.model if head is None else next(c for c in family.heads if c.__name__.endswith(head))


def auto_class(head: str | None) -> type:
    """Of transformers, for models with that head."""
    return getattr(transformers, f"AutoModel{head or ''}")


def build_family(name: str, head: str | None = None, seed: int = 0, **changes) -> PreTrainedModel:
    """A dense model of the family in eval mode."""
    family = FAMILY[name]
    sizes = {**SIZES, "initializer_range": 0.3, "pad_token_id": PADDING, **_FAMILY_CHANGES.get(name, {})}
    torch.manual_seed(seed)
    return _far_from_identity(class_of(family, head)(family.config(**{**sizes, **changes})))


@torch.no_grad()
def _far_from_identity(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms, away from 0 and 1
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def tokenizer(folder: Path, words=WORDS, special_tokens=SPECIAL_TOKENS, **options) -> BertTokenizerFast:
    """One token for each of the words, which are kept in words.txt, after the special ones."""
    path = folder / "words.txt"
    path.write_text("\n".join([*special_tokens, *words]), encoding="utf-8")
    return BertTokenizerFast(str(path), **options)


def all_neurons(num_experts: int = 4, num_layers: int = LAYERS) -> Tensor:
    """index_LEF by which every expert is the whole dense network."""
    return torch.arange(WIDTH).expand(num_layers, num_experts, WIDTH)


def quarters(num_layers: int = LAYERS) -> Tensor:
    """index_LEF by which the dense network is dealt out to 4 experts with nothing in common."""
    return torch.arange(WIDTH).view(4, WIDTH // 4).expand(num_layers, 4, WIDTH // 4)


def tables(routing: str, num_layers: int = LAYERS) -> Tensor | None:
    """tables_LV for 4 experts, where that routing has to be given them."""
    given = routing in ("hash-balance", "hash-affinity")
    return hash_random_tables(num_layers, VOCAB, 4, seed=7) if given else None


def quartered(dense: PreTrainedModel, routing: str = "hash-random", **options) -> PreTrainedModel:
    """A model like it whose 4 experts have a quarter of the neurons each."""
    num_layers = dense.config.num_hidden_layers
    options = {"num_shared_neurons": 0, "tables_LV": tables(routing, num_layers), **options}
    return to_moe(dense, quarters(num_layers), routing=routing, **options)


def some_shared(num_experts: int = 4, num_shared: int = SHARED, num_own: int = OWN) -> Tensor:
    """index_LEF with the shared neurons anywhere but at the front, and not in the same places."""
    own = num_shared + torch.arange(num_experts * num_own).view(num_experts, num_own)
    rows = [torch.cat([own_F, torch.arange(num_shared)]).roll(e) for e, own_F in enumerate(own)]
    return torch.stack(rows).expand(LAYERS, -1, -1)


def batch(batch_size: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids; the second sentence ends four tokens early."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCAB, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -4:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def labels_for(head: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model with that head, of two classes, is trained on beside a batch of those inputs."""
    input_ids = inputs["input_ids"]
    if head == "ForQuestionAnswering":
        start_B = torch.zeros_like(input_ids[:, 0])
        return {"start_positions": start_B, "end_positions": start_B + 2}
    if head == "ForSequenceClassification":
        return {"labels": torch.arange(len(input_ids)) % 2}
    return {"labels": torch.arange(input_ids.numel()).view_as(input_ids) % 2}


def gradients(model: PreTrainedModel, **inputs) -> dict[str, Tensor]:
    """Those of the loss it tells, by the names of parameters, and the loss itself; dropout by one seed."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(found, expected) -> None:
    """Tensors, or mappings or sequences of them with the same names or places, bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
