"""Heatmaps of similarities, drawn by matplotlib without a screen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

# Above so many rows or columns, cells are small and have no numbers.
_MOST_WITH_NUMBERS = 24
_LONGEST_LABEL = 44
# Everything below is in inches. Space for a title, around a panel, and for the scale of colours.
_TITLE, _MARGIN, _SCALE = 0.35, 0.15, 0.75
_LETTER_OF_TITLE = 0.075


class Heatmap(NamedTuple):
    """Labels and (rows, columns) values from 0 to 1; NaN is drawn grey."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray


class _Place(NamedTuple):
    """Inches: of a cell, of a letter of its labels, of the labels beside and below, of all cells."""

    cell: float
    letter: float
    left: float
    below: float
    width: float
    height: float

    @classmethod
    def of(cls, panel: Heatmap) -> _Place:
        cell, letter = (0.16, 0.045) if _is_large(panel) else (0.62, 0.075)
        slant = 1.0 if _is_large(panel) else 0.5
        return cls(
            cell,
            letter,
            letter * max(map(len, _shortened(panel.rows))) + 0.25,
            letter * slant * max(map(len, _shortened(panel.columns))) + 0.25,
            cell * len(panel.columns),
            cell * len(panel.rows),
        )


def draw_heatmaps(stream: BinaryIO, panels: Sequence[Heatmap], caption: str = "") -> None:
    """Write a PNG with one heatmap above the other.

    Args:
        caption: below all of them.
    """
    places = [_Place.of(panel) for panel in panels]
    left = max(place.left for place in places)
    texts = [caption, *(panel.title for panel in panels)]
    width = _MARGIN + max(
        left + max(place.width for place in places) + _SCALE,
        max(map(len, texts)) * _LETTER_OF_TITLE,
    )
    height = sum(_TITLE + place.height + place.below + _MARGIN for place in places) + _TITLE
    figure = Figure(figsize=(width, height))
    top = height
    for panel, place in zip(panels, places):
        figure.text(_MARGIN / width, (top - 0.22) / height, panel.title, fontsize=9)
        top -= _TITLE + place.height

        def box(
            x: float, inches: float, y: float = top, h: float = place.height
        ) -> tuple[float, float, float, float]:
            return x / width, y / height, inches / width, h / height

        axis = figure.add_axes(box(_MARGIN + left, place.width))
        scale = figure.add_axes(box(_MARGIN + left + place.width + 0.12, 0.12))
        image = _draw(axis, panel)
        figure.colorbar(image, cax=scale).ax.tick_params(labelsize=6)
        top -= place.below + _MARGIN
    figure.text(_MARGIN / width, 0.12 / height, caption, fontsize=7, color="#555555")
    figure.savefig(stream, format="png", dpi=130)


def _draw(axis: Axes, panel: Heatmap) -> AxesImage:
    colours = colormaps["viridis"].with_extremes(bad="#d9d9d9")
    image = axis.imshow(np.ma.masked_invalid(panel.values), cmap=colours, vmin=0, vmax=1, aspect="auto")
    large = _is_large(panel)
    size, angle = (5, 90) if large else (8, 40)
    axis.set_yticks(range(len(panel.rows)), _shortened(panel.rows), fontsize=size)
    axis.set_xticks(range(len(panel.columns)), _shortened(panel.columns), fontsize=size)
    for label in axis.get_xticklabels():
        label.set(rotation=angle, ha="right", va="center" if large else "top", rotation_mode="anchor")
    axis.tick_params(length=2)
    if not large:
        for (i, j), value in np.ndenumerate(panel.values):
            text = "–" if np.isnan(value) else f"{value:.2f}"
            dark = np.isnan(value) or value > 0.6
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="black" if dark else "white")
    return image


def _is_large(panel: Heatmap) -> bool:
    return max(len(panel.rows), len(panel.columns)) > _MOST_WITH_NUMBERS


def _shortened(labels: Sequence[str]) -> list[str]:
    """Without the beginning that all share, at a dot, and without the middle of what is still long."""
    shared = os.path.commonprefix(list(labels)) if len(labels) > 1 else ""
    cut = shared.rfind(".") + 1
    half = _LONGEST_LABEL // 2
    short = [label[cut:] for label in labels]
    return [s if len(s) <= _LONGEST_LABEL else f"{s[:half]}…{s[-half:]}" for s in short]
