"""Features of boxes: each out of the pyramid level that fits its size (FPN, arXiv:1612.03144, equation 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import RoIPool

from detectron2._outside import outside_message
from detectron2.layers import ROIAlign, _roi_align_cpu, cat, nonzero_tuple
from detectron2.structures import Boxes

__all__ = ["ROIPooler"]


def assign_boxes_to_levels(
    box_lists: list[Boxes], min_level: int, max_level: int, canonical_box_size: int, canonical_level: int
) -> Tensor:
    """The pyramid level of every box: one more for each doubling of its size.

    Args:
        box_lists: the boxes of each image.
        min_level, max_level: coarser and finer levels are replaced by these.
        canonical_box_size: square root of the area, pixels, of a box that belongs to ``canonical_level``.
    Returns:
        (all boxes,) int64, counted from ``min_level`` = 0.
    """
    sizes = torch.sqrt(cat([boxes.area() for boxes in box_lists]))
    # 1e-8 makes a box of size 0 finite; it also decides boxes of exactly the border size, so it must stay as
    # it is.
    level = torch.floor(canonical_level + torch.log2(sizes / canonical_box_size + 1e-8))
    return level.clamp(min=min_level, max=max_level).to(torch.int64) - min_level


def convert_boxes_to_pooler_format(box_lists: list[Boxes]) -> Tensor:
    """The boxes of all images as (R, 5): image index, then XYXY."""
    # Like a column of the boxes, which holds in a trace for any number of them.
    image = cat([torch.full_like(one.tensor[:, :1], index) for index, one in enumerate(box_lists)])
    return torch.cat((image, cat([one.tensor for one in box_lists])), dim=1)


class ROIPooler(nn.Module):
    """Crops every box out of one map of a pyramid."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: list[float] | tuple[float, ...],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        """
        Args:
            output_size: (height, width) of the result in cells, or one number for both.
            scales: 1 / stride of each map, finest first, each half of the one before.
            sampling_ratio: see ``ROIAlign``.
            pooler_type: "ROIAlignV2" (aligned), "ROIAlign" (half a cell off, as in older models) or
                "ROIPool".
            canonical_box_size, canonical_level: see ``assign_boxes_to_levels``; level n has stride 2^n.
        """
        super().__init__()
        self.output_size = _pair(output_size)
        assert len(self.output_size) == 2, f"output_size is (height, width), not {output_size!r}"
        self.level_poolers = nn.ModuleList(
            [_pooler_of_level(pooler_type, self.output_size, scale, sampling_ratio) for scale in scales]
        )

        exact_levels = [-math.log2(scale) for scale in (scales[0], scales[-1])]
        self.min_level, self.max_level = (round(level) for level in exact_levels)
        assert all(math.isclose(level, round(level)) for level in exact_levels), (
            f"strides of the pooled maps must be powers of 2, but the scales are {tuple(scales)}"
        )
        assert len(scales) == self.max_level - self.min_level + 1, (
            f"scales must halve from map to map without a gap, got {tuple(scales)}"
        )
        assert self.min_level >= 0, f"maps finer than the image cannot be pooled from: scales {tuple(scales)}"
        self.canonical_level = canonical_level
        assert canonical_box_size > 0, f"canonical_box_size must be above 0, not {canonical_box_size}"
        self.canonical_box_size = canonical_box_size

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """
        Args:
            x: one map (B, C, H, W) per scale.
            box_lists: boxes of each of the B images, input pixels.
        Returns:
            (R, C, output height, output width), R boxes in the order of ``box_lists``.
        """
        num_levels = len(self.level_poolers)
        assert isinstance(x, (list, tuple)) and isinstance(box_lists, (list, tuple)), (
            "lists of maps and boxes are needed"
        )
        assert len(x) == num_levels, f"{len(x)} feature maps, but the pooler was made for {num_levels}"
        assert len(box_lists) == x[0].shape[0], f"boxes of {len(box_lists)} images, maps of {x[0].shape[0]}"
        if len(box_lists) == 0:
            return x[0].new_zeros([0, x[0].shape[1], self.output_size[0], self.output_size[1]])

        rois = convert_boxes_to_pooler_format(box_lists)
        if num_levels == 1:
            return self.level_poolers[0](x[0], rois)

        level_of_box = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would compile both sides of an "and"
            if self._worth_pooling_at_once(x, rois):
                return self._all_levels_at_once(x, rois, level_of_box)
        # Sort by level, pool, sort back: the counts are then the only thing to wait for on an accelerator.
        # Every level is called, without boxes too, so that each map is part of the graph.
        order = torch.argsort(level_of_box, stable=True)
        if torch.jit.is_tracing():
            of_level = [rois[nonzero_tuple(level_of_box == level)[0]] for level in range(num_levels)]
        else:
            counts: list[int] = torch.bincount(level_of_box, minlength=num_levels).tolist()
            of_level = rois[order].split(counts)
        pooled: list[Tensor] = []
        for level, pool in enumerate(self.level_poolers):
            pooled.append(pool(x[level], of_level[level]))
        in_order = torch.cat(pooled)
        return torch.empty_like(in_order).index_copy_(0, order, in_order)

    def _worth_pooling_at_once(self, x: list[Tensor], rois: Tensor) -> bool:
        only_roi_align = all(type(pool) is ROIAlign for pool in self.level_poolers)
        return only_roi_align and _roi_align_cpu.pays(x, rois, self.output_size)

    def _all_levels_at_once(self, x: list[Tensor], rois: Tensor, level_of_box: Tensor) -> Tensor:
        scales = [pool.spatial_scale for pool in self.level_poolers]
        like = self.level_poolers[0]
        return _roi_align_cpu.roi_align_pyramid(
            x, rois, level_of_box, self.output_size, scales, like.sampling_ratio, like.aligned
        )


def _pooler_of_level(kind: str, output_size: tuple[int, int], scale: float, sampling_ratio: int) -> nn.Module:
    if kind in ("ROIAlign", "ROIAlignV2"):
        return ROIAlign(output_size, scale, sampling_ratio, aligned=kind == "ROIAlignV2")
    if kind == "ROIPool":
        return RoIPool(output_size, scale)
    if kind == "ROIAlignRotated":
        raise NotImplementedError(outside_message(f"POOLER_TYPE={kind}"))
    raise ValueError(f"pooler type {kind!r} is unknown; choose ROIAlignV2, ROIAlign or ROIPool")
