"""Heatmaps of similarities, drawn by matplotlib without a screen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Inches per cell where numbers stand in it, and where they do not.
_CELL, _SMALL_CELL = 0.62, 0.16
# Above so many rows or columns, cells have no numbers.
_MOST_WITH_NUMBERS = 24
_LONGEST_LABEL = 44


def draw_heatmaps(
    stream: BinaryIO,
    panels: Sequence[tuple[str, Sequence[str], Sequence[str], np.ndarray]],
    caption: str = "",
) -> None:
    """Write a PNG with one heatmap above the other.

    Args:
        panels: title, labels of rows and of columns, (rows, columns) values from 0 to 1; NaN is drawn grey.
        caption: below all of them.
    """
    sizes = [_size(rows, columns) for _, rows, columns, _ in panels]
    width, heights = max(w for w, _ in sizes), [h for _, h in sizes]
    figure = Figure(figsize=(width, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels):
        _draw(axis, *panel)
    if caption:
        figure.supxlabel(caption, fontsize=7, color="#555555")
    figure.savefig(stream, format="png", dpi=130)


def _draw(axis: Axes, title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray) -> None:
    colours = colormaps["viridis"].with_extremes(bad="#d9d9d9")
    image = axis.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1, aspect="equal")
    small = max(values.shape) > _MOST_WITH_NUMBERS
    size = 5 if small else 8
    row_labels, column_labels = _shortened(rows), _shortened(columns)
    axis.set_yticks(range(len(rows)), row_labels, fontsize=size)
    slanted = max(map(len, column_labels)) > 5
    axis.set_xticks(
        range(len(columns)),
        column_labels,
        fontsize=size,
        rotation=90 if small else 40 if slanted else 0,
        ha="center" if small or not slanted else "right",
        rotation_mode="default" if small else "anchor",
    )
    axis.set_title(title, fontsize=9, loc="left")
    if not small:
        for (i, j), value in np.ndenumerate(values):
            text = "–" if np.isnan(value) else f"{value:.2f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=_readable_on(value))
    axis.figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02, aspect=20).ax.tick_params(labelsize=6)


def _readable_on(value: float) -> str:
    return "black" if np.isnan(value) or value > 0.6 else "white"


def _size(rows: Sequence[str], columns: Sequence[str]) -> tuple[float, float]:
    cell = _CELL if max(len(rows), len(columns)) <= _MOST_WITH_NUMBERS else _SMALL_CELL
    letters = 0.075 if cell == _CELL else 0.045
    beside = letters * max(map(len, _shortened(rows)))
    below = letters * max(map(len, _shortened(columns))) * (0.7 if cell == _CELL else 1)
    return max(4.6, beside + cell * len(columns) + 1.0), below + cell * len(rows) + 0.6


def _shortened(labels: Sequence[str]) -> list[str]:
    """Without the beginning that all share, at a dot, and without the middle of what is still long."""
    shared = os.path.commonprefix(list(labels)) if len(labels) > 1 else ""
    cut = shared.rfind(".") + 1
    half = _LONGEST_LABEL // 2
    short = [label[cut:] for label in labels]
    return [s if len(s) <= _LONGEST_LABEL else f"{s[:half]}…{s[-half:]}" for s in short]
