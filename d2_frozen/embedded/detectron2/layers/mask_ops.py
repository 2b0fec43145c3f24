"""From small soft masks, one per box, to masks of the whole image."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = ["paste_masks_in_image"]

BYTES_PER_FLOAT = 4
# Largest float mask batch that is computed at once on an accelerator.
GPU_MEM_LIMIT = 1024**3


def paste_masks_in_image(
    masks: Tensor, boxes: Tensor, image_shape: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Stretch mask i over box i, by bilinear interpolation, in an image of the given size.

    Args:
        masks: (N, M, M) in 0..1.
        boxes: N boxes, XYXY pixels, as (N, 4) or Boxes (in TorchScript as (N, 4)); they may reach out of the
            image.
        image_shape: (height, width) in pixels.
        threshold: a pixel is set when its value is at least this; negative: no threshold.
    Returns:
        (N, height, width) bool; uint8 in 0..255 for a negative threshold, and always for N = 0.
    """
    assert masks.shape[-1] == masks.shape[-2], f"masks must be square, got {masks.shape}"
    count = len(masks)
    height, width = image_shape
    height, width = int(height), int(width)
    if count == 0:
        return masks.new_empty([0, height, width], dtype=torch.uint8)
    if not isinstance(boxes, Tensor):
        boxes = boxes.tensor
    assert len(boxes) == count, f"mask i goes with box i, but there are {count} and {len(boxes)}"

    pixel_type = torch.bool if threshold >= 0 else torch.uint8
    pasted = torch.zeros([count, height, width], device=masks.device, dtype=pixel_type)
    if masks.device.type == "cpu":
        # One mask at a time, as then only the pixels around its box have to be computed. What can be is
        # computed for all of them before: a mask takes less time than a dozen calls of torch.
        rows = _sample_positions(0, height, boxes[:, 1], boxes[:, 3])  # (N, height)
        columns = _sample_positions(0, width, boxes[:, 0], boxes[:, 2])  # (N, width)
        y_ranges, x_ranges = _touched_ranges(boxes[:, 1::2], height), _touched_ranges(boxes[:, 0::2], width)
        for i in range(count):
            top, bottom = y_ranges[i]
            left, right = x_ranges[i]
            if top < bottom and left < right:
                values = _sample(
                    masks[i : i + 1], rows[i : i + 1, top:bottom], columns[i : i + 1, left:right]
                )
                pasted[i, top:bottom, left:right] = _pixels(values[0], threshold)
        return pasted
    # Many at once, as each step would wait for the device, within the memory that we allow ourselves.
    per_chunk = _masks_at_once(count, height, width)
    for start in range(0, count, per_chunk):
        end = start + per_chunk
        rows = _sample_positions(0, height, boxes[start:end, 1], boxes[start:end, 3])
        columns = _sample_positions(0, width, boxes[start:end, 0], boxes[start:end, 2])
        pasted[start:end] = _pixels(_sample(masks[start:end], rows, columns), threshold)
    return pasted


# Both limits as defaults, since TorchScript reads no globals.
def _masks_at_once(
    count: int, height: int, width: int, limit: int = GPU_MEM_LIMIT, per_pixel: int = BYTES_PER_FLOAT
) -> int:
    """How many of ``count`` float masks of that size fit into ``limit`` bytes, in pieces of equal size."""
    per_mask = height * width * per_pixel
    assert per_mask <= limit, f"one mask of {height}x{width} needs more than {limit} bytes (GPU_MEM_LIMIT)"
    return math.ceil(count / math.ceil(count * per_mask / limit))


def _pixels(values: Tensor, threshold: float) -> Tensor:
    return values >= threshold if threshold >= 0 else (values * 255).to(torch.uint8)


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
        y_ranges, x_ranges = _touched_ranges(boxes[:, 1::2], img_h), _touched_ranges(boxes[:, 0::2], img_w)
        y_range, x_range = (
            (min(first for first, _ in ranges), max(last for _, last in ranges))
            for ranges in (y_ranges, x_ranges)
        )
    rows = _sample_positions(*y_range, boxes[:, 1], boxes[:, 3])  # (N, h)
    columns = _sample_positions(*x_range, boxes[:, 0], boxes[:, 2])  # (N, w)
    return _sample(masks, rows, columns), (slice(*y_range), slice(*x_range)) if skip_empty else ()


def _sample(masks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values (N, h, w) of N masks at their rows (N, h) and columns (N, w), counted as grid_sample does."""
    shape = [len(masks), rows.shape[1], columns.shape[1]]
    grid = torch.stack((columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)), dim=3)
    single_channel = masks.reshape(len(masks), 1, masks.shape[-2], masks.shape[-1]).to(torch.float32)
    return F.grid_sample(single_channel, grid.to(torch.float32), align_corners=False)[:, 0]


def _touched_ranges(ends: Tensor, limit: int) -> list[tuple[int, int]]:
    """For each row (low, high) of (N, 2): its first pixel and the one after its last, inside the image.

    With one more on each side for the interpolation.
    """
    first, last = ends[:, 0].floor() - 1, ends[:, 1].ceil() + 1
    pairs: list[list[float]] = torch.stack((first, last), dim=1).clamp(0, limit).tolist()
    return [(int(pair[0]), max(int(pair[0]), int(pair[1]))) for pair in pairs]


def _sample_positions(start: int, end: int, low: Tensor, high: Tensor) -> Tensor:
    """Pixel centres along one axis as grid_sample counts: -1 and 1 are the sides of the box."""
    centers = torch.arange(start, end, device=low.device, dtype=torch.float32) + 0.5
    position = (centers - low[:, None]) / (high - low)[:, None] * 2 - 1
    # Any value beyond +-2 samples nothing. Boxes without width give inf, or 0/0 on the box itself.
    return position.clamp_(-2, 2).nan_to_num_(nan=-2.0)


def paste_mask_in_image_old(mask: Tensor, box: Tensor, img_h: int, img_w: int, threshold: float) -> Tensor:
    """How masks were pasted before ``paste_masks_in_image``, for comparison: onto a box of whole pixels.

    Its last pixels belong to the box too, so it shifts masks by half a pixel and enlarges them by up to one.

    Args:
        mask: (M, M) in 0..1.
        box: (4,) XYXY pixels, rounded towards zero.
        img_h, img_w: size of the image in pixels.
        threshold: a pixel is set when its value is above this; negative: no threshold.
    Returns:
        (img_h, img_w) uint8: 0 and 1; 0..255 for a negative threshold.
    """
    left, top, right, bottom = (int(side) for side in box.tolist())
    resized = Image.fromarray(mask.cpu().numpy()).resize(
        (right - left + 1, bottom - top + 1), resample=Image.Resampling.BILINEAR
    )
    values = np.asarray(resized)
    pixels = torch.from_numpy(values > threshold if threshold >= 0 else values * 255).to(torch.uint8)
    pasted = torch.zeros(img_h, img_w, dtype=torch.uint8)
    y0, y1 = max(top, 0), max(min(bottom + 1, img_h), 0)
    x0, x1 = max(left, 0), max(min(right + 1, img_w), 0)
    if y0 < y1 and x0 < x1:
        pasted[y0:y1, x0:x1] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    return pasted


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
