"""Text in pictures: in DejaVu Sans, which has the letters of most alphabets (not of Chinese, Japanese, Korean).

OpenCV's fonts have ASCII alone, as has the one that comes with Pillow.
"""

from __future__ import annotations

import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


def put_text(picture: np.ndarray, text: str, place: tuple[int, int], size: int, colour: Colour) -> None:
    """Write a line into a picture, in place; what lies outside is left out.

    Args:
        picture: (H, W, 3) uint8.
        place: (x, y) of the left end of the line on which the letters stand.
        size: of the font, in pixels: capitals have three quarters of it.
    """
    x, y = place
    left, top, right, bottom = _font(size).getbbox(text, anchor="ls")
    x0, x1 = max(0, x + int(left) - 1), min(picture.shape[1], x + int(right) + 2)
    y0, y1 = max(0, y + int(top) - 1), min(picture.shape[0], y + int(bottom) + 2)
    if x0 < x1 and y0 < y1:
        part = Image.fromarray(picture[y0:y1, x0:x1])
        ImageDraw.Draw(part).text((x - x0, y - y0), text, fill=colour, font=_font(size), anchor="ls")
        picture[y0:y1, x0:x1] = np.asarray(part)


def text_width(text: str, size: int) -> int:
    """Pixels of a line."""
    return round(_font(size).getlength(text))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings the font along

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
