"""Which runs make up a table of the paper? One yaml per cell and task, under ``configs/``.

    scale full    configs/{coco,ade20k,kinetics400}/tableN/NAME_SETTING.yaml
    scale mini    configs/mini/{detection,segmentation,video}/tableN/NAME_SETTING.yaml

SETTING is ``frozen`` or ``full`` (fine-tuning), the columns of a table; NAME is its row. NAME_SETTING_multiscale is the
evaluation of the same model with TEST.AUG, a row of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2_frozen.study.jobs import Job

TITLES = {
    1: "Which pretraining fits a frozen backbone?",
    2: "Detection: where do trainable parameters help?",
    3: "Semantic segmentation: where do trainable parameters help?",
    4: "Action recognition: which head?",
    5: "Larger backbones, more pretraining data",
    6: "Less training data",
}
TASKS = ("detection", "segmentation", "video")
SETTINGS = ("frozen", "full")
# Main metrics of a task, as in the results of an evaluation: (task, metric), and the heading of its column.
METRICS = {
    "detection": {("bbox", "AP"): "box AP", ("segm", "AP"): "mask AP"},
    "segmentation": {("sem_seg", "mIoU"): "mIoU"},
    "video": {("video", "top1"): "top-1"},
}
_FULL_SCALE = {"detection": "coco", "segmentation": "ade20k", "video": "kinetics400"}
_MULTISCALE = "_multiscale"
# Rows that have an order of their own; others follow, sorted.
_ORDER = {
    1: ("none", "masked", "simmim_1k", "contrastive", "esvit_1k", "supervised", "supervised_1k", "supervised_22k"),
    2: tuple(f"{n}_{h}" for n in ("fpn", "residual_fpn", "bifpn") for h in ("mask", "cascade", "htc")),
    4: ("linear", "temporal", "global"),
    6: ("percent_1", "percent_10", "percent_100"),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One model of a table, for one task."""

    table: int
    task: str
    name: str
    config_file: str

    @property
    def row(self) -> str:
        stem = self.name.removesuffix(_MULTISCALE).removesuffix(f"_{self.setting}")
        return f"{stem}{_MULTISCALE}" if self.name.endswith(_MULTISCALE) else stem

    @property
    def setting(self) -> str:
        return self.name.removesuffix(_MULTISCALE).rpartition("_")[2]

    @property
    def is_named(self) -> bool:
        """Does its name say in which column its scores are? A yaml that others are based on need not."""
        return self.setting in SETTINGS

    @property
    def metrics(self) -> dict[tuple[str, str], str]:
        """(task, metric) in the results -> heading."""
        if not self.name.endswith(_MULTISCALE):
            return METRICS[self.task]
        return {(f"{task}_TTA", metric): heading for (task, metric), heading in METRICS[self.task].items()}

    def jobs(self, seeds: Iterable[int], options: Sequence[str] = ()) -> list[Job]:
        """One per seed.

        Args:
            options: KEY VALUE ... over the yaml.
        """
        jobs = []
        for seed in seeds:
            evaluates = None
            if self.name.endswith(_MULTISCALE):
                evaluates = self._job_name(self.name.removesuffix(_MULTISCALE), seed)
            values = (*options, "SEED", str(seed))
            jobs.append(Job(self._job_name(self.name, seed), self.config_file, values, evaluates))
        return jobs

    def _job_name(self, name: str, seed: int) -> str:
        return f"table{self.table}/{self.task}/{name}/seed{seed}"


def cells_of(
    table: int, scale: str, configs: str | Path = "configs", wanted: Sequence[str] = ()
) -> list[Cell]:
    """The cells of a table that have a config, in the order of its rows.

    Args:
        scale: "mini" or "full".
        configs: the folder ``configs/``.
        wanted: names of cells, of rows (all their cells), or of tasks; or TASK/ before a cell, a row, or a setting
            ("video/frozen"). All if empty.
    Raises:
        FileNotFoundError: no config for the table.
        ValueError: a wanted cell has no config; the nearest names are listed. Or its name does not say its setting.
    """
    cells = _files(table, scale, configs)
    if not wanted:
        return _named(cells)
    names = {
        cell: {cell.name, cell.row, cell.task}
        | {f"{cell.task}/{part}" for part in (cell.name, cell.row, cell.setting)}
        for cell in cells
    }
    known = set.union(*names.values())
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)
            raise ValueError(
                f"Table {table} has no cell {name} with a config at scale {scale}. Nearest: {', '.join(near)}."
            )
    chosen = [cell for cell in cells if names[cell] & set(wanted)]
    needed = {(cell.task, cell.name.removesuffix(_MULTISCALE)) for cell in chosen}
    return _named([cell for cell in cells if cell in chosen or (cell.task, cell.name) in needed])


def named_cells(table: int, scale: str, configs: str | Path = "configs") -> list[Cell]:
    """As :func:`cells_of`, all whose name says their setting."""
    return [cell for cell in _files(table, scale, configs) if cell.is_named]


def _files(table: int, scale: str, configs: str | Path) -> list[Cell]:
    cells = []
    for task in TASKS:
        folder = Path(configs) / (f"mini/{task}" if scale == "mini" else _FULL_SCALE[task]) / f"table{table}"
        cells += [Cell(table, task, path.stem, str(path)) for path in folder.glob("*.yaml")]
    if not cells:
        raise FileNotFoundError(
            f"{configs} has no configs of table {table} at scale {scale}. Run from the repository, or give --configs."
        )
    return sorted(cells, key=_place)


def _named(cells: list[Cell]) -> list[Cell]:
    for cell in cells:
        if not cell.is_named:
            stem = cell.name.removesuffix(_MULTISCALE)
            raise ValueError(
                f"{cell.config_file}: a cell's name ends in its column. Call it {stem}_frozen.yaml or "
                f"{stem}_full.yaml; move it elsewhere if it is no cell, or name the cells to run (--cells)."
            )
    return cells


def _place(cell: Cell) -> tuple:
    order = _ORDER.get(cell.table, ())
    row = cell.row.removesuffix(_MULTISCALE)
    return (
        TASKS.index(cell.task),
        order.index(row) if row in order else len(order),
        cell.row,
        SETTINGS.index(cell.setting) if cell.setting in SETTINGS else len(SETTINGS),
        cell.name,
    )
