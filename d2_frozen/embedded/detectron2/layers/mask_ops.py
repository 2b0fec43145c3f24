"""From small soft masks, one per box, to masks of the whole image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from detectron2._outside import outside_subset
from detectron2.structures.boxes import Boxes

__all__ = ["paste_masks_in_image"]
__getattr__ = outside_subset(__name__, ("paste_mask_in_image_old",))

BYTES_PER_FLOAT = 4
# Largest float mask batch that is computed at once on an accelerator.
GPU_MEM_LIMIT = 1024**3


def paste_masks_in_image(
    masks: Tensor, boxes: Boxes | Tensor, image_shape: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Stretch mask i over box i, by bilinear interpolation, in an image of the given size.

    Args:
        masks: (N, M, M) in 0..1.
        boxes: N boxes, XYXY pixels; they may reach out of the image.
        image_shape: (height, width) in pixels.
        threshold: a pixel is set when its value is at least this; negative: no threshold.
    Returns:
        (N, height, width) bool; uint8 in 0..255 for a negative threshold, and always for N = 0.
    """
    assert masks.shape[-1] == masks.shape[-2], f"masks must be square, got {tuple(masks.shape)}"
    count = len(masks)
    height, width = (int(side) for side in image_shape)
    if count == 0:
        return masks.new_empty((0, height, width), dtype=torch.uint8)
    coords = boxes.tensor if isinstance(boxes, Boxes) else boxes
    assert len(coords) == count, f"mask i goes with box i, but there are {count} and {len(coords)}"

    if masks.device.type == "cpu":
        # One at a time, as then only the pixels around its box have to be computed.
        per_chunk = 1
    else:
        # All at once, as each step would wait for the device, within the memory that we allow ourselves.
        per_mask = height * width * BYTES_PER_FLOAT
        assert per_mask <= GPU_MEM_LIMIT, f"one mask of {height}x{width} needs more than GPU_MEM_LIMIT bytes"
        per_chunk = math.ceil(count / math.ceil(count * per_mask / GPU_MEM_LIMIT))

    pasted = torch.zeros(
        (count, height, width), device=masks.device, dtype=torch.bool if threshold >= 0 else torch.uint8
    )
    for start in range(0, count, per_chunk):
        part = slice(start, start + per_chunk)
        values, region = _do_paste_mask(
            masks[part], coords[part], height, width, skip_empty=masks.device.type == "cpu"
        )
        pixels = values >= threshold if threshold >= 0 else (values * 255).to(torch.uint8)
        pasted[(part, *region)] = pixels
    return pasted


def _do_paste_mask(
    masks: Tensor, boxes: Tensor, img_h: int, img_w: int, skip_empty: bool = True
) -> tuple[Tensor, tuple[slice, ...]]:
    """Sample every mask at the pixel centres of the image.

    Args:
        masks: (N, M, M) or (N, 1, M, M).
        boxes: (N, 4) XYXY pixels.
        skip_empty: only the part of the image that some box touches.
    Returns:
        (N, h, w) float values, and the two slices of the image that they belong to (none for the whole
        image).
    """
    y_range, x_range = (0, img_h), (0, img_w)
    if skip_empty:
        x_range, y_range = _touched_range(boxes[:, 0::2], img_w), _touched_range(boxes[:, 1::2], img_h)
    rows = _sample_positions(y_range, boxes[:, 1], boxes[:, 3])  # (N, h)
    columns = _sample_positions(x_range, boxes[:, 0], boxes[:, 2])  # (N, w)
    shape = (len(masks), rows.shape[1], columns.shape[1])
    grid = torch.stack((columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)), dim=3)

    single_channel = masks.reshape(len(masks), 1, *masks.shape[-2:]).to(torch.float32)
    values = F.grid_sample(single_channel, grid.to(torch.float32), align_corners=False)[:, 0]
    return values, (slice(*y_range), slice(*x_range)) if skip_empty else ()


def _touched_range(ends: Tensor, limit: int) -> tuple[int, int]:
    """Pixels from the first to the last end of (N, 2), with one more on each side for the interpolation."""
    first, last = (
        torch.stack((ends[:, 0].min().floor() - 1, ends[:, 1].max().ceil() + 1)).clamp(0, limit).tolist()
    )
    return int(first), max(int(last), int(first))


def _sample_positions(pixel_range: tuple[int, int], low: Tensor, high: Tensor) -> Tensor:
    """Pixel centres along one axis as grid_sample counts: -1 and 1 are the sides of the box."""
    centers = torch.arange(*pixel_range, device=low.device, dtype=torch.float32) + 0.5
    position = (centers - low[:, None]) / (high - low)[:, None] * 2 - 1
    # Any value beyond +-2 samples nothing. Boxes without width give inf, or 0/0 on the box itself.
    return position.clamp_(-2, 2).nan_to_num_(nan=-2.0)


def pad_masks(masks: Tensor, padding: int) -> tuple[Tensor, float]:
    """Add a border of zeros.

    Returns:
        (B, M + 2 * padding, M + 2 * padding), and by which factor the masks have grown.
    """
    side = masks.shape[-1]
    return F.pad(masks, (padding,) * 4), (side + 2 * padding) / side


def scale_boxes(boxes: Tensor, scale: float) -> Tensor:
    """Grow (N, 4) XYXY boxes around their centres."""
    center = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    return torch.cat((center - half, center + half), dim=1)
