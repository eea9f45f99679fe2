"""Self-attention on rows: projections on [N, D], the padded form only between queries and context.

The scale is folded into the queries' weights, and queries, keys and values are one product.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moebert_kernels.export.rows import Grid, Layout
from moebert_kernels.models.families import Family


class Parts(NamedTuple):
    """Where a layer keeps the parts of its attention half: paths, as `get_submodule` takes them."""

    query: str
    key: str
    value: str
    output: str
    norm: str


_BERT = Parts(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    norm="attention.output.LayerNorm",
)
_PARTS = {
    "MPNet": Parts(
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        output="attention.attn.o",
        norm="attention.LayerNorm",
    ),
    "DebertaV2": _BERT._replace(
        query="attention.self.query_proj", key="attention.self.key_proj", value="attention.self.value_proj"
    ),
    "DistilBert": Parts(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        norm="sa_layer_norm",
    ),
}


class Linear(nn.Module):
    """`x @ weight + bias` with the weight as it is multiplied by, [in, out]: a runtime keeps it as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().t().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x_ND: Tensor) -> Tensor:
        """Apply to rows."""
        y = torch.matmul(x_ND, self.weight)
        return y if self.bias is None else y + self.bias


class Batch(NamedTuple):
    """What the attention of all layers shares.

    Attributes:
        grid: its sizes.
        block_TH: see `Grid.context_blocks`.
        mask_B11S: 0 at real tokens and a very negative number at padding, added to scores.
        relative: what `RelativePositions` gives, for families that have them.
    """

    grid: Grid
    block_TH: Tensor
    mask_B11S: Tensor
    relative: tuple[Tensor, ...]


class Attention(nn.Module):
    """The attention half of a layer, its LayerNorm included.

    Args:
        layer: of the family, dense or with experts.
        family: the layer's.
        config: its configuration.
    """

    def __init__(self, layer: nn.Module, family: Family, config: Any):
        super().__init__()
        paths = _PARTS.get(family.name, _BERT)
        query, key, value, output, norm = (cast(Any, layer.get_submodule(path)) for path in paths)
        self.num_heads = config.num_attention_heads
        self.head_size = query.out_features // self.num_heads
        scale = (self.head_size * num_scores(config)) ** -0.5
        self.qkv = Linear(
            torch.cat([query.weight * scale, key.weight, value.weight]),
            torch.cat([query.bias * scale, key.bias, value.bias]),
        )
        self.output = Linear(output.weight, output.bias)
        self.norm = copy.deepcopy(norm)

    def forward(self, x_ND: Tensor, before: Layout, after: Layout, batch: Batch) -> Tensor:
        """Apply to rows in the order `before`; the result is in the order `after`."""
        (B, S, H), d = batch.grid, self.head_size
        blocks = self.qkv(x_ND).view(-1, d)
        assert before.heads is not None
        q_BHSd, k_BHSd, v_BHSd = (blocks.index_select(0, of_P).view(B, H, S, d) for of_P in before.heads)
        scores_BHSS = torch.matmul(q_BHSd, k_BHSd.transpose(2, 3)) + batch.mask_B11S
        bias = self.bias(q_BHSd, k_BHSd, batch)
        if bias is not None:
            scores_BHSS = scores_BHSS + bias
        context = torch.matmul(scores_BHSS.softmax(-1), v_BHSd).view(-1, d)
        block_NH = batch.block_TH.index_select(0, after.place_N)
        context_ND = nn.functional.embedding(block_NH, context).flatten(1)
        return self.norm(self.output(context_ND) + before.ordered_as(after, x_ND))

    def bias(self, q_BHSd: Tensor, k_BHSd: Tensor, batch: Batch) -> Tensor | None:
        """What is added to the scores beside the mask."""
        return batch.relative[0] if batch.relative else None


class DisentangledAttention(Attention):
    """DeBERTa's: scores of content with position, and of position with content, are added."""

    def __init__(self, layer: nn.Module, family: Family, config: Any, rel_embeddings: Tensor):
        super().__init__(layer, family, config)
        own: Any = layer.get_submodule("attention.self")
        scale = (self.head_size * num_scores(config)) ** -0.5
        kinds = config.pos_att_type
        # Queries are scaled already; the keys of "p2c" are not.
        self.key_Hdp = self._heads(own, "key", rel_embeddings) if "c2p" in kinds else None
        self.query_Hdp = self._heads(own, "query", rel_embeddings, scale) if "p2c" in kinds else None

    def _heads(self, own: Any, name: str, rel_embeddings: Tensor, scale: float = 1.0) -> nn.Parameter:
        project = getattr(own, f"{name}_proj" if own.share_att_key else f"pos_{name}_proj")
        rows = project(rel_embeddings).detach() * scale
        return nn.Parameter(rows.view(-1, self.num_heads, self.head_size).permute(1, 2, 0).contiguous())

    def bias(self, q_BHSd: Tensor, k_BHSd: Tensor, batch: Batch) -> Tensor | None:
        """See `Attention`."""
        bias = None
        c2p_SS, p2c_SS = batch.relative
        B, S, _ = batch.grid
        if self.key_Hdp is not None:
            scores = torch.matmul(q_BHSd, self.key_Hdp)
            bias = scores.gather(3, c2p_SS.expand(B, self.num_heads, S, S))
        if self.query_Hdp is not None:
            scores = torch.matmul(k_BHSd, self.query_Hdp)
            of_keys = scores.gather(3, p2c_SS.expand(B, self.num_heads, S, S)).transpose(2, 3)
            bias = of_keys if bias is None else bias + of_keys
        return bias


def num_scores(config: Any) -> int:
    """How many scores are added, by whose number their scale shrinks."""
    kinds = getattr(config, "pos_att_type", None) or []
    return 1 + ("c2p" in kinds) + ("p2c" in kinds)
