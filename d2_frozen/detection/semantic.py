"""What lies around the objects? The semantic branch of Hybrid Task Cascade, and the label maps that it learns.

In: pyramid maps, strides 4..64 pixels.  Out: class scores and a feature map, both at one stride.
Method: Chen et al., arXiv 1901.07518, section 3.2 ("Spatial Contexts from Segmentation").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from d2_frozen.data.label_values import values_in
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec


class SemanticBranch(nn.Module):
    """Each level through a 1x1 convolution, resized to one stride and summed; 3x3 convolutions; two 1x1 outputs.

    Parameters: ``lateral.NAME``, ``conv.N``, ``predictor`` (label map) and ``embedding`` (features for the RoIs).
    """

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        stride: int,
        num_classes: int,
        num_convs: int = 4,
        loss_weight: float = 0.2,
        ignore_value: int = 255,
    ):
        """
        Args:
            input_shape: of all maps; the used ones have equal channels, C.
            in_features: levels to join.
            stride: pixels; that of one of these levels, at whose resolution the branch works.
            num_classes: S, of the label map.
            num_convs: 3x3 convolutions after the sum.
            loss_weight: on the loss.
            ignore_value: label of pixels without a class.
        Raises:
            ValueError: no such level, or none of that stride; a number of classes that is none.
        """
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; for MODEL.HTC.SEMANTIC_ON: True it is the number of "
                "labels in the semantic maps, which is not taken from the data."
            )
        unknown = [name for name in in_features if name not in input_shape]
        strides = {name: input_shape[name].stride for name in in_features if name in input_shape}
        if unknown or stride not in strides.values():
            raise ValueError(
                f"MODEL.HTC.SEMANTIC_IN_FEATURES {list(in_features)} and SEMANTIC_STRIDE {stride} do not fit the "
                f"neck's levels, { ({name: shape.stride for name, shape in input_shape.items()}) }; the stride must be "
                "that of one of the features."
            )
        self.reference = next(name for name, value in strides.items() if value == stride)
        self.stride, self.num_classes = stride, num_classes
        self.loss_weight, self.ignore_value = loss_weight, ignore_value
        channels = input_shape[self.reference].channels
        self.lateral = nn.ModuleDict(
            {name: _conv(input_shape[name].channels, channels, 1) for name in in_features}
        )
        self.conv = nn.Sequential(*(_conv(channels, channels, 3) for _ in range(num_convs)))
        self.embedding = _conv(channels, channels, 1)
        self.predictor = Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SemanticBranch:
        """From MODEL.HTC.SEMANTIC_* and MODEL.SEM_SEG_HEAD.{NUM_CLASSES, IGNORE_VALUE}."""
        own, labels = cfg.MODEL.HTC, cfg.MODEL.SEM_SEG_HEAD
        return cls(
            input_shape,
            in_features=own.SEMANTIC_IN_FEATURES,
            stride=own.SEMANTIC_STRIDE,
            num_classes=labels.NUM_CLASSES,
            num_convs=own.SEMANTIC_NUM_CONVS,
            loss_weight=own.SEMANTIC_LOSS_WEIGHT,
            ignore_value=labels.IGNORE_VALUE,
        )

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Maps by name -> logits (B, S, h, w) and features (B, C, h, w), h = H / stride."""
        size = features[self.reference].shape[-2:]
        joined: Any = 0
        for name, lateral in self.lateral.items():
            level = lateral(features[name])
            if level.shape[-2:] != size:
                level = F.interpolate(level, size=size, mode="bilinear", align_corners=False)
            joined = joined + level
        joined = self.conv(joined)
        return self.predictor(joined), self.embedding(joined)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean cross entropy over the labelled cells, 0 if there are none.

        Args:
            logits: (B, S, h, w).
            labels: (B, H, W) int64, of the padded images; each cell takes the label at its middle.
        """
        cells = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode="nearest-exact")[
            :, 0
        ].long()
        total = F.cross_entropy(logits.float(), cells, ignore_index=self.ignore_value, reduction="sum")
        return self.loss_weight * total / (cells != self.ignore_value).sum().clamp(min=1)


def padded_label_maps(
    batch: Sequence[dict[str, Any]], size_hw: tuple[int, int], num_classes: int, ignore_value: int
) -> Tensor:
    """The "sem_seg" maps of a batch as one (B, H, W) int64 tensor, padded with ``ignore_value``.

    Args:
        batch: samples as DatasetMapper makes them.
        size_hw: H, W of the padded images.
        num_classes: labels are 0..num_classes-1 or ``ignore_value``.
    Raises:
        ValueError: a sample without map, of another size than its image, or with other labels; names the image.
    """
    device = getattr(batch[0].get("sem_seg"), "device", None)
    stacked = torch.full((len(batch), *size_hw), ignore_value, dtype=torch.int64, device=device)
    for slot, one in zip(stacked, batch):
        place = f"image {one.get('image_id', '?')!r}, {one.get('file_name', 'without file name')}"
        labels = one.get("sem_seg")
        if labels is None:
            raise ValueError(
                f"{place}: no semantic label map, which MODEL.HTC.SEMANTIC_ON: True needs. Give the dataset's entry in "
                "DATASETS.REGISTER the field sem_seg (records of your own: sem_seg_file_name), or set it to False."
            )
        if labels.shape != one["image"].shape[-2:]:
            raise ValueError(
                f"{place}: the semantic label map has {tuple(labels.shape)} pixels, the image "
                f"{tuple(one['image'].shape[-2:])}."
            )
        wrong = [value for value in values_in(one) if value != ignore_value and not 0 <= value < num_classes]
        if wrong:
            raise ValueError(
                f"{place}: the semantic label map has the label {wrong[0]}; MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
                f"{num_classes} and IGNORE_VALUE {ignore_value}."
            )
        slot[: labels.shape[0], : labels.shape[1]] = labels
    return stacked


def _conv(channels_in: int, channels_out: int, size: int) -> Conv2d:
    layer = Conv2d(channels_in, channels_out, kernel_size=size, padding=size // 2, activation=nn.ReLU())
    c2_msra_fill(layer)
    return layer
