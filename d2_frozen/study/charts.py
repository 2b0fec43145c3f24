"""Pictures of results, drawn by matplotlib without a screen."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from d2_frozen.study.layout import Results, scores
from d2_frozen.study.tables import METRICS, SETTINGS, TITLES

_COLOURS = {"frozen": "#2b6cb0", "full": "#c8c8c8"}


def bar_chart(results: Results, number: int, path: str | Path) -> None:
    """A panel per task and metric: bars of frozen beside full fine-tuning for every row, deviation as a whisker."""
    panels = [
        (task, heading)
        for task in dict.fromkeys(cell.task for cell in results)
        for heading in METRICS[task].values()
    ]
    height = 1.2 + 0.45 * max(len({cell.row for cell in results if cell.task == task}) for task, _ in panels)
    figure = Figure(figsize=(4.8 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, heading) in zip(axes, panels):
        rows = list(dict.fromkeys(cell.row for cell in results if cell.task == task))
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
        axis.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel(heading)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, loc="lower right")
    figure.suptitle(f"Table {number}. {TITLES[number]}", fontsize=10)
    figure.savefig(path, dpi=120)
