"""Binary mask -> COCO polygons that rasterise back to exactly that mask.

Vertices are pixel corners, so a polygon runs along pixel edges. A hole is joined to its outline by a cut of
zero width (there and back along one row), because COCO unites the polygons of an object.
"""

from __future__ import annotations

from collections import defaultdict

import cv2
import numpy as np

Point = tuple[int, int]
_RIGHT_TURN = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}  # x right, y down


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """(H, W) bool -> one flat [x0, y0, x1, y1, ...] per 4-connected part, in pixels; [] for an empty mask."""
    loops = _boundary_loops(mask)
    outlines = [loop for loop in loops if _signed_area(loop) > 0]
    holes = [loop for loop in loops if _signed_area(loop) < 0]
    for hole in holes:
        # The outermost column's point of a hole, so that the way to the left leaves the hole at once.
        start = min(range(len(hole)), key=lambda i: hole[i])
        x, y = hole[start]
        owner, cut = _outline_at_left(outlines, x, y)
        around = [*hole[start:], *hole[: start + 1]]
        outline = outlines[owner]
        outlines[owner] = [*outline[: cut + 1], *around, *outline[cut:]]
    return [[float(value) for point in _drop_straight(loop) for value in point] for loop in outlines]


def _boundary_loops(mask: np.ndarray) -> list[list[Point]]:
    """Closed walks along pixel edges with the mask at the right hand; every corner passed is a point."""
    inside = np.pad(mask.astype(bool), 1)
    core = inside[1:-1, 1:-1]
    steps: dict[Point, list[Point]] = defaultdict(list)  # corner -> directions that leave it
    sides = (
        (inside[:-2, 1:-1], (0, 0), (1, 0)),  # neighbour above is outside: walk right along the top edge
        (inside[1:-1, 2:], (1, 0), (0, 1)),
        (inside[2:, 1:-1], (1, 1), (-1, 0)),
        (inside[1:-1, :-2], (0, 1), (0, -1)),
    )
    for neighbour, (offset_x, offset_y), direction in sides:
        for y, x in np.argwhere(core & ~neighbour).tolist():
            steps[x + offset_x, y + offset_y].append(direction)
    loops = []
    while steps:
        first = next(iter(steps))
        start = direction = _take(steps, first, None)
        loop, point = [first], (first[0] + start[0], first[1] + start[1])
        # Where two parts touch at a corner, turning right stays on the same part; so the walk may pass its
        # first point before it closes.
        while point != first or (first in steps and _RIGHT_TURN[direction] != start):
            loop.append(point)
            direction = _take(steps, point, _RIGHT_TURN[direction])
            point = (point[0] + direction[0], point[1] + direction[1])
        loops.append(loop)
    return loops


def _take(steps: dict[Point, list[Point]], point: Point, preferred: Point | None) -> Point:
    """Remove and return one direction that leaves ``point``."""
    leaving = steps[point]
    direction = preferred if preferred in leaving else leaving[0]
    leaving.remove(direction)
    if not leaving:
        del steps[point]
    return direction


def _outline_at_left(outlines: list[list[Point]], x: int, y: int) -> tuple[int, int]:
    """(outline, position in it) of the nearest point left of (x, y) on an outline around (x, y)."""
    best: tuple[int, int, int] | None = None
    for owner, outline in enumerate(outlines):
        if cv2.pointPolygonTest(np.array(outline, dtype=np.int32), (float(x), float(y)), False) < 0:
            continue
        for position, (px, py) in enumerate(outline):
            if py == y and px <= x and (best is None or px > best[0]):
                best = (px, owner, position)
    assert best is not None, "a hole lies inside some outline"
    return best[1], best[2]


def _signed_area(loop: list[Point]) -> float:
    x, y = np.array(loop, dtype=np.int64).T
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def _drop_straight(loop: list[Point]) -> list[Point]:
    """Without the points at which the walk goes straight on."""

    def bends(before: Point, here: Point, after: Point) -> bool:
        return (here[0] - before[0], here[1] - before[1]) != (after[0] - here[0], after[1] - here[1])

    return [loop[i] for i in range(len(loop)) if bends(loop[i - 1], loop[i], loop[(i + 1) % len(loop)])]
