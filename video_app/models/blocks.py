"""Transformer blocks over the cells of a clip: along time, within frames, over everything, or from a learned query.

Blocks normalise before each part (pre-norm); attention is PyTorch's fused one (scaled_dot_product_attention), but where
its backward pass is slow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from d2_frozen.act_checkpoint import ActCheckpointLayer

AXES = ("time", "space", "all")


class VideoBlock(ActCheckpointLayer):
    """Attention along each of ``axes`` in turn, then a feed-forward part; each added to its input.

    Args:
        axes: "time" (the T cells at one position look at each other), "space" (the h*w cells of a frame), "all".
        width, heads: channels, and attention heads that share them.
        mlp_ratio: hidden channels of the feed-forward part over the width.
        dropout: behind each attention, and twice in the feed-forward part.
        drop_path: chance that a clip skips a part.
    Raises:
        ValueError: the width is no multiple of the heads.
    """

    def __init__(
        self,
        axes: Sequence[str],
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        assert axes and set(axes) <= set(AXES)
        self.axes = tuple(axes)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in axes)
        self.attentions = nn.ModuleList(Attention(width, heads, dropout) for _ in axes)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = feed_forward(width, mlp_ratio, dropout)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, cells: Tensor) -> Tensor:
        """(B, T, N, width) -> the same shape; N cells of each frame."""
        B, T, N, _ = cells.shape
        for axis, norm, attention in zip(self.axes, self.norms, self.attentions):
            x = norm(cells)
            if axis == "time":
                x = attention(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, N)).transpose(1, 2)
            elif axis == "space":
                x = attention(x.flatten(0, 1)).unflatten(0, (B, T))
            else:
                x = attention(x.flatten(1, 2)).unflatten(1, (T, N))
            cells = cells + self.drop_path(x)  # whole clips skip it: the first axis is B here
        return cells + self.drop_path(self.mlp(self.mlp_norm(cells)))


class QueryBlock(nn.Module):
    """One learned query looks at all cells, then a feed-forward part: attentive pooling (V-JEPA, arXiv:2404.08471).

    Args: as :class:`VideoBlock`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.query = nn.Embedding(1, width)
        nn.init.trunc_normal_(self.query.weight, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = feed_forward(width, mlp_ratio, dropout)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, cells: Tensor) -> Tensor:
        """(B, T, N, width) -> (B, width)."""
        query = self.query.weight.expand(len(cells), 1, -1)
        pooled = query + self.drop_path(self.attention(query, self.norm(cells.flatten(1, 2))))
        pooled = pooled + self.drop_path(self.mlp(self.mlp_norm(pooled)))
        return pooled[:, 0]


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762, section 3.2.2), with dropout on its output.

    Raises:
        ValueError: the width is no multiple of the heads.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"MODEL.VIDEO_HEAD: a width of {width} channels is no multiple of {heads} heads. Set NUM_HEADS to a "
                "divisor, or WIDTH to a multiple."
            )
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        for linear in (self.query, self.key, self.value, self.out):
            _start(linear)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, cells: Tensor | None = None) -> Tensor:
        """
        Args:
            query: (N, Q, width).
            cells: (N, S, width), what they look at; themselves if None.
        Returns:
            (N, Q, width).
        """
        cells = query if cells is None else cells
        q, k, v = (self._split(x) for x in (self.query(query), self.key(cells), self.value(cells)))
        attended = attend(q, k, v)  # (N, heads, Q, width / heads)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


# Above this many numbers (128 MiB in bfloat16) the weights of attention are not kept for the backward pass.
_MOST_WEIGHTS = 2**26


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, of (N, heads, Q or S, d).

    Training in bfloat16 on a CPU, two products and a softmax: the backward pass of the fused kernel is not made for AMX
    and takes twice as long with 784 cells, eight times as long with 16.
    """
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    num_weights = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and trains and num_weights <= _MOST_WEIGHTS:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def feed_forward(width: int, ratio: float, dropout: float) -> nn.Sequential:
    """Two linear layers with GELU between them."""
    hidden = max(1, round(width * ratio))
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
    _start(first)
    _start(second)
    return nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), second, nn.Dropout(dropout))


def _start(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
