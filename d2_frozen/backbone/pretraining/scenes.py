"""Generated scenes with a label at every pixel: textured, lit, overlapping shapes on textured grounds.

In: (seed, index, side).  Out: `Scene`; the same three numbers always give the same scene.
Formula-driven supervised learning: every label is a parameter of the formula that drew the pixel; no photo,
no annotator.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from d2_frozen.backbone.pretraining.shapes import NUM_SHAPES, ShapeClasses
from d2_frozen.backbone.pretraining.textures import NUM_TEXTURES, SIDE_PX, draw_texture

IGNORE = 255
# Upper ends of the size classes: sqrt(box area) in pixels.
SIZE_EDGES_PX = (12, 20, 32, 52, 84)
NUM_SIZES = len(SIZE_EDGES_PX) + 1
NUM_PARTS = 9

_MAPS_PER_TEXTURE = 24


@dataclass(frozen=True)
class Scene:
    """Image and labels.

    image: (S, S, 3) uint8 RGB. labels: (4, S, S) uint8: shape (0 = ground, else 1 + class), texture, part
    (which ninth of its object's box, row-major; IGNORE on ground), size (class of SIZE_EDGES_PX; IGNORE on
    ground).
    """

    image: np.ndarray
    labels: np.ndarray


class SceneGenerator:
    """All scenes of one seed.

    Args:
        seed: fixes the shape classes, the texture maps and every scene.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.shapes = ShapeClasses(seed)
        self._maps = [
            [draw_texture(t, np.random.default_rng((seed, 7, t, i))) for i in range(_MAPS_PER_TEXTURE)]
            for t in range(NUM_TEXTURES)
        ]

    def scene(self, index: int, side: int) -> Scene:
        """Scene number ``index`` at ``side`` x ``side`` pixels."""
        rng = np.random.default_rng((self.seed, 11, index, side))
        canvas = np.empty((side, side, 3), np.float32)
        labels = np.full((4, side, side), IGNORE, np.uint8)
        self._paint_ground(canvas, labels, rng)
        crowded = rng.random() < 0.2
        for shape, centre, radius in _layout(rng, side, crowded):
            self._paint_object(canvas, labels, shape, centre, radius, rng)
        return Scene(_photometric(canvas, rng), labels)

    def _surface(
        self, texture: int, height: int, width: int, colours: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """(height, width, 3) float32 of a texture class between two colours."""
        source = self._maps[texture][rng.integers(_MAPS_PER_TEXTURE)]
        zoom = rng.uniform(0.6, 1.6)
        h, w = (int(np.clip(n * zoom, 4, SIDE_PX)) for n in (height, width))
        y, x = rng.integers(SIDE_PX - h + 1), rng.integers(SIDE_PX - w + 1)
        mix = cv2.resize(source[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_LINEAR)
        if rng.random() < 0.5:
            mix = mix[:, ::-1]
        table = colours[0] + (colours[1] - colours[0]) * (np.arange(256, dtype=np.float32) / 255)[:, None]
        return table[mix]

    def _paint_ground(self, canvas: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
        side = len(canvas)
        labels[0] = 0
        regions = rng.integers(2, 8)  # many small labels teach more per pixel than few large ones
        for region in range(regions):
            texture = int(rng.integers(NUM_TEXTURES))
            surface = self._surface(texture, side, side, _two_colours(rng, calm=True), rng)
            if region == 0:
                canvas[:] = surface
                labels[1] = texture
                continue
            mask = np.zeros((side, side), np.uint8)
            if rng.random() < 0.3:  # a half plane with a wavy edge, as a horizon
                t = np.linspace(-0.1, 1.1, 24)
                edge = rng.uniform(0.2, 0.8) + rng.uniform(0, 0.1) * np.sin(
                    rng.uniform(2, 16) * t + rng.uniform(0, 6)
                )
                points = np.concatenate([np.stack([t, edge], 1), [[1.1, 1.2], [-0.1, 1.2]]]) - 0.5
                turn = rng.choice([0.0, np.pi / 2, np.pi, -np.pi / 2]) + rng.normal(0, 0.15)
                points = (
                    points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * 1.4
                    + 0.5
                )
            else:  # a quadrilateral, as a wall or a board
                points = rng.uniform(0, 1, size=2) + rng.uniform(0.2, 0.6) * rng.uniform(-1, 1, size=(4, 2))
                points = points[cv2.convexHull(points.astype(np.float32), returnPoints=False)[:, 0]]
            cv2.fillPoly(mask, [np.round(points * side).astype(np.int32)], 255)
            inside = mask > 0
            canvas[inside] = surface[inside]
            labels[1][inside] = texture

    def _paint_object(
        self,
        canvas: np.ndarray,
        labels: np.ndarray,
        shape: int,
        centre: np.ndarray,
        radius: float,
        rng: np.random.Generator,
    ) -> None:
        side = len(canvas)
        warp = _random_affine(rng) * radius
        curves = [c @ warp.T + centre for c in self.shapes.outlines(shape, rng)]
        filled = curves[:1] if self.shapes.has_inner_orbits(shape) else curves
        extent = np.concatenate(filled)
        low, high = extent.min(0), extent.max(0)
        x0, y0 = np.maximum(np.floor(low).astype(int) - 4, 0)
        x1, y1 = np.minimum(np.ceil(high).astype(int) + 6, side)
        if x1 - x0 < 6 or y1 - y0 < 6:
            return
        height, width = y1 - y0, x1 - x0
        mask = np.zeros((height, width), np.uint8)
        fixed = [np.round((c - (x0, y0)) * 16).astype(np.int32) for c in curves]
        cv2.fillPoly(mask, fixed[: len(filled)], 255, lineType=cv2.LINE_AA, shift=4)

        texture = int(rng.integers(NUM_TEXTURES)) if rng.random() < 0.75 else 0
        colours = _two_colours(rng)
        paint = self._surface(texture, height, width, colours, rng)
        if rng.random() < 0.5:  # shading across the object
            slope = rng.uniform(-0.35, 0.35, size=2)
            light = (
                1
                + slope[0] * np.linspace(-1, 1, height)[:, None]
                + slope[1] * np.linspace(-1, 1, width)[None]
            )
            paint = paint * light[..., None].astype(np.float32)
        line = np.clip(colours.mean(0) * rng.uniform(0.1, 0.6) + rng.uniform(0, 60), 0, 255).tolist()
        if len(filled) < len(curves):
            paint = np.ascontiguousarray(paint)
            cv2.polylines(
                paint,
                fixed[1:],
                True,
                line,
                thickness=max(1, int(radius / 16)),
                lineType=cv2.LINE_AA,
                shift=4,
            )
        if rng.random() < 0.3:
            paint = np.ascontiguousarray(paint)
            cv2.polylines(
                paint,
                fixed[: len(filled)],
                True,
                line,
                thickness=int(rng.integers(1, 4)),
                lineType=cv2.LINE_AA,
                shift=4,
            )
        roi = canvas[y0:y1, x0:x1]
        if rng.random() < 0.3:  # shadow
            move = np.float32(
                [[1, 0, rng.uniform(-0.12, 0.12) * radius], [0, 1, rng.uniform(0, 0.15) * radius]]
            )
            shadow = cv2.GaussianBlur(
                cv2.warpAffine(mask, move, (width, height)), (0, 0), max(0.6, radius / 12)
            )
            roi *= 1 - (rng.uniform(0.3, 0.7) / 255) * shadow[..., None].astype(np.float32)
        alpha = mask[..., None].astype(np.float32) * (rng.uniform(0.85, 1.0) / 255)
        roi += alpha * (paint - roi)

        inside = mask > 127
        part_x = np.clip(3 * (np.arange(x0, x1) - low[0]) / (high[0] - low[0]), 0, 2).astype(np.uint8)
        part_y = np.clip(3 * (np.arange(y0, y1) - low[1]) / (high[1] - low[1]), 0, 2).astype(np.uint8)
        size = np.searchsorted(SIZE_EDGES_PX, np.sqrt(np.prod(high - low)), side="right")
        box = labels[:, y0:y1, x0:x1]
        box[0][inside] = shape + 1
        box[1][inside] = texture
        box[2][inside] = (3 * part_y[:, None] + part_x[None])[inside]
        box[3][inside] = size


def _layout(rng: np.random.Generator, side: int, crowded: bool) -> list[tuple[int, np.ndarray, float]]:
    """(shape class, centre xy, radius) of each object, all in pixels, large ones first."""
    if crowded:  # one class in rows, as windows on a wall
        shape = int(rng.integers(NUM_SHAPES))
        step = rng.uniform(22, 44)
        origin = rng.uniform(0, side, size=2)
        cells = [origin + step * np.array([i, j]) for i in range(-8, 9) for j in range(-8, 9)]
        cells = [c for c in cells if (c > 0).all() and (c < side).all()]
        keep = [c for c in cells if rng.random() < 0.7][:20]
        return [(shape, c + rng.normal(0, 0.05 * step, 2), step * rng.uniform(0.3, 0.42)) for c in keep]
    count = int(rng.integers(3, 11)) * (2 if side > 160 else 1)
    radius = np.exp(rng.uniform(np.log(6), np.log(0.4 * side), size=count))
    radius = np.sort(radius)[::-1]
    return [(int(rng.integers(NUM_SHAPES)), rng.uniform(0.05, 0.95, size=2) * side, float(r)) for r in radius]


def _random_affine(rng: np.random.Generator) -> np.ndarray:
    turn = rng.uniform(0, 2 * np.pi) if rng.random() < 0.5 else rng.normal(0, 0.15)
    stretch = np.exp(rng.uniform(-0.35, 0.35))
    c, s = np.cos(turn), np.sin(turn)
    shear = np.array([[1.0, rng.uniform(-0.25, 0.25)], [0.0, 1.0]])
    return np.array([[c, -s], [s, c]]) @ shear @ np.diag([stretch, 1 / stretch])


def _two_colours(rng: np.random.Generator, calm: bool = False) -> np.ndarray:
    """(2, 3) float32 RGB 0..255: vivid, muted or grey; calm pairs lie close together."""
    saturation = rng.choice([1.0, 0.5, 0.1])
    first = rng.uniform(0, 255, size=3)
    second = rng.uniform(0, 255, size=3)
    if calm or rng.random() < 0.3:
        second = first + rng.uniform(0.15, 0.6) * (second - first)
    pair = np.stack([first, second])
    grey = pair.mean(1, keepdims=True)
    return (grey + saturation * (pair - grey)).astype(np.float32)


def _photometric(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, lens, sensor and codec: uint8 RGB."""
    side = len(canvas)
    if rng.random() < 0.6:
        light = cv2.resize(
            rng.uniform(0.55, 1.3, size=(3, 3)).astype(np.float32),
            (side, side),
            interpolation=cv2.INTER_CUBIC,
        )
        canvas = canvas * light[..., None]
    canvas = canvas * rng.uniform(0.75, 1.25, size=3).astype(np.float32)
    grey = float(canvas.mean())
    canvas = (canvas - grey) * rng.uniform(0.6, 1.4) + grey + rng.normal(0, 15)
    if rng.random() < 0.08:
        canvas = np.repeat(canvas.mean(2, keepdims=True), 3, axis=2)
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.4))
    if rng.random() < 0.5:
        canvas = canvas + rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(1, 12)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))])
        image = cv2.imdecode(code, cv2.IMREAD_COLOR)
    return image
