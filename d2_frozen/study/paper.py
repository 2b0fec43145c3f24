"""The paper's own numbers, to stand beside ours: ``paper.csv`` in the folder of the configs.

Columns: table, task, row, setting (frozen or full), metric (as in a table's csv), value, source. What ships is what
abstract and leaderboards say; whoever has the paper at hand adds lines.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

_COLUMNS = ["table", "task", "row", "setting", "metric", "value", "source"]


class PaperNumber(NamedTuple):
    value: float
    source: str


# (table, task, row, setting, metric) -> number.
PaperNumbers = dict[tuple[int, str, str, str, str], PaperNumber]


def paper_numbers(configs: str | Path) -> PaperNumbers:
    """Empty if there is no such file.

    Raises:
        ValueError: another header, or a line that is none; names file and line.
    """
    path = Path(configs) / "paper.csv"
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if (header := next(reader, None)) != _COLUMNS:
            raise ValueError(f"{path} starts with {header}; its columns are {','.join(_COLUMNS)}.")
        numbers: PaperNumbers = {}
        for line in filter(None, reader):  # empty ones too
            try:
                table, task, row, setting, metric, value, source = line
                numbers[int(table), task, row, setting, metric] = PaperNumber(float(value), source)
            except ValueError as err:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {','.join(line)} is no {','.join(_COLUMNS)} ({err})."
                ) from err
    return numbers
