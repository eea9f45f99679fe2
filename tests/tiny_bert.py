"""A BERT small enough to build in a blink, with weights large enough that no layer is near the identity."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig

VOCAB, LAYERS, HIDDEN, WIDTH = 100, 3, 32, 64


def bert_config(**changes) -> BertConfig:
    return BertConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": WIDTH,
            "max_position_embeddings": 40,
            **changes,
        }
    )


def build(model_class, seed: int = 0, **changes):
    """A dense model in eval mode: weights of deviation 0.3, biases and norms away from 0 and 1."""
    model = model_class(bert_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1)
        model.tie_weights()
    return model


def all_neurons(num_experts: int = 4, num_layers: int = LAYERS) -> Tensor:
    """index_LEF by which every expert is the whole dense network."""
    return torch.arange(WIDTH).expand(num_layers, num_experts, WIDTH)


def quarters(num_layers: int = LAYERS) -> Tensor:
    """index_LEF by which the dense network is dealt out to 4 experts with nothing in common."""
    return torch.arange(WIDTH).view(4, WIDTH // 4).expand(num_layers, 4, WIDTH // 4)


def batch(batch_size: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids; the second sentence ends four tokens early."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCAB, (batch_size, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -4:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}
