"""Outlines of 64 shape classes, each a formula with its own parameters.

In: (class, random generator of the instance).  Out: closed curves around the origin, radius about 1.
Families, 16 classes each: plane figures; radial contours as in RCDB (arXiv:2206.09132); visual atoms, i.e.
nested sinusoidal orbits (arXiv:2303.01112); attractors of iterated function systems as in FractalDB
(arXiv:2101.08515).
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

FAMILIES = ("figure", "contour", "atom", "fractal")
CLASSES_PER_FAMILY = 16
NUM_SHAPES = len(FAMILIES) * CLASSES_PER_FAMILY

_CURVE_POINTS = 72
_FRACTAL_INSTANCES = 12
_FRACTAL_SIDE_PX = 96


class ShapeClasses:
    """The formulas of all classes, fixed by one seed.

    Args:
        seed: other seeds give other contours, atoms and fractals; the plane figures stay.
    """

    def __init__(self, seed: int) -> None:
        self._contours = [_contour_formula(_class_rng(seed, 1, k)) for k in range(CLASSES_PER_FAMILY)]
        self._atoms = [_atom_formula(_class_rng(seed, 2, k)) for k in range(CLASSES_PER_FAMILY)]
        self._fractals = [_fractal_outlines(_class_rng(seed, 3, k)) for k in range(CLASSES_PER_FAMILY)]

    def outlines(self, shape: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Curves of one instance.

        Args:
            shape: class, 0 <= shape < NUM_SHAPES.
            rng: what varies inside the class.
        Returns:
            Curves, each (N, 2) float32 xy. All are filled (even-odd); of an atom only the first is, and the
            others lie inside it.
        """
        family, k = divmod(shape, CLASSES_PER_FAMILY)
        if family == 0:
            points = np.asarray(_FIGURES[k](rng), np.float32)
            return [points / np.abs(points).max()]
        if family == 1:
            return [_orbit(self._contours[k], 1.0, rng)]
        if family == 2:
            formula = self._atoms[k]
            return [_orbit(formula, radius, rng) for radius in np.linspace(1.0, 0.25, formula["orbits"])]
        return self._fractals[k][rng.integers(len(self._fractals[k]))]

    @staticmethod
    def has_inner_orbits(shape: int) -> bool:
        return shape // CLASSES_PER_FAMILY == FAMILIES.index("atom")


def _class_rng(seed: int, family: int, k: int) -> np.random.Generator:
    return np.random.default_rng((seed, family, k))


# ---- plane figures ----
def _regular(corners: int) -> Callable:
    def points(rng: np.random.Generator) -> np.ndarray:
        angle = np.arange(corners) * 2 * np.pi / corners
        return np.stack([np.sin(angle), -np.cos(angle)], 1)

    return points


def _star(tips: int, waist: tuple[float, float]) -> Callable:
    def points(rng: np.random.Generator) -> np.ndarray:
        angle = np.arange(2 * tips) * np.pi / tips
        radius = np.where(np.arange(2 * tips) % 2 == 0, 1.0, rng.uniform(*waist))
        return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)

    return points


def _rectangle(aspect: tuple[float, float]) -> Callable:
    def points(rng: np.random.Generator) -> np.ndarray:
        a = rng.uniform(*aspect)
        return np.array([[-1, -a], [1, -a], [1, a], [-1, a]])

    return points


def _cross(rng: np.random.Generator) -> np.ndarray:
    t = rng.uniform(0.2, 0.4)
    quarter = [
        [t, -1],
        [t, -t],
        [1, -t],
        [1, t],
        [t, t],
        [t, 1],
        [-t, 1],
        [-t, t],
        [-1, t],
        [-1, -t],
        [-t, -t],
        [-t, -1],
    ]
    return np.array(quarter)


def _arrow(rng: np.random.Generator) -> np.ndarray:
    t, head = rng.uniform(0.15, 0.35), rng.uniform(-0.1, 0.3)
    return np.array([[-1, -t], [head, -t], [head, -0.8], [1, 0], [head, 0.8], [head, t], [-1, t]])


def _angle_bar(rng: np.random.Generator) -> np.ndarray:
    t = rng.uniform(0.4, 0.8)
    return np.array([[-1, -1], [-1 + t, -1], [-1 + t, 1 - t], [1, 1 - t], [1, 1], [-1, 1]])


def _tee(rng: np.random.Generator) -> np.ndarray:
    t = rng.uniform(0.4, 0.7)
    return np.array(
        [
            [-1, -1],
            [1, -1],
            [1, -1 + t],
            [t / 2, -1 + t],
            [t / 2, 1],
            [-t / 2, 1],
            [-t / 2, -1 + t],
            [-1, -1 + t],
        ]
    )


def _ellipse(aspect: tuple[float, float]) -> Callable:
    def points(rng: np.random.Generator) -> np.ndarray:
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        return np.stack([np.cos(angle), rng.uniform(*aspect) * np.sin(angle)], 1)

    return points


def _half_disc(rng: np.random.Generator) -> np.ndarray:
    angle = np.linspace(0, np.pi, 24)
    return np.stack([np.cos(angle), np.sin(angle) - 0.4], 1)


def _crescent(rng: np.random.Generator) -> np.ndarray:
    outer, inner = np.linspace(-2.2, 2.2, 28), np.linspace(2.2, -2.2, 28)
    bite = rng.uniform(0.3, 0.55)
    out = np.stack([np.cos(outer), np.sin(outer)], 1)
    inn = np.stack([np.cos(inner) * (1 - bite) - bite * 0.59, np.sin(inner) * 0.98], 1)
    return np.concatenate([out, inn])


_FIGURES: tuple[Callable, ...] = (
    _regular(3),
    lambda rng: np.array([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),
    _rectangle((0.9, 1.0)),
    _rectangle((0.25, 0.5)),
    _regular(5),
    _regular(6),
    _star(4, (0.25, 0.5)),
    _star(5, (0.35, 0.5)),
    _star(8, (0.5, 0.7)),
    _cross,
    _arrow,
    _angle_bar,
    _tee,
    _ellipse((0.9, 1.0)),
    _half_disc,
    _crescent,
)


# ---- contours and atoms ----
def _contour_formula(rng: np.random.Generator) -> dict:
    waves = rng.integers(2, 5)
    return {
        "frequencies": rng.choice(np.arange(2, 12), size=waves, replace=False),
        "amplitudes": rng.uniform(0.08, 0.3, size=waves),
        "phases": rng.uniform(0, 2 * np.pi, size=waves),
    }


def _atom_formula(rng: np.random.Generator) -> dict:
    return {
        "frequencies": rng.choice(np.arange(3, 20), size=2, replace=False),
        "amplitudes": rng.uniform(0.05, 0.2, size=2),
        "phases": rng.uniform(0, 2 * np.pi, size=2),
        "orbits": int(rng.integers(3, 7)),
    }


def _orbit(formula: dict, radius: float, rng: np.random.Generator) -> np.ndarray:
    """r(angle) = radius * (1 + sum of waves), amplitudes jittered by 15 %."""
    angle = np.linspace(0, 2 * np.pi, _CURVE_POINTS, endpoint=False)
    amplitudes = formula["amplitudes"] * rng.uniform(0.85, 1.15, size=len(formula["amplitudes"]))
    waves = np.sin(formula["frequencies"][:, None] * angle + formula["phases"][:, None])
    r = 1.0 + amplitudes @ waves
    r *= radius / (1.0 + amplitudes.sum())
    return np.stack([r * np.cos(angle), r * np.sin(angle)], 1).astype(np.float32)


# ---- fractals ----
def _fractal_outlines(rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Outlines of one attractor under small changes of its maps; drawn again until it fills its box well."""
    while True:
        maps = int(rng.integers(2, 5))
        matrices = rng.uniform(-1.0, 1.0, size=(maps, 2, 2))
        norms = np.linalg.norm(matrices, ord=2, axis=(1, 2))
        matrices *= (rng.uniform(0.45, 0.85, size=maps) / norms)[:, None, None]
        offsets = rng.uniform(-1.0, 1.0, size=(maps, 2))
        base = _attractor_outline(matrices, offsets, rng)
        if base is None:
            continue
        instances = [base]
        for _ in range(4 * _FRACTAL_INSTANCES):
            jitter = rng.uniform(0.92, 1.08, size=matrices.shape)
            outline = _attractor_outline(matrices * jitter, offsets, rng)
            if outline is not None:
                instances.append(outline)
            if len(instances) == _FRACTAL_INSTANCES:
                return instances


def _attractor_outline(
    matrices: np.ndarray, offsets: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray] | None:
    points = np.zeros((1500, 2))
    for step in range(18):
        choice = rng.integers(len(matrices), size=len(points))
        points = np.einsum("nij,nj->ni", matrices[choice], points) + offsets[choice]
        if step == 14:
            cloud = [points]
        elif step > 14:
            cloud.append(points)
    xy = np.concatenate(cloud)
    low, high = np.percentile(xy, 1, axis=0), np.percentile(xy, 99, axis=0)
    extent = (high - low).max()
    if not np.isfinite(extent) or (high - low).min() < 0.3 * extent:
        return None
    side = _FRACTAL_SIDE_PX
    pixel = np.round((xy - (low + high) / 2) / extent * (side - 12) + side / 2).astype(int)
    inside = ((pixel >= 2) & (pixel < side - 2)).all(1)
    canvas = np.zeros((side, side), np.uint8)
    canvas[pixel[inside, 1], pixel[inside, 0]] = 255
    canvas = cv2.morphologyEx(canvas, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    found, _ = cv2.findContours(canvas, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    curves = [c[:, 0].astype(np.float32) for c in found if cv2.contourArea(c) > 25]
    if not curves or sum(cv2.contourArea(c) for c in curves) < 0.12 * side * side:
        return None
    return [(c - side / 2) / (side / 2) for c in curves]
