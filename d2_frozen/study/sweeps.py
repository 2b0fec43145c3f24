"""Score against trainable parameters: the paper's Figures 1 and 4, over one setting of a model.

A sweep takes a cell of a table and one config key; its points are the cell with other values of that key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2_frozen.study.jobs import Job
from d2_frozen.study.tables import Cell, cells_of


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    Args:
        table, task, cell: the model.
        key: config key; "" for a sweep over the cells of the table themselves.
        values: of the key in the config; what a person calls them is ``value - offset``.
    """

    title: str
    table: int
    task: str
    cell: str = ""
    key: str = ""
    values: tuple[int, ...] = ()
    offset: int = 0


SWEEPS = {
    "bifpn_layers": Sweep(
        "BiFPN layers", 2, "detection", "bifpn_mask_frozen", "MODEL.BIFPN.NUM_LAYERS", (1, 2, 3, 5, 7, 9)
    ),
    "pixel_decoder_layers": Sweep(
        "Layers of the pixel decoder",
        3,
        "segmentation",
        "encoder_1_decoder_3_frozen",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
        (1, 2, 3, 6, 9),
    ),
    # The key counts predictions: one more than layers.
    "transformer_decoder_layers": Sweep(
        "Layers of the transformer decoder",
        3,
        "segmentation",
        "encoder_1_decoder_3_frozen",
        "MODEL.MASK_FORMER.DEC_LAYERS",
        (2, 4, 7, 10),
        offset=1,
    ),
    "video_blocks": Sweep(
        "Global blocks", 4, "video", "global_frozen", "MODEL.VIDEO_HEAD.NUM_BLOCKS", (1, 2, 4, 6)
    ),
    "backbones": Sweep("Backbones, frozen", 5, "detection"),
}


@dataclass(frozen=True)
class Point:
    """One model of a sweep."""

    label: str
    cell: Cell
    jobs: tuple[Job, ...]


def points_of(
    name: str,
    scale: str,
    configs: str | Path,
    seeds: Iterable[int],
    values: Sequence[int] = (),
    options: Sequence[str] = (),
) -> list[Point]:
    """
    Args:
        values: instead of the sweep's own, as a person calls them.
        options: KEY VALUE ... over the configs of all points.
    Raises:
        ValueError: a value that is no count, or values for a sweep over backbones.
        FileNotFoundError: no config; see ``cells_of``.
    """
    sweep, seeds = SWEEPS[name], list(seeds)
    if not sweep.key:
        if values:
            raise ValueError(
                f"study sweep {name} goes over the configs of table {sweep.table}; it takes no --values."
            )
        cells = cells_of(sweep.table, scale, configs, [f"{sweep.task}/frozen"])
        return [Point(c.row, c, tuple(c.jobs(seeds, options))) for c in cells if "multiscale" not in c.name]
    if any(value < 1 for value in values):
        raise ValueError(f"--values {' '.join(map(str, values))}: numbers of layers are 1 or more.")
    cells = cells_of(sweep.table, scale, configs, [sweep.cell])
    (cell,) = [c for c in cells if c.name == sweep.cell and c.task == sweep.task]
    wanted = [value + sweep.offset for value in dict.fromkeys(values)] or list(sweep.values)
    points = []
    for value in wanted:
        label = str(value - sweep.offset)
        jobs = tuple(
            Job(
                f"sweep/{name}/{label}/seed{seed}",
                cell.config_file,
                (*options, sweep.key, str(value), "SEED", str(seed)),
            )
            for seed in seeds
        )
        points.append(Point(label, cell, jobs))
    return points
