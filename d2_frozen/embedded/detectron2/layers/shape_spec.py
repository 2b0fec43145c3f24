"""What one module tells the next about a feature map before any tensor exists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """Each value may be None: not known, or different from image to image.

    ``height`` and ``width`` are in cells, ``stride`` is in input pixels per cell.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
