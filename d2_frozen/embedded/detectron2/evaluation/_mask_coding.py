"""How do masks become COCO's run lengths, quickly?

The format (https://github.com/cocodataset/cocoapi, maskApi): pixels in column order, lengths of alternating runs of 0
and 1 beginning with 0, from the fourth on as difference to the one before last, five bits per character. The result
is what ``pycocotools.mask.encode`` gives; it is faster because it looks for runs only where the mask is, and writes the
characters of all masks of an image at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["encode_masks"]

_BITS, _SIGN, _MORE, _FIRST_CHARACTER = 5, 16, 32, 48


def encode_masks(masks: torch.Tensor, boxes: torch.Tensor) -> list[dict[str, Any]]:
    """Compressed RLEs that json can hold.

    Args:
        masks: (N, H, W) on the CPU, bool or 0 and 1.
        boxes: (N, 4) XYXY pixels, around the masks; a mask that reaches out of its box is coded all the same.
    Returns:
        N dicts with "size" [H, W] and "counts", a str.
    """
    count, height, width = masks.shape
    if count == 0:
        return []
    pixels = masks.contiguous().numpy()
    if pixels.dtype != np.bool_:
        pixels = pixels != 0
    ends = []
    for mask, window in zip(pixels, _windows(boxes, height, width)):
        found = _run_ends(mask, window)
        if (found[1::2] - found[: 2 * (len(found) // 2) : 2]).sum() != np.count_nonzero(mask):
            found = _run_ends(mask, (0, 0, width, height))
        ends.append(found)
    texts = _characters(*_run_lengths(ends))
    return [{"size": [height, width], "counts": text} for text in texts]


def _windows(boxes: torch.Tensor, height: int, width: int) -> list[list[int]]:
    """(N, 4) -> [x0, y0, x1, y1] of whole pixels, with one pixel to spare, inside the image."""
    corners = np.nan_to_num(boxes.detach().double().numpy())
    limits = [width, height, width, height]
    corners = np.concatenate([np.floor(corners[:, :2]) - 1, np.ceil(corners[:, 2:]) + 1], axis=1)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2])
    return np.clip(corners, 0, limits).astype(np.int64).tolist()


def _run_ends(mask: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """Where the runs of one (H, W) mask end, in column order; the last end is the number of pixels.

    What lies outside of the window counts as 0.
    """
    height, width = mask.shape
    x0, y0, x1, y1 = window
    rows, columns = y1 - y0, x1 - x0
    # A row of zeros above and below, so that every run has a beginning and an end in its column.
    framed = np.zeros((rows + 2, columns), dtype=np.bool_)
    framed[1:-1] = mask[y0:y1, x0:x1]
    changes = (framed[1:] != framed[:-1]).ravel().nonzero()[0]
    row = changes // max(columns, 1)
    ends = (changes - row * columns + x0) * height + (row + y0)
    ends.sort()
    if rows == height:
        # A run that goes on in the next column ended and began at one place: it does neither.
        meets = (ends[1:] == ends[:-1]).nonzero()[0]
        if len(meets):
            ends = np.delete(ends, np.concatenate([meets, meets + 1]))
    if len(ends) and ends[-1] == height * width:
        return ends
    return np.concatenate([ends, [height * width]])


def _run_lengths(ends: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(lengths of the runs of all masks, number of runs of each mask)."""
    counts = np.array([len(e) for e in ends])
    flat = np.concatenate(ends)
    before = np.concatenate([[0], flat[:-1]])
    before[np.cumsum(counts)[:-1]] = 0
    return flat - before, counts


def _characters(lengths: np.ndarray, counts: np.ndarray) -> list[str]:
    """The runs of each mask as text."""
    starts = np.cumsum(counts) - counts
    place = np.arange(len(lengths)) - np.repeat(starts, counts)
    values = lengths.copy()
    values[2:] -= np.where(place[2:] > 2, lengths[:-2], 0)
    groups, used = [], []
    more = np.ones(len(values), dtype=np.bool_)
    while more.any():
        used.append(more)
        low = values & (2**_BITS - 1)
        values = values >> _BITS
        more = more & np.where(low & _SIGN, values != -1, values != 0)
        groups.append(low + _MORE * more + _FIRST_CHARACTER)
    written = np.stack(used, axis=1)
    text = np.stack(groups, axis=1).astype(np.uint8)[written].tobytes().decode("ascii")
    stops = np.cumsum(np.add.reduceat(written.sum(axis=1), starts)).tolist()
    return [text[start:stop] for start, stop in zip([0, *stops[:-1]], stops)]
