"""Layers of the masked decoder: attention and feed-forward, added to their input, normalised before or after.

Attention is PyTorch's fused one (scaled_dot_product_attention); parameter names are those of nn.MultiheadAttention,
which the public checkpoints have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2.2) of width ``width``.

    Raises:
        ValueError: the width is no multiple of the heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"MODEL.MASK_FORMER.HIDDEN_DIM {width} is no multiple of its {heads} heads (NHEADS)."
            )
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """
        Args:
            query: (B, Q, width).
            key, value: (B, S, width).
            allowed: (B, Q, S) bool, True where the query may look; every row needs one True.
        """
        wq, wk, wv = _as_autocast_wants(self.in_proj_weight).chunk(3)
        bq, bk, bv = _as_autocast_wants(self.in_proj_bias).chunk(3)
        q, k, v = (
            self._split(F.linear(x, w, b)) for x, w, b in ((query, wq, bq), (key, wk, bk), (value, wv, bv))
        )
        mask = None if allowed is None else allowed[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, Q, width / heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def _as_autocast_wants(parameter: Tensor) -> Tensor:
    """In its precision: cast here, once, and not each part of it."""
    device = parameter.device.type
    return parameter.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else parameter


class _Added(nn.Module):
    """x + f(x), with a LayerNorm after the sum, or before f."""

    norm: nn.LayerNorm
    pre_norm: bool

    def _before(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre_norm else x

    def _after(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update if self.pre_norm else self.norm(x + update)


class SelfAttentionLayer(_Added):
    """Queries look at each other."""

    def __init__(self, width: int, heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.pre_norm = pre_norm

    def forward(self, queries: Tensor, positions: Tensor) -> Tensor:
        """(B, Q, width) and (Q, width) -> (B, Q, width)."""
        x = self._before(queries)
        placed = x + positions
        return self._after(queries, self.self_attn(placed, placed, x))


class CrossAttentionLayer(_Added):
    """Queries look at the cells of a map, each where it is allowed to."""

    def __init__(self, width: int, heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.multihead_attn = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.pre_norm = pre_norm

    def forward(
        self, queries: Tensor, positions: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None
    ) -> Tensor:
        """(B, Q, width), (Q, width), (B, S, width) twice, (B, Q, S) bool -> (B, Q, width)."""
        placed = self._before(queries) + positions
        return self._after(queries, self.multihead_attn(placed, keys, values, allowed))


class FeedForwardLayer(_Added):
    """Two linear layers, applied to each query."""

    def __init__(self, width: int, inner: int, pre_norm: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)
        self.pre_norm = pre_norm
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """(B, Q, width) -> (B, Q, width)."""
        return self._after(queries, self.linear2(F.relu(self.linear1(self._before(queries)))))


class MLP(nn.Module):
    """``count`` linear layers with ReLU between them."""

    def __init__(self, width: int, inner: int, out: int, count: int) -> None:
        super().__init__()
        widths = [width] + [inner] * (count - 1) + [out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
