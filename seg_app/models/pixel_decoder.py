"""Pixel decoder: backbone maps -> maps in which scales have talked to each other, and one fine map for the masks.

In: maps by name, for instance res2..res5.  Out: features for the masks at stride 4, three maps for the queries.
Method: deformable encoder (arXiv 2010.04159) over the coarse maps, one FPN step to the finest; Mask2Former,
arXiv 2112.01527, section 3.2.1. Parameter names are those of the public checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from d2_frozen.act_checkpoint import ActCheckpointLayer
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from seg_app.models.deformable import MSDeformAttn, cell_centres
from seg_app.models.position import sine_positions

# Maps that the masked decoder gets, coarse to fine; Mask2Former fixes it.
NUM_QUERY_MAPS = 3


class MSDeformAttnPixelDecoder(nn.Module):
    """Deformable encoder and FPN.

    Args:
        input_shape: name -> channels and stride of the maps.
        conv_dim: width of everything inside.
        mask_dim: channels of the map for the masks.
        norm: of the FPN's convolutions, as Detectron2's ``get_norm`` has it.
        transformer_in_features: maps that the encoder works on; the finer ones are added by the FPN.
        transformer_enc_layers: N.
        transformer_nheads, transformer_dim_feedforward, transformer_dropout, transformer_points: of its layers.
        common_stride: of the map for the masks.
    Raises:
        ValueError: a name in ``transformer_in_features`` is no input, or the strides do not fit.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        conv_dim: int,
        mask_dim: int,
        transformer_enc_layers: int,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        norm: str = "GN",
        transformer_dropout: float = 0.0,
        transformer_in_features: Sequence[str] = ("res3", "res4", "res5"),
        transformer_points: int = 4,
        common_stride: int = 4,
    ) -> None:
        super().__init__()
        _check_names(input_shape, transformer_in_features)
        fine_to_coarse = sorted(input_shape, key=lambda name: input_shape[name].stride)
        # Coarse to fine: input_proj.0 belongs to the coarsest map.
        self.encoded = [name for name in fine_to_coarse[::-1] if name in transformer_in_features]
        finest = input_shape[self.encoded[-1]].stride
        # FPN steps go from the finest encoded map to the common stride, each halving the stride.
        steps = int(math.log2(finest / common_stride))
        self.lateral = [name for name in fine_to_coarse[::-1] if input_shape[name].stride < finest][:steps]
        if len(self.lateral) < steps or len(self.encoded) + steps < NUM_QUERY_MAPS:
            strides = {name: shape.stride for name, shape in input_shape.items()}
            raise ValueError(
                f"the pixel decoder needs a map for every stride from {common_stride} to {finest}, and at least "
                f"{NUM_QUERY_MAPS} in all; MODEL.SEM_SEG_HEAD.IN_FEATURES gives strides {strides}."
            )
        self.conv_dim = conv_dim
        self.input_proj = nn.ModuleList(
            _input_projection(input_shape[name].channels, conv_dim) for name in self.encoded
        )
        self.transformer = _LevelEncoder(
            len(self.encoded),
            conv_dim,
            transformer_enc_layers,
            heads=transformer_nheads,
            feedforward=transformer_dim_feedforward,
            dropout=transformer_dropout,
            points=transformer_points,
        )
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        c2_xavier_fill(self.mask_features)
        # Public names count from the finest map, and are written from the last step to the first.
        self.steps = [str(number) for number in range(steps, 0, -1)]
        for number, name in zip(self.steps, self.lateral):
            for prefix, channels, kernel, activation in (
                ("adapter", input_shape[name].channels, 1, None),
                ("layer", conv_dim, 3, F.relu),
            ):
                conv = Conv2d(
                    channels,
                    conv_dim,
                    kernel_size=kernel,
                    padding=kernel // 2,
                    bias=not norm,
                    norm=get_norm(norm, conv_dim),
                    activation=activation,
                )
                c2_xavier_fill(conv)
                self.add_module(f"{prefix}_{number}", conv)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            features: (B, C, h, w) by name.
        Returns:
            Features for the masks, (B, mask_dim, H / common_stride, W / common_stride), and ``NUM_QUERY_MAPS`` maps
            of conv_dim channels, coarse to fine. Always float32 or better: sampling locations need the bits.
        """
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            maps = [
                projection(_at_least_float32(features[name]))
                for name, projection in zip(self.encoded, self.input_proj)
            ]
            maps = self.transformer(maps)
            for number, name in zip(self.steps, self.lateral):
                lateral = getattr(self, f"adapter_{number}")(_at_least_float32(features[name]))
                coarse = F.interpolate(
                    maps[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False
                )
                maps.append(getattr(self, f"layer_{number}")(lateral + coarse))
            return self.mask_features(maps[-1]), maps[:NUM_QUERY_MAPS]


class _LevelEncoder(nn.Module):
    """Self-attention among the cells of all levels."""

    def __init__(
        self, levels: int, width: int, layers: int, heads: int, feedforward: int, dropout: float, points: int
    ) -> None:
        super().__init__()
        # Without layers nothing reads it, and several processes would wait for its gradient.
        self.level_embed = nn.Parameter(torch.empty(levels, width).normal_(), requires_grad=layers > 0)
        blocks = (EncoderLayer(width, feedforward, dropout, levels, heads, points) for _ in range(layers))
        # The public names have a level between: transformer.encoder.layers.0 ...
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        B, C = maps[0].shape[:2]
        shapes = tuple((one.shape[2], one.shape[3]) for one in maps)
        cells = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)  # (B, S, C)
        positions = torch.cat(
            [
                sine_positions(h, w, C, cells.device).to(cells.dtype).flatten(1).t() + level
                for (h, w), level in zip(shapes, self.level_embed)
            ]
        )  # (S, C)
        reference = cell_centres(shapes, cells.device, cells.dtype)
        for layer in cast(nn.ModuleList, self.encoder["layers"]):
            cells = layer(cells, positions, reference, shapes)
        counts = [h * w for h, w in shapes]
        return [
            one.transpose(1, 2).reshape(B, C, h, w) for one, (h, w) in zip(cells.split(counts, dim=1), shapes)
        ]


class EncoderLayer(ActCheckpointLayer):
    """Deformable self-attention and a feed-forward network, each added and then normalised."""

    def __init__(
        self, width: int, feedforward: int, dropout: float, levels: int, heads: int, points: int
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(width, levels, heads, points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = dropout
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, cells: Tensor, positions: Tensor, reference: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        """(B, S, C) cells, (S, C) positions, (1, S, L, 2) reference points -> (B, S, C)."""
        attended = self.self_attn(cells + positions, reference, cells, shapes)
        cells = self.norm1(cells + self._drop(attended))
        inner = self._drop(F.relu(self.linear1(cells), inplace=True))
        return self.norm2(cells + self._drop(self.linear2(inner)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _input_projection(channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, width))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_names(input_shape: Mapping[str, ShapeSpec], encoded: Sequence[str]) -> None:
    missing = [name for name in encoded if name not in input_shape]
    if missing or not encoded:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES is {list(encoded)}; it must name some of "
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES ({', '.join(input_shape)})."
        )
