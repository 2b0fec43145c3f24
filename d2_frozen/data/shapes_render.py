"""One picture of the generated world: what is drawn, and which pixel belongs to which shape.

In: (seed, split, index, size).  Out: ``Scene``: RGB image, instance map of the visible pixels, classes.
Shapes lie on a cluttered ground in painter's order; each keeps enough visible pixels to be a fair target.
"""

from __future__ import annotations

import colorsys
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import RandomState

CLASSES = ("disk", "square", "triangle", "star", "ring", "cross")

_EXTENT_PX = (40.0, 120.0)  # long side of a shape's box, drawn log-uniformly
_MIN_VISIBLE = 0.6  # of a shape's own pixels, after everything on top of it
# A class has its shape, within this turn either way, and its part of the colour circle. Told apart by shape alone,
# six classes take longer to learn than a quickstart on two CPU cores may last.
_MAX_TURN = np.pi / 4
_HUE_SPREAD = 0.3  # of the distance between two classes' hues
_SUBPIXEL_BITS = 6  # OpenCV's fixed-point drawing coordinates


@dataclass(frozen=True)
class Scene:
    """image: (H, W, 3) uint8 RGB; instances: (H, W) uint8, 0 or 1 + shape; classes: ids in CLASSES."""

    image: np.ndarray
    instances: np.ndarray
    classes: tuple[int, ...]


def render(seed: int, split: str, index: int, size: int = 256) -> Scene:
    """The picture (seed, split, index); ``size`` is its long side in pixels, the short one is 75% or more."""
    # RandomState's streams are frozen across numpy versions, those of Generator are not.
    rng = RandomState(zlib.crc32(f"{seed}/{split}/{index}".encode()))
    short = int(round(size * rng.uniform(0.75, 1.0)))
    height, width = (short, size) if rng.random_sample() < 0.6 else (size, short)
    canvas = _ground(rng, height, width)
    instances = np.zeros((height, width), dtype=np.uint8)
    full_areas: list[int] = []
    classes: list[int] = []
    for _ in range(rng.randint(2, 6)):
        for _attempt in range(12):
            class_id = int(rng.randint(len(CLASSES)))
            coverage = _place(rng, class_id, height, width, size / 256)
            after = np.where(coverage >= 128, np.uint8(len(classes) + 1), instances)
            areas = [*full_areas, int(np.count_nonzero(coverage >= 128))]
            visible = np.bincount(after.ravel(), minlength=len(areas) + 1)[1:]
            if (visible >= _MIN_VISIBLE * np.array(areas)).all() and areas[-1] >= 100:
                _paint(rng, canvas, coverage, class_id)
                instances, full_areas = after, areas
                classes.append(class_id)
                break
    canvas += rng.standard_normal((height, width, 1)).astype(np.float32) * 0.012
    return Scene((canvas.clip(0, 1) * 255).round().astype(np.uint8), instances, tuple(classes))


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32)


def _noise(rng: RandomState, height: int, width: int, coarsest: int, octaves: int) -> np.ndarray:
    """(height, width) float32 in [0, 1]: octaves of upsampled random grids, each half as strong."""
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(octaves):
        cells = coarsest << octave
        grid = rng.random_sample((cells + 1, cells + 1)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / (1 << octave)
    low, high = total.min(), total.max()
    return (total - low) / max(float(high - low), 1e-9)


def _ground(rng: RandomState, height: int, width: int) -> np.ndarray:
    """Muted cloudy ground with soft patches, scratches and grains: (height, width, 3) float32 in [0, 1]."""
    hue = rng.random_sample()
    value = rng.uniform(0.22, 0.80)
    dark = _rgb(hue, rng.uniform(0.15, 0.45), value)
    light = _rgb(hue + 0.07, rng.uniform(0.08, 0.30), min(value + rng.uniform(0.12, 0.25), 0.95))
    tint = _rgb(hue + 0.19, rng.uniform(0.15, 0.40), min(value + 0.1, 0.9))
    cloud = _noise(rng, height, width, int(rng.randint(2, 5)), 5)[..., None]
    patches = _noise(rng, height, width, 3, 2)[..., None]
    canvas = dark + (light - dark) * cloud
    canvas += (tint - canvas) * np.clip((patches - 0.55) * 3, 0, 0.8)
    canvas += _clutter(rng, height, width)[..., None]
    return canvas * (0.92 + 0.16 * _noise(rng, height, width, 48, 2)[..., None])


def _clutter(rng: RandomState, height: int, width: int) -> np.ndarray:
    """Faint curved scratches, and grains of 1 to 5 pixels radius, too small to be taken for a shape."""
    ink = np.full((height, width), 128, dtype=np.uint8)
    for _ in range(rng.randint(6, 18)):
        headings = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.25, 0.25) * np.arange(14)
        path = np.cumsum(np.stack([np.cos(headings), np.sin(headings)], axis=1), axis=0) * rng.uniform(3, 9)
        path += rng.random_sample(2) * (width, height)
        grey, thickness = 128 + int(rng.randint(-40, 41)), int(rng.randint(1, 4))
        cv2.polylines(ink, [_fixed_point(path)], False, grey, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for _ in range(rng.randint(20, 60)):
        grain = rng.random_sample(2) * (width, height) + circle * rng.uniform(1, 5) * rng.uniform(0.5, 1.0, 2)
        grey = 128 + int(rng.randint(-46, 47))
        cv2.fillPoly(ink, [_fixed_point(grain)], grey, cv2.LINE_AA, _SUBPIXEL_BITS)
    return (ink.astype(np.float32) - 128) / 255


def _outlines(rng: RandomState, class_id: int) -> list[np.ndarray]:
    """Outlines around the origin, (n, 2) each, radius about 1; a second one is a hole."""
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    name = CLASSES[class_id]
    if name == "disk":
        return [circle]
    if name == "ring":
        return [circle, circle * rng.uniform(0.48, 0.66)]
    if name == "square":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8]
    if name == "triangle":
        corners = np.array([0, 2 / 3, 4 / 3]) * np.pi + rng.uniform(-0.18, 0.18, 3)
        return [np.stack([np.cos(corners), np.sin(corners)], axis=1)]
    if name == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, rng.uniform(0.38, 0.50), 1.0)
        return [np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]]
    arm = rng.uniform(0.28, 0.40)
    corner = np.array([[-arm, -1], [arm, -1], [arm, -arm]])
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])  # clockwise on the screen
    sides = [corner]
    for _ in range(3):
        sides.append(sides[-1] @ quarter.T)
    return [np.concatenate(sides)]


def _place(rng: RandomState, class_id: int, height: int, width: int, scale: float) -> np.ndarray:
    """(height, width) uint8 coverage, 255 inside, of a shape turned, stretched and placed at random."""
    outlines = _outlines(rng, class_id)
    angle, stretch = rng.uniform(-_MAX_TURN, _MAX_TURN), np.exp(rng.uniform(-0.16, 0.16))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rotation @ np.diag([stretch, 1 / stretch])
    outlines = [outline @ linear.T for outline in outlines]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    extent = scale * np.exp(rng.uniform(*np.log(_EXTENT_PX)))
    factor = extent / (high - low).max()
    # Up to an eighth of the shape may leave the picture.
    half = (high - low) * factor * 0.5
    centre = half * 0.75 + rng.random_sample(2) * (np.array([width, height]) - 1.5 * half)
    shift = centre - (low + high) * 0.5 * factor
    coverage = np.zeros((height, width), dtype=np.uint8)
    points = [_fixed_point(outline * factor + shift) for outline in outlines]
    cv2.fillPoly(coverage, points, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return coverage


def _paint(rng: RandomState, canvas: np.ndarray, coverage: np.ndarray, class_id: int) -> None:
    """Lay a shape with texture, light from one side and a soft shadow on the canvas, in place."""
    hue = (class_id + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)) / len(CLASSES)
    value = rng.uniform(0.72, 1.0)
    first = _rgb(hue, rng.uniform(0.55, 0.92), value)
    second = _rgb(hue + rng.uniform(-0.03, 0.03), rng.uniform(0.25, 0.85), value * rng.uniform(0.55, 0.85))
    heading = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(heading), np.sin(heading)])
    shadow_shift = rng.uniform(1.5, 4.0) * -light

    # All of it happens in the shape's box and a margin for the shadow.
    columns, rows = np.flatnonzero(coverage.any(axis=0)), np.flatnonzero(coverage.any(axis=1))
    margin = 12
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    window = np.s_[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]
    alpha = coverage[window].astype(np.float32) / 255
    height, width = alpha.shape

    colour = first + (second - first) * _texture(rng, height, width)[..., None]
    inside = coverage[window] >= 128
    rim = np.clip(cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3) / 3, 0, 1)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    slope = light[0] * xs + light[1] * ys
    slope = (slope - slope[inside].mean()) / (slope[inside].std() + 1e-6)
    colour *= ((0.62 + 0.38 * rim) * (1 + 0.09 * np.clip(slope, -1.8, 1.8)))[..., None]

    move = np.array([[1, 0, shadow_shift[0]], [0, 1, shadow_shift[1]]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, move, (width, height)), (0, 0), 2.5)
    under = canvas[window] * (1 - 0.45 * shadow)[..., None]
    canvas[window] = under + (colour - under) * alpha[..., None]


def _texture(rng: RandomState, height: int, width: int) -> np.ndarray:
    """(height, width) in [0, 1]: plain, stripes, checks, dots or marble, turned at random."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(7, 16)
    ys, xs = np.mgrid[0:height, 0:width] * (2 * np.pi / period)
    u, v = np.cos(angle) * xs + np.sin(angle) * ys, np.cos(angle) * ys - np.sin(angle) * xs
    kind = rng.randint(6)
    if kind == 0:
        wave = np.sin(u)
    elif kind == 1:
        wave = np.sin(u) * np.sin(v) * 1.5
    elif kind == 2:
        wave = np.cos(u) + np.cos(v) - 0.9
    elif kind == 3:
        wave = np.sin(0.5 * u + 6 * _noise(rng, height, width, 4, 3))
    else:
        return 0.35 * _noise(rng, height, width, 6, 3)
    return 1 / (1 + np.exp(-4 * wave))


def _fixed_point(points: np.ndarray) -> np.ndarray:
    """Pixel-edge coordinates -> OpenCV's fixed-point ones, in which a pixel's centre is an integer."""
    return np.round((points - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
