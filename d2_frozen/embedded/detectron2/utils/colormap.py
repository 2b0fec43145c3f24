"""Colours that are easy to tell apart, for drawing.

The palette is computed: hues one golden angle apart never repeat, and lightness and saturation alternate so
that neighbours in the palette also differ without colour vision.
"""

from __future__ import annotations

import colorsys

import numpy as np

__all__ = ["colormap", "random_color", "random_colors"]

_SIZE = 80
_GOLDEN_RATIO = (5**0.5 - 1) / 2
# (saturation, value) in turn.
_TONES = ((0.85, 0.95), (0.55, 1.0), (1.0, 0.65), (0.75, 0.8))

_PALETTE = np.array(
    [colorsys.hsv_to_rgb((0.58 + k * _GOLDEN_RATIO) % 1.0, *_TONES[k % len(_TONES)]) for k in range(_SIZE)],
    dtype=np.float32,
)
# Its own generator: drawing a picture must not change the random numbers of a training run.
_draws = np.random.default_rng()


def colormap(rgb: bool = False, maximum: float = 255) -> np.ndarray:
    """The whole palette.

    Args:
        rgb: channel order RGB; BGR otherwise, as OpenCV has it.
        maximum: 255 or 1.
    Returns:
        (80, 3) float32 in 0..maximum.
    """
    _check_maximum(maximum)
    colors = _PALETTE * maximum
    return colors if rgb else colors[:, ::-1].copy()


def random_color(rgb: bool = False, maximum: float = 255) -> np.ndarray:
    """One colour of :func:`colormap`: (3,) float32."""
    return colormap(rgb, maximum)[_draws.integers(_SIZE)]


def random_colors(N: int, rgb: bool = False, maximum: float = 255) -> list[np.ndarray]:
    """``N`` different colours of :func:`colormap`; N is at most 80."""
    if N > _SIZE:
        raise ValueError(f"the palette has {_SIZE} colours, {N} different ones were asked for.")
    return list(colormap(rgb, maximum)[_draws.choice(_SIZE, N, replace=False)])


def _check_maximum(maximum: float) -> None:
    if maximum not in (1, 255):
        raise ValueError(f"maximum is 255 or 1, got {maximum}.")
