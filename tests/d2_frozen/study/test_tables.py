"""Cells of the tables, and the layout of their results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from d2_frozen.study.layout import Score, csv_text, gap, markdown
from d2_frozen.study.tables import Cell, cells_of

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def cell(name: str, table: int = 5) -> Cell:
    return Cell(table, "detection", name, f"configs/{name}.yaml")


def result(box: float, mask: float, seed: int = 1) -> dict:
    metrics = {"bbox": {"AP": box}, "segm": {"AP": mask}}
    return {"metrics": metrics, "trainable": 1_500_000, "seed": seed, "commit": "abc"}


def test_rows_settings_and_multiscale_are_read_from_the_name() -> None:
    plain, multi = cell("swinv2_large_22k_frozen"), cell("swinv2_large_22k_frozen_multiscale")
    assert (plain.row, plain.setting) == ("swinv2_large_22k", "frozen")
    assert (multi.row, multi.setting) == ("swinv2_large_22k_multiscale", "frozen")
    assert list(multi.metrics) == [("bbox_TTA", "AP"), ("segm_TTA", "AP")]
    (job,) = multi.jobs([3])
    assert job.evaluates == plain.jobs([3])[0].name and job.options == ("SEED", "3")


@pytest.mark.parametrize("scale, count", [("full", 18), ("mini", 18)])
def test_table_2_has_necks_times_heads_times_settings(scale: str, count: int) -> None:
    cells = cells_of(2, scale, CONFIGS)
    assert len(cells) == count
    assert [c.name for c in cells[:3]] == ["fpn_mask_frozen", "fpn_mask_full", "fpn_cascade_frozen"]


def test_a_multiscale_cell_brings_the_training_it_evaluates() -> None:
    names = {c.name for c in cells_of(5, "full", CONFIGS, ["swinv2_giant_frozen_multiscale"])}
    assert names >= {"swinv2_giant_frozen", "swinv2_giant_frozen_multiscale"}


def test_mean_and_sample_deviation() -> None:
    score = Score([1.0, 2.0, 6.0])
    assert score.mean == 3.0 and math.isclose(score.deviation, math.sqrt(7))
    assert str(score) == "3.0 ± 2.6" and str(Score([2.0])) == "2.0" and str(Score()) == ""


def test_markdown_puts_frozen_beside_full() -> None:
    text = markdown(
        {cell("a_frozen"): [result(10, 20), result(12, 22, 2)], cell("a_full"): [result(30, 40)]}, 5
    )
    (line,) = [line for line in text.splitlines() if line.startswith("| a ")]
    cells = [part.strip() for part in line.strip("|").split("|")]
    box, mask = ["11.0 ± 1.4", "30.0", "19.0"], ["21.0 ± 1.4", "40.0", "19.0"]
    assert cells == ["a", *box, *mask, "1.50 M", "1.50 M", "2 / 1"]


def test_the_gap_is_full_minus_frozen_and_its_deviation_that_of_a_difference() -> None:
    assert str(gap(Score([1.0, 7.0]), Score([10.0, 10.0 + 8.0]))) == "10.0 ± 7.1"  # sqrt(18 + 32)
    assert str(gap(Score(), Score([1.0]))) == ""


def test_csv_has_a_line_per_run_and_metric() -> None:
    lines = csv_text({cell("a_frozen"): [result(10, 20), result(12, 22, 2)]}).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("5,detection,a_frozen,a,frozen,1,bbox/AP,10,1500000")
