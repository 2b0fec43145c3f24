"""Neck: FPN with residual blocks, i.e. more trainable parameters between a frozen network and the heads.

In: {"res2".."res5"}.  Out: {"p2".."p6"}: (B, C, H/s, W/s), strides 4..64 pixels.
Method: Lin et al., arXiv:2211.02043, Table 2 ("FPN with residual blocks"); FPN: arXiv:1612.03144.

The paper does not say where its blocks sit. Here they follow the 3x3 output convolution of each level, one
stack per level, and P6 is pooled from the refined P5. Each block starts as the identity, so that training
starts from the plain FPN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from d2_frozen.act_checkpoint import ActCheckpointLayer
from d2_frozen.neck.padding import PadsForBottomUp
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.backbone import FPN, Backbone


class ResidualFPN(PadsForBottomUp, FPN):
    """Detectron2's FPN, then ``num_blocks`` residual blocks per level, then P6 by stride-2 subsampling."""

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        num_blocks: int = 4,
        norm: str = "",
        fuse_type: str = "sum",
    ):
        """
        Args:
            bottom_up: a Detectron2 backbone whose ``in_features`` have strides that double.
            in_features: names of maps of ``bottom_up``, fine to coarse.
            out_channels: channels of every level.
            num_blocks: blocks per level, at least 1.
            norm: name in ``detectron2.layers.get_norm``, "" for none; for FPN and blocks.
            fuse_type: "sum" or "avg", of the FPN's top-down path.
        """
        if num_blocks < 1:
            raise ValueError(
                f"MODEL.RESIDUAL_FPN.NUM_BLOCKS is {num_blocks}; with 0 blocks use MODEL.NECK.NAME: FPN."
            )
        super().__init__(
            bottom_up, list(in_features), out_channels, norm, top_block=None, fuse_type=fuse_type
        )
        self.residual = nn.ModuleDict(
            {
                name: nn.Sequential(*(ResidualBlock(out_channels, norm) for _ in range(num_blocks)))
                for name in self._out_features
            }
        )
        self._pooled = f"p{int(self._out_features[-1][1:]) + 1}"

    def output_shape(self) -> dict[str, ShapeSpec]:
        """The FPN's levels and the pooled one."""
        shapes = super().output_shape()
        top = shapes[self._out_features[-1]]
        return {**shapes, self._pooled: ShapeSpec(channels=top.channels, stride=2 * top.stride)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) images, normalised and padded -> maps by name, fine to coarse."""
        plain = super().forward(images)
        out = {name: blocks(plain[name]) for name, blocks in self.residual.items()}
        *_, coarsest = out.values()
        # As Detectron2's LastLevelMaxPool, so that the two FPNs differ by the blocks alone.
        out[self._pooled] = F.max_pool2d(coarsest, kernel_size=1, stride=2)
        return out


class ResidualBlock(ActCheckpointLayer):
    """x + conv(relu(conv(relu(x)))), 3x3 convolutions with norm behind each; the identity at the start."""

    def __init__(self, channels: int, norm: str = ""):
        super().__init__()
        bias = not norm
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm1 = get_norm(norm, channels) or nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm2 = get_norm(norm, channels) or nn.Identity()
        c2_msra_fill(self.conv1)
        c2_msra_fill(self.conv2)
        # The last factor of the branch that trains; a FrozenBN's weight does not and would stay zero.
        scale = getattr(self.norm2, "weight", None)
        nn.init.zeros_(scale if isinstance(scale, nn.Parameter) else self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm1(self.conv1(F.relu(x)))
        return x + self.norm2(self.conv2(F.relu(branch)))
