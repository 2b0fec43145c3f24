"""Masked decoder: queries that look where their own mask was, and answer with a class and a mask each.

In: maps of the pixel decoder.  Out: class logits and mask logits per query, after every layer.
Method: Mask2Former, arXiv 2112.01527, section 3.2. Parameter names are those of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from detectron2.layers import Conv2d
from seg_app.models.pixel_decoder import NUM_QUERY_MAPS
from seg_app.models.position import sine_positions
from seg_app.models.query_masks import QueryMasks
from seg_app.models.transformer_layers import MLP, CrossAttentionLayer, FeedForwardLayer, SelfAttentionLayer


class MaskedTransformerDecoder(nn.Module):
    """M layers of masked cross-attention, self-attention, feed-forward; layer i looks at map i modulo 3.

    Args:
        in_channels: of the maps.
        num_classes: K, without "no object".
        num_queries: Q.
        mask_dim: channels of the map for the masks.
        dec_layers: M; predictions are made before the first and after each, so M + 1 times.
        hidden_dim: width of the queries.
        nheads, dim_feedforward: of the layers.
        pre_norm: LayerNorm before instead of after each step.
        enforce_input_project: a 1x1 convolution on the maps even where their width is hidden_dim.
    """

    _version = 2  # of the parameter names, as in the public checkpoints; 1 had static_query for query_feat

    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        num_queries: int,
        mask_dim: int,
        dec_layers: int,
        hidden_dim: int,
        nheads: int,
        dim_feedforward: int,
        pre_norm: bool = False,
        enforce_input_project: bool = False,
    ) -> None:
        super().__init__()
        layers = range(dec_layers)
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads, pre_norm) for _ in layers
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads, pre_norm) for _ in layers
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(hidden_dim, dim_feedforward, pre_norm) for _ in layers
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_QUERY_MAPS, hidden_dim)
        self.input_proj = nn.ModuleList(
            _projection(in_channels, hidden_dim, enforce_input_project) for _ in range(NUM_QUERY_MAPS)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)
        # What no layer reads is there for the checkpoints, but does not train: several processes would wait for its
        # gradient.
        self.input_proj[dec_layers:].requires_grad_(False)
        if not dec_layers:
            self.query_embed.requires_grad_(False)
            self.level_embed.requires_grad_(False)

    def forward(
        self,
        maps: Sequence[Tensor],
        mask_features: Tensor,
        every_layer: bool = True,
        full_masks: bool = True,
    ) -> dict[str, Any]:
        """
        Args:
            maps: 3 maps (B, in_channels, h, w), coarse to fine.
            mask_features: (B, mask_dim, H, W).
            every_layer: also give the predictions before the last, for deep supervision.
            full_masks: False gives masks as :class:`QueryMasks`, which is all that the losses need.
        Returns:
            ``pred_logits`` (B, Q, K + 1), the last class being "no object"; ``pred_masks`` (B, Q, H, W) logits;
            with every_layer, ``aux_outputs``: a list of M dicts of the same two.
        """
        keys, values = self._memory(maps)
        # A mask is linear in the features, so masks at a map's resolution come from features at that resolution: the
        # full-size masks need not be computed where nobody else wants them. No gradient flows through this choice.
        coarse = [
            F.interpolate(
                mask_features.detach(), size=one.shape[-2:], mode="bilinear", align_corners=False
            ).flatten(2)
            for one in maps
        ]
        positions = self.query_embed.weight
        queries = self.query_feat.weight.expand(len(mask_features), -1, -1)
        answers = []
        count = len(self.transformer_cross_attention_layers)
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
        )
        for i, (look_at_map, look_at_queries, feed_forward) in enumerate(layers):
            level = i % NUM_QUERY_MAPS
            normed = self.decoder_norm(queries)
            embedded = self.mask_embed(normed)
            if every_layer:
                answers.append(self._answer(normed, embedded, mask_features, full_masks))
            allowed = inside_own_mask(embedded.detach(), coarse[level])
            queries = look_at_map(queries, positions, keys[level], values[level], allowed)
            queries = look_at_queries(queries, positions)
            queries = feed_forward(queries)
        normed = self.decoder_norm(queries)
        answer = self._answer(normed, self.mask_embed(normed), mask_features, full_masks)
        if every_layer:
            assert len(answers) == count
            return {**answer, "aux_outputs": answers}
        return answer

    def _memory(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values (B, S, hidden_dim) of each map, before the layers' own projections."""
        if len(maps) != NUM_QUERY_MAPS:
            raise ValueError(
                f"the masked decoder takes {NUM_QUERY_MAPS} maps, coarse to fine, and got {len(maps)}."
            )
        keys, values = [], []
        for one, projection, level in zip(maps, self.input_proj, self.level_embed.weight):
            cells = projection(one).flatten(2).transpose(1, 2) + level
            where = sine_positions(one.shape[2], one.shape[3], cells.shape[-1], cells.device)
            keys.append(cells + where.to(cells.dtype).flatten(1).t())
            values.append(cells)
        return keys, values

    def _answer(
        self, normed: Tensor, embedded: Tensor, mask_features: Tensor, full_masks: bool
    ) -> dict[str, Any]:
        masks = QueryMasks(embedded, mask_features)
        return {
            "pred_logits": self.class_embed(normed),
            "pred_masks": masks.all() if full_masks else masks,
        }

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(f"{prefix}static_query.")]:
            state_dict[key.replace("static_query", "query_feat")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def inside_own_mask(embedded: Tensor, features: Tensor) -> Tensor:
    """Which cells belong to each query's mask (probability at least 1/2)? All of them if none does.

    Args:
        embedded: (B, Q, C) mask embeddings.
        features: (B, C, S).
    Returns:
        (B, Q, S) bool: equation 2 of arXiv 2112.01527 as the mask of an attention. A query whose mask is all
        background may look everywhere; with nowhere to look, its attention would be 0 / 0.
    """
    inside = torch.bmm(embedded, features.to(embedded.dtype)) >= 0
    return inside | ~inside.any(-1, keepdim=True)


def _projection(in_channels: int, hidden_dim: int, enforce: bool) -> nn.Module:
    if in_channels == hidden_dim and not enforce:
        return nn.Sequential()
    conv = Conv2d(in_channels, hidden_dim, kernel_size=1)
    c2_xavier_fill(conv)
    return conv
