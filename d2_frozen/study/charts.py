"""Pictures of results, drawn by matplotlib without a screen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from d2_frozen.study.layout import Results, scores
from d2_frozen.study.paper import PaperNumbers
from d2_frozen.study.sweeps import Point
from d2_frozen.study.tables import METRICS, SETTINGS, TITLES

_COLOURS = {"frozen": "#2b6cb0", "full": "#c8c8c8"}


def bar_chart(results: Results, number: int, paper: PaperNumbers | None = None) -> bytes:
    """A panel per task and metric: bars of frozen beside full fine-tuning for every row, deviation as a whisker.

    The paper's numbers are black lines across the bars.

    Returns:
        PNG.
    """
    panels = [
        (task, metric, heading)
        for task in dict.fromkeys(cell.task for cell in results)
        for metric, heading in METRICS[task].items()
    ]
    rows_of = {
        task: list(dict.fromkeys(cell.row for cell in results if cell.task == task)) for task, *_ in panels
    }
    height = 1.2 + 0.45 * max(map(len, rows_of.values()))
    figure = Figure(figsize=(4.8 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, metric, heading) in zip(axes, panels):
        rows = rows_of[task]
        for k, setting in enumerate(SETTINGS):
            found = {
                cell.row: scores(cell, runs)[heading]
                for cell, runs in results.items()
                if cell.task == task and cell.setting == setting and runs
            }
            places = [rows.index(row) + 0.38 * (k - 0.5) for row in found]
            means = [score.mean for score in found.values()]
            spread = [0.0 if len(score.values) < 2 else score.deviation for score in found.values()]
            axis.barh(places, means, 0.36, xerr=spread, color=_COLOURS[setting], label=setting)
        for place, row in enumerate(rows):
            for k, setting in enumerate(SETTINGS):
                of_paper = (paper or {}).get((number, task, row, setting, "/".join(metric)))
                if of_paper:
                    axis.plot([of_paper.value], [place + 0.38 * (k - 0.5)], "|", color="black", markersize=12)
        axis.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel(heading)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"Table {number}. {TITLES[number]}", fontsize=10)
    return _png(figure)


def curve(title: str, points: Sequence[tuple[Point, list[dict[str, Any]]]]) -> bytes:
    """A panel per metric: score over millions of trainable parameters, deviation as a whisker; as PNG."""
    headings = list(METRICS[points[0][0].cell.task].values())
    figure = Figure(figsize=(4.6 * len(headings), 3.4), layout="constrained")
    for axis, heading in zip(figure.subplots(1, len(headings), squeeze=False)[0], headings):
        found = [(p.label, r[0]["trainable"] / 1e6, scores(p.cell, r)[heading]) for p, r in points if r]
        spread = [0.0 if len(score.values) < 2 else score.deviation for _, _, score in found]
        sizes, means = [size for _, size, _ in found], [score.mean for _, _, score in found]
        axis.errorbar(sizes, means, yerr=spread, marker="o", capsize=3, color=_COLOURS["frozen"])
        for label, size, score in found:
            axis.annotate(label, (size, score.mean), xytext=(4, 6), textcoords="offset points", fontsize=8)
        axis.set_xlabel("trainable parameters, millions")
        axis.set_ylabel(heading)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
