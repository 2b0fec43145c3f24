"""Models, a comparison and batches of images -> heatmaps with values, and their files."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import nn
from tqdm import tqdm

from d2_frozen.files import write_atomically, write_bytes
from d2_frozen.study.cka.collect import GramCollector
from d2_frozen.study.cka.estimator import MIN_EXAMPLES, MinibatchCKA
from d2_frozen.study.cka.heatmap import Heatmap, draw_heatmaps
from d2_frozen.study.cka.inputs import Batches, Sample, StopAsked
from d2_frozen.study.cka.presets import Comparison, Panel
from d2_frozen.study.jobs import write_json


@dataclass
class MeasuredPanel:
    """A panel with values, all (rows, columns).

    Args:
        pairs: of the names of feature maps.
        cka: NaN where there is none.
        standard_error: see :meth:`MinibatchCKA.standard_error`.
        batches: how many counted.
        mean: of ``cka`` where there is one, without what compares a map with itself; NaN if nothing is left.
    """

    title: str
    rows: list[str]
    columns: list[str]
    pairs: list[list[tuple[str, str] | None]]
    cka: np.ndarray
    standard_error: np.ndarray
    batches: np.ndarray
    mean: float

    @classmethod
    def of(cls, panel: Panel, estimate: MinibatchCKA, two_models: bool) -> MeasuredPanel:
        row_of = {name: i for i, name in enumerate(estimate.x)}
        column_of = {name: i for i, name in enumerate(estimate.y)}
        places = [
            [(row_of[pair[0]], column_of[pair[1]]) if pair else None for pair in row] for row in panel.pairs
        ]

        def chosen(values: np.ndarray, missing: float) -> np.ndarray:
            return np.array([[values[place] if place else missing for place in row] for row in places])

        cka = chosen(estimate.cka(), np.nan)
        told = ~np.isnan(cka)
        if not two_models:
            told &= np.array(
                [[pair is not None and pair[0] != pair[1] for pair in row] for row in panel.pairs]
            )
        return cls(
            panel.title,
            panel.rows,
            panel.columns,
            panel.pairs,
            cka,
            chosen(estimate.standard_error(), np.nan),
            chosen(estimate.batches, 0),
            float(cka[told].mean()) if told.any() else float("nan"),
        )


@dataclass
class Measured:
    """Heatmaps over the first ``batches`` batches, which had ``examples`` images or clips."""

    panels: list[MeasuredPanel]
    batches: int
    examples: int

    def write(self, folder: Path, name: str, about: Mapping[str, Any], caption: str) -> list[Path]:
        """``NAME.json``, ``.npz`` and ``.png``; each whole or not at all.

        Args:
            about: stored in the json: where the values come from.
            caption: of the picture, with the same in short.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{name}.{kind}" for kind in ("json", "npz", "png")]
        write_json(files[0], {**about, "panels": [_plain(panel) for panel in self.panels]})
        write_atomically(files[1], self._write_arrays)
        picture = io.BytesIO()
        drawn = [Heatmap(panel.title, panel.rows, panel.columns, panel.cka) for panel in self.panels]
        draw_heatmaps(picture, drawn, caption)
        write_bytes(files[2], picture.getvalue())
        return files

    def _write_arrays(self, stream: BinaryIO) -> None:
        arrays: dict[str, Any] = {}
        for i, panel in enumerate(self.panels):
            arrays[f"cka_{i}"], arrays[f"standard_error_{i}"] = panel.cka, panel.standard_error
            arrays[f"rows_{i}"], arrays[f"columns_{i}"] = np.array(panel.rows), np.array(panel.columns)
        np.savez(stream, **arrays)


def measure(
    models: Sequence[nn.Module],
    comparison: Comparison,
    batches: Batches | Sequence[list[Sample]],
    rois: int = 32,
    seed: int = 0,
) -> Measured | None:
    """
    Args:
        models: one, or two: then x is of the first and y of the second.
        comparison: which maps.
        batches: inputs of the models.
        rois, seed: see :class:`GramCollector`.
    Returns:
        None if it was interrupted (:class:`StopAsked`) before the first batch was done; after that, what there is.
    Raises:
        ValueError: no map has a name that is asked for.
    """
    x_model, y_model = models[0], models[-1]
    if x_model is y_model:

        def wanted(name: str) -> bool:
            return comparison.wanted_x(name) or comparison.wanted_y(name)

        collectors = [GramCollector(x_model, wanted, rois=rois, seed=seed)]
    else:
        collectors = [
            GramCollector(x_model, comparison.wanted_x, rois=rois, seed=seed),
            GramCollector(y_model, comparison.wanted_y, rois=rois, seed=seed),
        ]
    panels: list[Panel] = []
    estimate: MinibatchCKA | None = None
    done = examples = 0
    with StopAsked() as stop, contextlib.ExitStack() as hooks:
        for collector in collectors:
            hooks.enter_context(collector)
        for batch in tqdm(batches, unit="batch", desc="CKA", mininterval=1 if sys.stderr.isatty() else 30):
            done += 1
            if len(batch) >= MIN_EXAMPLES:  # clips that cannot be read are missing
                examples += len(batch)
                grams = [collector.grams(batch, number=done) for collector in collectors]
                if estimate is None:
                    panels = comparison.panels(list(collectors[0].seen), list(collectors[-1].seen))
                    estimate = _estimate_of(panels)
                estimate.update(grams[0], grams[-1])
            if stop:
                break
    if estimate is None:
        if done < len(batches):
            return None
        raise ValueError(f"no batch has {MIN_EXAMPLES} examples that can be read.")
    return Measured(
        [MeasuredPanel.of(panel, estimate, x_model is not y_model) for panel in panels], done, examples
    )


def _estimate_of(panels: Sequence[Panel]) -> MinibatchCKA:
    pairs = [pair for panel in panels for row in panel.pairs for pair in row if pair]
    return MinibatchCKA(*(list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1)))


def _plain(panel: MeasuredPanel) -> dict[str, Any]:
    """As json has it: no NaN."""
    values = {
        key: [[None if np.isnan(value) else float(value) for value in row] for row in array]
        for key, array in (("cka", panel.cka), ("standard_error", panel.standard_error))
    }
    return {
        "title": panel.title,
        "rows": panel.rows,
        "columns": panel.columns,
        "pairs": panel.pairs,
        **values,
        "batches": panel.batches.tolist(),
        "mean": None if np.isnan(panel.mean) else panel.mean,
    }
