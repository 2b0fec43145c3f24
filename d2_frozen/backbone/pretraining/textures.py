"""Maps of 16 texture classes, values 0..1; a map mixes the two colours of a surface.

In: (class, random generator).  Out: (side, side) uint8, 0..255.  Orientation, period and phase vary
inside a class.
"""

from __future__ import annotations

import cv2
import numpy as np

SIDE_PX = 256


def draw_texture(texture: int, rng: np.random.Generator) -> np.ndarray:
    """One map of class ``texture``, (SIDE_PX, SIDE_PX) uint8."""
    values = _TEXTURES[texture](_Plane(rng), rng)
    values = np.clip(values, 0.0, 1.0)
    return (255 * np.broadcast_to(values, (SIDE_PX, SIDE_PX))).astype(np.uint8)


class _Plane:
    """Rotated pixel coordinates (u, v) and a period in pixels."""

    def __init__(self, rng: np.random.Generator) -> None:
        y, x = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32)
        angle = (
            rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.1) if rng.random() < 0.5 else rng.uniform(0, np.pi)
        )
        self.u = x * np.cos(angle) + y * np.sin(angle)
        self.v = -x * np.sin(angle) + y * np.cos(angle)
        self.period = float(np.exp(rng.uniform(np.log(7), np.log(34))))


def _wave(t: np.ndarray, sharpness: float) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(sharpness * np.sin(2 * np.pi * t))


def _blur_noise(rng: np.random.Generator, sigma_x: float, sigma_y: float | None = None) -> np.ndarray:
    noise = rng.standard_normal((SIDE_PX, SIDE_PX)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), sigma_x, sigmaY=sigma_y or sigma_x, borderType=cv2.BORDER_REFLECT)
    return noise / (noise.std() + 1e-6)


def _solid(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    return np.float32(rng.random()) + 0 * p.u


def _stripes(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    return _wave(p.u / p.period, rng.uniform(0.8, 6))


def _checker(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    return (np.floor(p.u / p.period) + np.floor(p.v / p.period)) % 2


def _cell(p: _Plane, aspect: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    return (p.u / p.period) % 1 - 0.5, (p.v / (p.period * aspect)) % 1 - 0.5


def _dots(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    a, b = _cell(p)
    return 0.5 + 0.5 * np.tanh((np.hypot(a, b) - rng.uniform(0.2, 0.4)) * 20)


def _grid(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    a, b = _cell(p)
    return (np.minimum(np.abs(a), np.abs(b)) < rng.uniform(0.05, 0.14)).astype(np.float32)


def _bricks(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(p.v / (p.period * 0.5))
    a = np.abs((p.u / p.period + 0.5 * (row % 2)) % 1 - 0.5)
    b = np.abs((p.v / (p.period * 0.5)) % 1 - 0.5)
    mortar = (a > 0.46) | (b > 0.42)
    tone = rng.random((97, 89))[np.int32(row) % 97, np.int32(np.floor(p.u / p.period + 0.5 * (row % 2))) % 89]
    return np.where(mortar, 1.0, 0.45 * tone)


def _linear(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    span = rng.uniform(60, 260)
    return np.abs(((p.u + rng.uniform(0, 512)) / span) % 2 - 1)


def _rings(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    radius = np.hypot(
        p.u - p.u[rng.integers(256), rng.integers(256)], p.v - p.v[rng.integers(256), rng.integers(256)]
    )
    return _wave(radius / p.period, rng.uniform(0.8, 5))


def _clouds(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    total = sum(2.0**-k * _blur_noise(rng, 24 * 2.0**-k) for k in range(4))
    return 0.5 + 0.3 * total


def _grain(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + 0.25 * _blur_noise(rng, rng.uniform(0.5, 1.3))


def _cells(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    count = int(np.clip((SIDE_PX / p.period) ** 2, 30, 500))
    seeds = np.full((SIDE_PX, SIDE_PX), 255, np.uint8)
    seeds[rng.integers(SIDE_PX, size=count), rng.integers(SIDE_PX, size=count)] = 0
    distance, label = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5)
    tone = rng.random(int(label.max()) + 1)[label]
    return tone if rng.random() < 0.5 else distance / (0.6 * p.period)


def _waves(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    bend = rng.uniform(0.2, 0.5) * p.period * np.sin(2 * np.pi * p.v / (p.period * rng.uniform(1.5, 3)))
    return _wave((p.u + bend) / p.period, rng.uniform(0.8, 5))


def _blotches(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    sigma = p.period / 4
    band = _blur_noise(rng, sigma) - _blur_noise(rng, 2 * sigma)
    return 0.5 + 0.5 * np.tanh(rng.uniform(1, 6) * band)


def _fibres(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    noise = _blur_noise(rng, rng.uniform(8, 20), rng.uniform(0.6, 1.4))
    if rng.random() < 0.5:
        noise = noise.T
    return 0.5 + 0.3 * noise


def _windows(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    a, b = _cell(p, rng.uniform(1.0, 1.8))
    w, h = rng.uniform(0.2, 0.36, size=2)
    pane = (np.abs(a) < w) & (np.abs(b) < h)
    bar = (np.abs(a) < 0.03) | (np.abs(b + 0.1) < 0.03)
    return np.where(pane & ~bar, 1.0, 0.1)


def _zigzag(p: _Plane, rng: np.random.Generator) -> np.ndarray:
    bend = p.period * rng.uniform(0.6, 1.2) * np.abs(((p.v / p.period) % 2) - 1)
    return _wave((p.u + bend) / p.period, rng.uniform(1.5, 6))


_TEXTURES = (
    _solid,
    _stripes,
    _checker,
    _dots,
    _grid,
    _bricks,
    _linear,
    _rings,
    _clouds,
    _grain,
    _cells,
    _waves,
    _blotches,
    _fibres,
    _windows,
    _zigzag,
)
NUM_TEXTURES = len(_TEXTURES)
