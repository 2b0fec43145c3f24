"""A plain ViT as a Detectron2 backbone: one map of one stride, for a neck that makes a pyramid of it.

In: a timm network without stages: ViT, DeiT, CLIP, DINO, DINOv2, DINOv3, EVA.  Out: {"plain": (B, C, H/s, W/s)},
class and register tokens dropped, the final norm applied.
Method: ViTDet, arXiv:2203.16527; positions are interpolated to the image, any size runs.

The stride s is the patch size where that is a power of two. Patches of 14 pixels do not fit Detectron2's strides, so
the image is shrunk by 14/16 first: s is 16 pixels of the given image, and the weights stay those of the file.
"""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from timm.models import model_entrypoint
from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone

PLAIN_FEATURE = "plain"
_PLAIN_MODULES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")
_STRIDES = (8, 16, 32)
# Not by timm's groups: rotary frequencies that are learned stand behind the last block there, and before timm 1.0.31 so
# do register tokens and the norm in front of the first block.
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class PlainViT(Backbone):
    """Last map of a timm network whose maps all have one stride.

    Args:
        network: a timm model with ``forward_intermediates``, built with ``dynamic_img_size``. Its classifier is
            removed; parameters keep timm's names, behind ``network.``.
        name: what messages and the fingerprint call it.
    Raises:
        ValueError: no power of two from 8 to 32 pixels is near the patch size.
    """

    network: Any

    def __init__(self, network: Any, name: str = "") -> None:
        super().__init__()
        self.name = name or type(network).__name__
        self.patch = _patch_of(network)
        fitting = [stride for stride in _STRIDES if self.patch <= stride < 2 * self.patch]
        if not fitting:
            raise ValueError(
                f"MODEL.TIMM.NAME {self.name} has patches of {self.patch} pixels; strides are {_STRIDES}."
            )
        self.stride = fitting[0]
        self._depth = len(network.feature_info)
        self._out_features = [PLAIN_FEATURE]
        self._out_feature_channels = {PLAIN_FEATURE: network.feature_info[-1]["num_chs"]}
        self._out_feature_strides = {PLAIN_FEATURE: self.stride}
        self.network = network
        if isinstance(network.norm, nn.Identity) and not isinstance(
            getattr(network, "fc_norm", None) or nn.Identity(), nn.Identity
        ):
            # EVA and others normalise behind the pooling; here the same norm acts on each cell.
            network.norm, network.fc_norm = network.fc_norm, nn.Identity()
        network.prune_intermediate_layers([self._depth - 1], prune_norm=False, prune_head=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images -> {"plain": (B, C, H / stride, W / stride)}.

        Raises:
            ValueError: a side is no multiple of the stride.
        """
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"an image of {height}x{width} pixels does not fit {self.name}: pad both sides to multiples of "
                f"{self.stride} (its size_divisibility)."
            )
        if self.patch != self.stride:
            cells = (height // self.stride, width // self.stride)
            size = [cell * self.patch for cell in cells]
            # In float32: low precision has no antialiasing on the CPU.
            shrunk = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
            images = shrunk.to(images.dtype)
        maps = self.network.forward_intermediates(
            images, indices=[self._depth - 1], norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return {PLAIN_FEATURE: maps[-1]}

    @property
    def size_divisibility(self) -> int:
        return self.stride

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels = self._out_feature_channels[PLAIN_FEATURE]
        return {PLAIN_FEATURE: ShapeSpec(channels=channels, stride=self.stride)}

    def parameters_by_layer(self) -> list[list[str]]:
        """Names of the parameters in front of the blocks, then of each block, in the order of the forward pass.

        The final norm is in none of them.
        """
        layers: list[list[str]] = [[] for _ in range(1 + self._depth)]
        for name, _ in self.network.named_parameters():
            if not name.startswith(("norm.", "fc_norm.")):
                block = _BLOCK.match(name)
                layers[1 + int(block[1]) if block else 0].append(f"network.{name}")
        return layers

    def parameters_by_stage(self) -> list[list[str]]:
        """As of a network with four stages: what is in front of the blocks, then quarters of them; all parameters."""
        stem, *blocks = self.parameters_by_layer()
        parts: list[list[str]] = [[], [], [], []]
        for index, names in enumerate(blocks):
            parts[4 * index // self._depth] += names
        inside = {name for names in (stem, *blocks) for name in names}
        parts[-1] += [name for name, _ in self.named_parameters() if name not in inside]
        return [part for part in (stem, *parts) if part]


def plain_vit_arguments(name: str) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that let a plain ViT take any image size; nothing for other networks."""
    return {"dynamic_img_size": True} if model_entrypoint(name).__module__ in _PLAIN_MODULES else {}


def is_plain(network: Any) -> bool:
    """Is this a network whose maps all have one stride, at any image size?"""
    info = getattr(network, "feature_info", None)
    if not isinstance(info, list) or not getattr(network, "dynamic_img_size", False):
        return False
    strides = {one["reduction"] for one in info}
    return len(strides) == 1 and hasattr(network, "norm") and hasattr(network, "forward_intermediates")


def _patch_of(network: Any) -> int:
    return int(network.feature_info[-1]["reduction"])
