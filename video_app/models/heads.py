"""Heads: maps of single frames -> class scores of the clip. The backbone knows no time; a head supplies it, or not.

In: {"res5": (B, T, C, h, w), ...}.  Out: (B, K) logits.
Source: arXiv:2211.02043, Table 4 (linear, temporal and global blocks); attentive probe: V-JEPA 2, arXiv:2506.09985.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from video_app.models.blocks import QueryBlock, VideoBlock
from video_app.models.maps import MapsOfFrames, maps_seen
from video_app.models.positions import ClipPositions

VIDEO_HEADS_REGISTRY = Registry("VIDEO_HEADS")
VIDEO_HEADS_REGISTRY.__doc__ = """
Heads by MODEL.VIDEO_HEAD.NAME. Called with ``(cfg, input_shape)``, they give modules: maps of (B, T, C, h, w) by name
-> logits (B, K). Detectron2 has no registry for them.
"""


def build_video_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The head MODEL.VIDEO_HEAD.NAME on the maps of MODEL.VIDEO_HEAD.IN_FEATURES.

    Raises:
        KeyError: no such head.
        ValueError: maps or numbers that do not fit.
    """
    seen = maps_seen(input_shape, cfg.MODEL.VIDEO_HEAD.IN_FEATURES)
    return VIDEO_HEADS_REGISTRY.get(cfg.MODEL.VIDEO_HEAD.NAME)(cfg, seen)


@VIDEO_HEADS_REGISTRY.register()
class LinearVideoHead(nn.Module):
    """Mean over time and space, dropout, one linear layer. It cannot tell a clip from the same frames in another order.

    Args:
        input_shape: of the maps that it sees, by name.
        num_classes: K.
        classifier_dropout: on the mean.
    """

    @configurable
    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, num_classes: int, classifier_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.maps = MapsOfFrames(input_shape)
        self.classifier = Classifier(self.maps.channels, num_classes, classifier_dropout)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        return _common(cfg, input_shape)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, T, C, h, w)} -> (B, K)."""
        frames = self.maps(maps).flatten(2, 3).mean(dim=2)  # (B, T, C)
        # In float64, sums of a few float32 numbers do not depend on their order.
        return self.classifier(frames.double().mean(dim=1).to(frames.dtype))


class TransformerVideoHead(nn.Module):
    """Positions, blocks, norm, mean over time and space, dropout, one linear layer. Subclasses name the blocks' axes.

    Args:
        input_shape: of the maps that it sees, by name.
        grid: native size (frames, rows, columns of cells), for the learned positions; any other size runs too.
        num_blocks: N.
        width: channels of the blocks; 0: those of the maps.
        num_heads: 0: one for every 64 channels.
        mlp_ratio, dropout, drop_path: see :class:`VideoBlock`; drop_path is the last block's, the first has none.
    Raises:
        ValueError: no block, a chance that is none, or heads that do not divide the width.
    """

    axes: tuple[str, ...]

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        grid: tuple[int, int, int],
        num_classes: int,
        num_blocks: int = 4,
        width: int = 0,
        num_heads: int = 0,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        classifier_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.maps = MapsOfFrames(input_shape, width)
        width = self.maps.channels
        _check(num_blocks, width, num_heads, drop_path)
        self.positions = ClipPositions(*grid, width)
        rates = [drop_path * k / max(1, num_blocks - 1) for k in range(num_blocks)]
        options = {"mlp_ratio": mlp_ratio, "dropout": dropout}
        self._build_blocks(width, num_heads or width // 64, rates, options)
        self.norm = nn.LayerNorm(width)
        self.classifier = Classifier(width, num_classes, classifier_dropout)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        head, video = cfg.MODEL.VIDEO_HEAD, cfg.VIDEO
        side = math.ceil(video.CROP_SIZE / max(int(shape.stride) for shape in input_shape.values()))
        return {
            **_common(cfg, input_shape),
            "grid": _native_grid(head.POSITIONS, (video.NUM_FRAMES, side, side)),
            "num_blocks": head.NUM_BLOCKS,
            "width": head.WIDTH,
            "num_heads": head.NUM_HEADS,
            "mlp_ratio": head.MLP_RATIO,
            "dropout": head.DROPOUT,
            "drop_path": head.DROP_PATH,
        }

    def _build_blocks(self, width: int, heads: int, rates: list[float], options: dict[str, float]) -> None:
        self.blocks = nn.Sequential(
            *(VideoBlock(self.axes, width, heads, drop_path=rate, **options) for rate in rates)
        )

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, T, C, h, w)} -> (B, K)."""
        return self.classifier(self.pool(self.cells(maps)))

    def cells(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Cells with their positions, through the blocks: (B, T, h * w, width)."""
        cells = self.maps(maps)
        cells = (cells + self.positions(*cells.shape[1:4])).flatten(2, 3)
        return self.blocks(cells)

    def pool(self, cells: Tensor) -> Tensor:
        """(B, T, N, width) -> (B, width)."""
        return self.norm(cells).mean(dim=(1, 2))


@VIDEO_HEADS_REGISTRY.register()
class TemporalVideoHead(TransformerVideoHead):
    """Blocks in which the cells at one position look at each other over time; positions meet in the mean only."""

    axes = ("time",)


@VIDEO_HEADS_REGISTRY.register()
class GlobalVideoHead(TransformerVideoHead):
    """Blocks in which all T*h*w cells look at each other."""

    axes = ("all",)


@VIDEO_HEADS_REGISTRY.register()
class SpatialTemporalVideoHead(TransformerVideoHead):
    """Blocks that attend over the cells of each frame, then over time at each position (factorised attention)."""

    axes = ("space", "time")


@VIDEO_HEADS_REGISTRY.register()
class AttentiveProbe(TransformerVideoHead):
    """N - 1 blocks over all cells, then one in which a learned query looks at them; its answer is classified."""

    axes = ("all",)

    def _build_blocks(self, width: int, heads: int, rates: list[float], options: dict[str, float]) -> None:
        super()._build_blocks(width, heads, rates[:-1], options)
        self.pooling = QueryBlock(width, heads, drop_path=rates[-1], **options)

    def pool(self, cells: Tensor) -> Tensor:
        """(B, T, N, width) -> (B, width)."""
        return self.norm(self.pooling(cells))


class Classifier(nn.Sequential):
    """Dropout and a linear layer that starts with small weights, as Video Swin's."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        if num_classes < 1:
            raise ValueError(
                f"MODEL.VIDEO_HEAD.NUM_CLASSES is {num_classes}; -1 is filled in from the data by train_net."
            )
        linear = nn.Linear(channels, num_classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Dropout(dropout), linear)


def _common(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
    head = cfg.MODEL.VIDEO_HEAD
    return {
        "input_shape": input_shape,
        "num_classes": head.NUM_CLASSES,
        "classifier_dropout": head.CLASSIFIER_DROPOUT,
    }


def _native_grid(asked: Sequence[int], own: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(asked) != 3 or min(asked) < 0:
        raise ValueError(
            f"MODEL.VIDEO_HEAD.POSITIONS is {tuple(asked)}; it must be frames, rows, columns, each 0 or more."
        )
    frames, rows, columns = (int(size) or default for size, default in zip(asked, own))
    return frames, rows, columns


def _check(num_blocks: int, width: int, num_heads: int, drop_path: float) -> None:
    if num_blocks < 1:
        raise ValueError(
            f"MODEL.VIDEO_HEAD.NUM_BLOCKS is {num_blocks}; LinearVideoHead is the head without blocks."
        )
    if not num_heads and width % 64:
        raise ValueError(
            f"MODEL.VIDEO_HEAD.NUM_HEADS is 0, one head for every 64 channels, but there are {width}. Set it to a "
            "divisor, or WIDTH to a multiple of 64."
        )
    if not 0 <= drop_path < 1:
        raise ValueError(f"MODEL.VIDEO_HEAD.DROP_PATH is {drop_path}; it must be in [0, 1).")
