"""Cells of the tables, and the layout of their results."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from d2_frozen.study.__main__ import main
from d2_frozen.study.layout import Score, csv_text, gap, markdown, write_sweep, write_table
from d2_frozen.study.paper import PaperNumber, paper_numbers
from d2_frozen.study.sweeps import Point
from d2_frozen.study.tables import Cell, cells_of, named_cells

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


def test_a_row_or_a_task_brings_its_cells() -> None:
    assert [c.name for c in cells_of(2, "mini", CONFIGS, ["bifpn_mask"])] == [
        "bifpn_mask_frozen",
        "bifpn_mask_full",
    ]
    assert {c.task for c in cells_of(1, "mini", CONFIGS, ["video"])} == {"video"}
    of_video = cells_of(1, "mini", CONFIGS, ["video/frozen", "segmentation/masked"])
    assert {(c.task, c.name) for c in of_video} == {
        *(("video", f"{kind}_frozen") for kind in ("none", "masked", "contrastive", "supervised")),
        ("segmentation", "masked_frozen"),
        ("segmentation", "masked_full"),
    }


def test_a_yaml_whose_name_says_no_column_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "mini/detection/table2"
    folder.mkdir(parents=True)
    for name in ("mine", "fpn_mask_frozen"):
        (folder / f"{name}.yaml").touch()
    (tmp_path / "mini/video/table2").mkdir(parents=True)
    (tmp_path / "mini/video/table2/linear_frozen.yaml").touch()
    for wanted in ([], ["mine"], ["detection"]):
        with pytest.raises(ValueError, match=r"mine.yaml: .*mine_frozen.yaml or mine_full.yaml"):
            cells_of(2, "mini", tmp_path, wanted)
    for wanted in (["fpn_mask"], ["detection/frozen"]):
        assert "fpn_mask_frozen" in [c.name for c in cells_of(2, "mini", tmp_path, wanted)]
    assert [c.name for c in cells_of(2, "mini", tmp_path, ["video"])] == ["linear_frozen"]
    assert [c.name for c in named_cells(2, "mini", tmp_path)] == ["fpn_mask_frozen", "linear_frozen"]


def test_the_command_above_a_cell_runs_that_one() -> None:
    commands = 0
    for path in CONFIGS.glob("mini/*/table*/*.yaml"):
        words = path.read_text().split("\n", 1)[0].split()
        if "d2_frozen.study" in words:
            commands += 1
            chosen = cells_of(int(words[words.index("table") + 1]), "mini", CONFIGS, [words[-1]])
            assert [cell.config_file for cell in chosen] == [str(path)]
    assert commands >= 48  # of tables 1 and 5


def test_mean_and_sample_deviation() -> None:
    score = Score({1: 1.0, 2: 2.0, 3: 6.0})
    assert score.mean == 3.0 and math.isclose(score.deviation, math.sqrt(7))
    assert str(score) == "3.0 ± 2.6" and str(Score({1: 2.0})) == "2.0" and str(Score()) == ""


def test_markdown_puts_frozen_beside_full() -> None:
    text = markdown(
        {cell("a_frozen"): [result(10, 20), result(12, 22, 2)], cell("a_full"): [result(30, 40)]}, 5
    )
    (line,) = [line for line in text.splitlines() if line.startswith("| a ")]
    cells = [part.strip() for part in line.strip("|").split("|")]
    box, mask = ["11.0 ± 1.4", "30.0", "20.0"], ["21.0 ± 1.4", "40.0", "20.0"]  # gaps: of seed 1
    assert cells == ["a", *box, *mask, "1.50 M", "1.50 M", "2 / 1"]


def test_the_gap_is_full_minus_frozen_of_the_same_seed() -> None:
    frozen, full = Score({1: 1.0, 2: 7.0}), Score({2: 18.0, 1: 10.0, 3: 99.0})
    assert str(gap(frozen, full)) == "10.0 ± 1.4"  # 9 and 11
    assert str(gap(Score(), full)) == "" and str(gap(Score({3: 98.0}), full)) == "1.0"


def test_a_model_that_finds_nothing_in_one_seed_has_no_mean(tmp_path: Path) -> None:
    """Its AP is NaN, Detectron2's way: that is shown, and the other rows are as they are."""
    found_nothing = result(math.nan, math.nan, 2)
    runs = {
        cell("a_frozen"): [result(10, 20), found_nothing],
        cell("a_full"): [result(30, 40), result(32, 42, 2)],
    }
    text = write_table(runs, 5, tmp_path).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| a ")]
    assert [part.strip() for part in line.strip("|").split("|")][1:4] == ["nan", "31.0 ± 1.4", "nan"]
    assert "a_frozen,a,frozen,2,bbox/AP,nan" in (tmp_path / "table5.csv").read_text()
    point = Point("3", cell("a_frozen"), ())
    about = {"device": "a CPU", "commit": "abc"}
    points = [(point, [{**run, **about} for run in runs[point.cell]])]
    assert "| 3 " in write_sweep("bifpn_layers", "BiFPN layers", points, tmp_path).read_text()


def test_a_table_says_how_long_its_backbones_were_pretrained() -> None:
    runs = [{**result(10, 20), "pretraining": {"iterations": 500}}, {**result(12, 22, 2), "pretraining": {}}]
    assert "backbones of 500 iterations" in markdown({cell("a_frozen"): runs}, 5)
    assert "iterations" not in markdown({cell("a_frozen"): runs[1:]}, 5)


def test_a_table_says_whose_time_is_not_the_whole() -> None:
    runs = [{**result(10, 20, seed), "seconds_of_last_start": 60.0} for seed in (1, 2)]
    assert "Finished runs: 2, 0:02:00 in all; commit" in markdown({cell("a_frozen"): runs}, 5)
    runs[1]["resumed"] = True
    text = markdown({cell("a_frozen"): runs}, 5)
    assert "Finished runs: 2, 0:02:00 in all (1 resumed, timed from the last start); commit" in text


def test_csv_has_a_line_per_run_and_metric() -> None:
    lines = csv_text({cell("a_frozen"): [result(10, 20), result(12, 22, 2)]}).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("5,detection,a_frozen,a,frozen,1,bbox/AP,10,1500000")


def test_the_papers_number_stands_beside_ours_where_it_is_known(tmp_path: Path) -> None:
    paper = {(5, "detection", "a", "frozen", "bbox/AP"): PaperNumber(59.3, "its abstract")}
    runs = {cell("a_frozen"): [result(10, 20)], cell("a_full"): [result(30, 40)], cell("b_frozen"): []}
    text = write_table(runs, 5, tmp_path, paper).read_text()
    header, _, *rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    (column,) = [k for k, name in enumerate(header) if name.startswith("paper")]
    assert header[column] == "paper, frozen box AP" and [row[column] for row in rows] == ["59.3", ""]
    assert "The paper's numbers: its abstract." in text
    assert "Finished runs: 2, 0:00:00 in all; commit abc." in text
    first, *lines = [line.split(",") for line in (tmp_path / "table5.csv").read_text().splitlines()]
    assert first[-1] == "paper" and [line[-1] for line in lines] == ["59.3", "", "", ""]
    assert "paper" not in markdown(runs, 5)


def test_numbers_that_ship_are_of_rows_that_there_are() -> None:
    numbers = paper_numbers(CONFIGS)
    assert numbers[5, "video", "swinv2_giant", "frozen", "video/top1"].value == 81.7
    for table, task, row, setting, _ in numbers:
        assert (task, row, setting) in {(c.task, c.row, c.setting) for c in cells_of(table, "full", CONFIGS)}


def test_a_line_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "paper.csv").write_text(
        "table,task,row,setting,metric,value,source\n5,detection,a,frozen,bbox/AP,much,me\n"
    )
    with pytest.raises(ValueError, match=r"paper.csv, line 2: .*much"):
        paper_numbers(tmp_path)
    flags = ["--cells", "video/linear_frozen", "--output", str(tmp_path / "out")]
    shutil.copytree(CONFIGS / "mini/video", tmp_path / "mini/video")
    assert main(["table", "4", "--configs", str(tmp_path), *flags]) == 2  # and nothing has run
    assert "paper.csv, line 2" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert paper_numbers(tmp_path / "nowhere") == {}


def test_empty_lines_between_the_papers_numbers_are_none(tmp_path: Path) -> None:
    header = "table,task,row,setting,metric,value,source"
    (tmp_path / "paper.csv").write_text(f"{header}\n\n5,detection,a,frozen,bbox/AP,59.3,me\n\n")
    assert paper_numbers(tmp_path) == {
        (5, "detection", "a", "frozen", "bbox/AP"): PaperNumber(59.3, "me"),
    }


def test_every_full_scale_cell_is_listed_and_builds_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [
        "--scale",
        "full",
        "--configs",
        str(CONFIGS),
        "--output",
        str(tmp_path),
        "--dry-run",
        "--no-probe",
    ]
    assert main(["table", "4", *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("table4/")]
    # docs/parameter_counts.md
    sizes = {
        "linear_frozen": "0.41",
        "linear_full": "87.30",
        "temporal_frozen": "50.86",
        "temporal_full": "137.76",
    }
    sizes |= {"global_frozen": "50.86", "global_full": "137.76"}
    assert {line[0].split("/")[2]: line[3] for line in lines} == sizes
