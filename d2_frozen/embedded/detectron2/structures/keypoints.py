"""Keypoints of N objects, and the way between them and the heat maps inside a box (Mask R-CNN, section 5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, device


class Keypoints:
    """K keypoints for each of N objects.

    Attributes:
        tensor: (N, K, 3) float32: x and y in absolute pixels, and visibility (0 not labelled, 1 labelled but
            hidden, 2 labelled and visible).
    """

    def __init__(self, keypoints: Tensor | np.ndarray | list[list[float]]) -> None:
        target = keypoints.device if isinstance(keypoints, Tensor) else torch.device("cpu")
        points = torch.as_tensor(keypoints, dtype=torch.float32, device=target)
        assert points.dim() == 3 and points.shape[2] == 3, (
            f"Keypoints want (N, K, 3), got {tuple(points.shape)}"
        )
        self.tensor = points

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Keypoints:
        return Keypoints(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> device:
        return self.tensor.device

    def to_heatmap(self, boxes: Tensor, heatmap_size: int) -> tuple[Tensor, Tensor]:
        """In which cell of a square grid over box i each keypoint of object i lies.

        Args:
            boxes: (N, 4) XYXY pixels.
            heatmap_size: cells along each side.
        Returns:
            (N, K) long, the cell as y * heatmap_size + x, 0 where there is none; and (N, K) long, 1 where the
            keypoint is labelled and inside its box.
        """
        origin, far = boxes[:, None, :2], boxes[:, None, 2:]
        position = self.tensor[..., :2]
        cell = ((position - origin) * (heatmap_size / (far - origin))).floor().long()  # (N, K, xy)
        # A point exactly on the far side belongs to the last cell; what lies beyond belongs to none.
        cell = torch.where(position == far, heatmap_size - 1, cell)
        inside = ((cell >= 0) & (cell < heatmap_size)).all(dim=2)
        valid = (inside & (self.tensor[..., 2] > 0)).long()
        return (cell[..., 1] * heatmap_size + cell[..., 0]) * valid, valid

    def __getitem__(self, item: int | slice | Tensor) -> Keypoints:
        """Index, slice, bool mask (N,) or long indices; always Keypoints, one object for an integer."""
        return Keypoints(self.tensor[[item]] if isinstance(item, int) else self.tensor[item])

    def __repr__(self) -> str:
        return f"Keypoints(num_instances={len(self)})"

    @staticmethod
    def cat(keypoints_list: list[Keypoints]) -> Keypoints:
        """All objects of a list in order; they must have the same number of keypoints."""
        assert len(keypoints_list) > 0, "Keypoints.cat: nothing to join"
        assert all(isinstance(k, Keypoints) for k in keypoints_list), "Keypoints.cat: wrong type in the list"
        return Keypoints(torch.cat([k.tensor for k in keypoints_list], dim=0))


@torch.no_grad()
def heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    """The best position of every keypoint, at pixel resolution.

    Args:
        maps: (N, K, S, S) logits over the cells of a grid over box i.
        rois: (N, 4) XYXY pixels.
    Returns:
        (N, K, 4): x, y in pixels (centre of the best pixel), its logit (bicubic), and its score: the softmax
        over the grid cells, continued to pixels.
    """
    num_rois, num_keypoints = maps.shape[:2]
    found = maps.new_zeros(num_rois, num_keypoints, 4)
    if num_rois == 0:
        return found
    sides = (rois[:, 2:] - rois[:, :2]).clamp(min=1)  # (N, xy)
    pixels = sides.ceil()
    pixel_size = sides / pixels  # a map has whole pixels, so they are a bit smaller than one image pixel
    peak = maps.flatten(2).amax(dim=2)  # keeps exp() in range
    for i, (width, height) in enumerate(pixels.long().tolist()):
        logits = F.interpolate(maps[i : i + 1], size=(height, width), mode="bicubic", align_corners=False)[0]
        logits = logits.flatten(1)  # (K, pixels)
        logit, best = logits.max(dim=1)
        normaliser = (maps[i] - peak[i, :, None, None]).exp().sum(dim=(1, 2))
        column, row = best % width, best // width
        found[i, :, 0] = (column + 0.5) * pixel_size[i, 0] + rois[i, 0]
        found[i, :, 1] = (row + 0.5) * pixel_size[i, 1] + rois[i, 1]
        found[i, :, 2] = logit
        found[i, :, 3] = (logit - peak[i]).exp() / normaliser
    return found
