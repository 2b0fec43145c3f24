"""Results of a table's jobs -> the table: rows, frozen beside full fine-tuning, mean and deviation over seeds, and the
paper's numbers where they are known.

Out: markdown for people, csv for programs, a picture.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2_frozen.files import write_bytes, write_text
from d2_frozen.study.paper import PaperNumber, PaperNumbers
from d2_frozen.study.sweeps import Point
from d2_frozen.study.tables import METRICS, SETTINGS, TITLES, Cell

Results = dict[Cell, list[dict[str, Any]]]


@dataclass
class Score:
    """One metric of one cell: seed -> value, NaN of a model that finds nothing; then mean and deviation are NaN too."""

    values: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation; NaN with fewer than two seeds."""
        if len(self.values) < 2 or math.isnan(self.mean):  # of which the library's fails
            return math.nan
        return statistics.stdev(self.values.values())

    def __str__(self) -> str:
        if not self.values:
            return ""
        return f"{self.mean:.1f}" + ("" if math.isnan(self.deviation) else f" ± {self.deviation:.1f}")


def gap(frozen: Score, full: Score) -> Score:
    """How far full fine-tuning is ahead, seed by seed, of the seeds that both have."""
    both = sorted(frozen.values.keys() & full.values.keys())
    return Score({seed: full.values[seed] - frozen.values[seed] for seed in both})


def scores(cell: Cell, results: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """Heading of a column -> its values over the seeds."""
    table: dict[str, Score] = {}
    for (task, metric), heading in cell.metrics.items():
        table[heading] = Score(
            {r["seed"]: float(r["metrics"][task][metric]) for r in results if task in r["metrics"]}
        )
    return table


def markdown(results: Results, number: int, paper: PaperNumbers | None = None) -> str:
    """The table in the paper's layout, one block per task, and what the runs were.

    Args:
        paper: its numbers; columns for those that there are.
    """
    blocks = [f"### Table {number}. {TITLES[number]}"]
    for task in dict.fromkeys(cell.task for cell in results):
        of_task = {cell: runs for cell, runs in results.items() if cell.task == task}
        blocks += [_block(of_task, task, paper or {}), *_sources(of_task, paper or {})]
        blocks.append(_about([run for runs in of_task.values() for run in runs]))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _of_paper(cell: Cell, metric: tuple[str, str], paper: PaperNumbers) -> PaperNumber | None:
    return paper.get((cell.table, cell.task, cell.row, cell.setting, "/".join(metric)))


def _sources(results: Results, paper: PaperNumbers) -> list[str]:
    """A line on where the paper's numbers are from, if there are any."""
    found = [_of_paper(cell, metric, paper) for cell in results for metric in METRICS[cell.task]]
    sources = dict.fromkeys(number.source for number in found if number)
    return [f"The paper's numbers: {'; '.join(sources)}."] if sources else []


def _about(runs: Sequence[dict[str, Any]]) -> str:
    """What a reported figure must name, of all runs."""
    if not runs:
        return ""
    facts = []
    for name in ("commit", "device", "torch", "engine"):
        found = sorted({str(run[name]) for run in runs if name in run})
        facts += [f"{name} {', '.join(found)}"] if found else []
    lengths = sorted({run["pretraining"]["iterations"] for run in runs if run.get("pretraining")})
    facts += [f"backbones of {', '.join(map(str, lengths))} iterations"] if lengths else []
    several = sorted({run["test_sets"][0] for run in runs if len(set(run.get("test_sets", ()))) > 1})
    facts += [f"of several test sets the first, {', '.join(several)}"] if several else []
    time = timedelta(seconds=round(sum(run.get("seconds_of_last_start", 0.0) for run in runs)))
    resumed = sum(bool(run.get("resumed")) for run in runs)
    of_these = f" ({resumed} resumed, timed from the last start)" if resumed else ""
    return f"Finished runs: {len(runs)}, {time} in all{of_these}; {'; '.join(facts)}."


def _block(results: Results, task: str, paper: PaperNumbers) -> str:
    headings = list(METRICS[task].values())
    # Of metric and setting, those of which the paper's number is known for some row.
    known = [
        (metric, setting)
        for metric in METRICS[task]
        for setting in SETTINGS
        if any(_of_paper(cell, metric, paper) for cell in results if cell.setting == setting)
    ]
    columns = [f"{what} {heading}" for heading in headings for what in (*SETTINGS, "gap")]
    columns += [f"paper, {setting} {METRICS[task][metric]}" for metric, setting in known]
    rows = []
    for row in dict.fromkeys(cell.row for cell in results):
        of_setting = {cell.setting: (cell, results[cell]) for cell in results if cell.row == row}
        line: list[str] = [row.replace("_", " ")]
        for heading in headings:
            pair = [scores(*of_setting[s])[heading] if s in of_setting else Score() for s in SETTINGS]
            line += [*map(str, pair), str(gap(*pair))]
        for metric, setting in known:
            number = _of_paper(of_setting[setting][0], metric, paper) if setting in of_setting else None
            line.append(f"{number.value:.1f}" if number else "")
        sizes = [
            f"{r[1][0]['trainable'] / 1e6:.2f} M" if r and r[1] else ""
            for r in (of_setting.get(setting) for setting in SETTINGS)
        ]
        runs = [str(len(of_setting[s][1])) for s in SETTINGS if s in of_setting]
        rows.append([*line, *sizes, " / ".join(runs)])
    headers = [task, *columns, *(f"{setting} trainable" for setting in SETTINGS), "runs"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def csv_text(results: Results, paper: PaperNumbers | None = None) -> str:
    """One line per run and metric, the paper's number of the cell at its end."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fields = ("trainable", "parameters", "iterations", "device", "torch", "engine", "commit")
    writer.writerow(["table", "task", "cell", "row", "setting", "seed", "metric", "value", *fields, "paper"])
    for cell, runs in results.items():
        for run in runs:
            for (task, metric), of_one_scale in zip(cell.metrics, METRICS[cell.task]):
                number = _of_paper(cell, of_one_scale, paper or {})
                value = run["metrics"].get(task, {}).get(metric, "")
                about = [run.get(name, "") for name in fields]
                writer.writerow(
                    [
                        cell.table,
                        cell.task,
                        cell.name,
                        cell.row,
                        cell.setting,
                        run["seed"],
                        f"{task}/{metric}",
                        value,
                        *about,
                        number.value if number else "",
                    ]
                )
    return file.getvalue()


def write_table(results: Results, number: int, folder: str | Path, paper: PaperNumbers | None = None) -> Path:
    """``tableN.md``, ``tableN.csv`` and ``tableN.png`` in ``folder``.

    Returns:
        The markdown file.
    """
    from d2_frozen.study.charts import bar_chart

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"table{number}.csv", csv_text(results, paper))
    write_bytes(folder / f"table{number}.png", bar_chart(results, number, paper))
    return write_text(folder / f"table{number}.md", markdown(results, number, paper))


def sweep_markdown(title: str, points: Sequence[tuple[Point, list[dict[str, Any]]]]) -> str:
    """A line per point: its label, trainable parameters, and every metric as mean and deviation."""
    task = points[0][0].cell.task
    rows = []
    for point, runs in points:
        values = scores(point.cell, runs)
        size = f"{runs[0]['trainable'] / 1e6:.2f} M" if runs else ""
        rows.append([point.label, size, *(str(score) for score in values.values()), str(len(runs))])
    headers = [title, "trainable", *METRICS[task].values(), "runs"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    about = _about([run for _, runs in points for run in runs])
    return "\n\n".join(block for block in (f"### {title}", table, about) if block) + "\n"


def write_sweep(
    name: str, title: str, points: Sequence[tuple[Point, list[dict[str, Any]]]], folder: Path
) -> Path:
    """``sweep_NAME.md``, ``.csv`` and ``.png`` in ``folder``.

    Returns:
        The markdown file.
    """
    from d2_frozen.study.charts import curve

    folder.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["point", "seed", "trainable", "metric", "value", "device", "commit"])
    writer.writerows(line for point, runs in points for line in _sweep_lines(point, runs))
    write_text(folder / f"sweep_{name}.csv", file.getvalue())
    write_bytes(folder / f"sweep_{name}.png", curve(title, points))
    return write_text(folder / f"sweep_{name}.md", sweep_markdown(title, points))


def _sweep_lines(point: Point, runs: Sequence[dict[str, Any]]) -> list[list[Any]]:
    return [
        [
            point.label,
            r["seed"],
            r["trainable"],
            f"{task}/{metric}",
            r["metrics"][task][metric],
            r["device"],
            r["commit"],
        ]
        for r in runs
        for task, metric in point.cell.metrics
        if task in r["metrics"]
    ]
