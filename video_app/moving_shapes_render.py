"""What do the generated clips show? A textured shape on a textured ground that moves, turns, hurries, or changes.

Classes come in pairs, and a pair is one kind of scene, forwards or backwards: a video of the second class is a video of
the first shown in reverse. So the set of frames, without its order, has exactly the same distribution in both, and
nothing that ignores order beats one half on a pair (but for what encoding leaves: the first frame is the key frame).
Shapes, colours, textures, sizes and places have the same distribution in every class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

# Two by two: a kind of scene forwards, and backwards.
CLASSES = (
    "move_left",
    "move_right",
    "move_up",
    "move_down",
    "rotate_clockwise",
    "rotate_counterclockwise",
    "speed_up",
    "slow_down",
    "grow_then_flash",
    "flash_then_grow",
)
# Outlines in a box of [-1, 1]; none looks the same after less than a full turn.
_SHAPES = (
    [(-1, -1), (-0.3, -1), (-0.3, 0.4), (0.9, 0.4), (0.9, 1), (-1, 1)],
    [(-0.9, 0.9), (0, -1), (0.9, 0.9), (0.2, 0.5)],
    [(-1, -0.3), (0.1, -0.3), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.3), (-1, 0.3)],
    [(-0.9, -0.9), (0.9, -0.9), (0.9, -0.2), (0, -0.2), (0, 1), (-0.9, 1)],
)
# (x, y, angle in radians clockwise, scale, how far the colours are inverted: 0 to 1) at each moment of [0, 1].
State = tuple[float, float, float, float, float]
Scene = Callable[[float], State]


def render(label: int, random: np.random.Generator, size_px: int, frames: int) -> Sequence[np.ndarray]:
    """The pictures of one video of a class.

    Args:
        label: index into ``CLASSES``.
    Returns:
        ``frames`` pictures of (size_px, size_px, 3) uint8, RGB.
    """
    ground = _texture(random, size_px, contrast=12)
    skin = _texture(random, size_px, contrast=24)
    # A shape that stands out: on the other side of middle grey.
    skin = np.clip(skin.astype(int) + (110 if ground.mean() < 128 else -110), 0, 255).astype(np.uint8)
    outline = np.array(_SHAPES[int(random.integers(len(_SHAPES)))])
    scene = _SCENES[label // 2](random)
    moments = np.linspace(0, 1, frames)
    pictures = [_draw(ground, skin, outline, scene(float(t))) for t in moments]
    return pictures if label % 2 == 0 else pictures[::-1]


def _sideways(random: np.random.Generator) -> Scene:
    """To the left."""
    (x0, y, angle, scale), reach = _start(random), random.uniform(0.4, 0.55)
    x0 = random.uniform(0.22, 0.78 - reach) + reach
    return lambda t: (x0 - reach * t, y, angle, scale, 0.0)


def _upwards(random: np.random.Generator) -> Scene:
    (x, y0, angle, scale), reach = _start(random), random.uniform(0.4, 0.55)
    y0 = random.uniform(0.22, 0.78 - reach) + reach
    return lambda t: (x, y0 - reach * t, angle, scale, 0.0)


def _turning(random: np.random.Generator) -> Scene:
    """Clockwise, by half a turn to a full one."""
    (x, y, angle, scale), turn = _start(random), random.uniform(1.0, 2.0) * math.pi
    return lambda t: (x, y, angle + turn * t, scale, 0.0)


def _hurrying(random: np.random.Generator) -> Scene:
    """Aslant, in any of the four directions, at a speed that grows with the square of time."""
    (_, _, angle, scale), reach = _start(random), random.uniform(0.45, 0.55)
    right, down = random.choice([-1, 1], 2)
    x0, y0 = (random.uniform(0.22, 0.78 - reach) + (reach if sign < 0 else 0) for sign in (right, down))
    return lambda t: (x0 + right * reach * t**3, y0 + down * reach * t**3, angle, scale, 0.0)


def _events(random: np.random.Generator) -> Scene:
    """It swells, and later its colours flip; at some moment in the first and in the second half."""
    x, y, angle, scale = _start(random)
    swell, flash = random.uniform(0.2, 0.3), random.uniform(0.7, 0.8)

    def bump(t: float, middle: float) -> float:
        return max(0.0, math.cos((t - middle) / 0.17 * math.pi / 2)) if abs(t - middle) < 0.17 else 0.0

    return lambda t: (x, y, angle, scale * (1 + 0.7 * bump(t, swell)), bump(t, flash))


_SCENES = (_sideways, _upwards, _turning, _hurrying, _events)


def _start(random: np.random.Generator) -> tuple[float, float, float, float]:
    """Place (share of the picture), angle and size of a shape at rest."""
    x, y = random.uniform(0.22, 0.78, 2)
    return float(x), float(y), float(random.uniform(0, 2 * math.pi)), float(random.uniform(0.13, 0.19))


def _texture(random: np.random.Generator, size_px: int, contrast: float) -> np.ndarray:
    """A colour with coarse and fine random stains."""
    colour = random.uniform(60, 195, 3)
    picture = np.empty((size_px, size_px, 3), np.float32)
    picture[:] = colour
    for cells in (4, 16):
        stains = random.normal(0, contrast / 3, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(stains, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _draw(ground: np.ndarray, skin: np.ndarray, outline: np.ndarray, state: State) -> np.ndarray:
    x, y, angle, scale, light = state
    size_px = len(ground)
    cos, sin = math.cos(angle), math.sin(angle)
    turned = outline @ np.array([[cos, sin], [-sin, cos]])  # clockwise, since y points down
    corners = (turned * scale + (x, y)) * size_px
    mask = np.zeros((size_px, size_px), np.uint8)
    # Sixteenths of a pixel: at whole ones, slow motion would stand and jump.
    cv2.fillPoly(mask, [np.round(corners * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    # The texture moves and turns with the shape.
    move = np.array([[cos, -sin, 0], [sin, cos, 0]], np.float32)
    centre = np.array([x, y]) * size_px
    move[:, 2] = centre - move[:, :2] @ (np.array([0.5, 0.5]) * size_px)
    moved = cv2.warpAffine(
        skin, move, (size_px, size_px), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    lit = moved + (255 - 2 * moved.astype(np.float32)) * np.float32(light)
    share = mask[..., None].astype(np.float32) / 255
    return np.round(lit * share + ground * (1 - share)).astype(np.uint8)
