"""Sweeps, the probe of a dry run, and the cluster's queue, run by submitit on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2_frozen.study.__main__ import main
from d2_frozen.study.jobs import Job
from d2_frozen.study.layout import sweep_markdown
from d2_frozen.study.slurm import SlurmQueue
from d2_frozen.study.sweeps import SWEEPS, points_of

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_points_vary_one_key_of_a_cell() -> None:
    points = points_of("transformer_decoder_layers", "mini", CONFIGS, [1, 2], values=[3, 9])
    assert [point.label for point in points] == ["3", "9"]
    job = points[1].jobs[1]
    assert job.name == "sweep/transformer_decoder_layers/9/seed2"
    # Predictions are made once more than there are layers, and the key counts predictions.
    assert job.options == ("MODEL.MASK_FORMER.DEC_LAYERS", "10", "SEED", "2")


@pytest.mark.parametrize("name", [name for name, sweep in SWEEPS.items() if sweep.table in (2, 3)])
def test_every_point_is_a_config(name: str) -> None:
    for point in points_of(name, "mini", CONFIGS, [1]):
        assert point.jobs[0].settings()["SEED"] == 1


def test_backbones_are_the_frozen_cells_of_table_5() -> None:
    labels = [point.label for point in points_of("backbones", "full", CONFIGS, [1])]
    assert labels == ["swinv2_base_1k", "swinv2_base_22k", "swinv2_giant", "swinv2_large_22k"]
    with pytest.raises(ValueError, match="takes no --values"):
        points_of("backbones", "full", CONFIGS, [1], values=[1])


def test_sweep_table() -> None:
    point = points_of("bifpn_layers", "mini", CONFIGS, [1], values=[5])[0]
    run = {"metrics": {"bbox": {"AP": 4.0}, "segm": {"AP": 3.0}}, "trainable": 2_000_000, "seed": 1}
    text = sweep_markdown("BiFPN layers", [(point, [run])])
    (line,) = [line for line in text.splitlines() if line.startswith("| 5 ")]
    assert [part.strip() for part in line.strip("|").split("|")] == ["5", "2.00 M", "4.0", "3.0", "1"]


def test_dry_run_counts_up_a_few_iterations(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["table", "6", "--scale", "full", "--configs", str(configs), "--output", str(tmp_path / "out")]
    flags += ["--dry-run", "--cells", "percent_10_frozen", "percent_100_frozen", "--options"]
    assert main([*flags, "SOLVER.MAX_ITER", "900000", "SOLVER.CHECKPOINT_PERIOD", "450000"]) == 0
    out = capsys.readouterr().out
    frozen, broken = (line for line in out.splitlines() if line.startswith("table6/"))
    assert "900000" in frozen and " h " in frozen and "MiB" in frozen and "to do" in frozen
    assert "NUM_CLASSES is 2" in broken
    assert "h of training" in out and not (tmp_path / "out").exists()


def test_submitit_runs_a_job_and_reports_a_failure(configs: Path, tmp_path: Path) -> None:
    folder = configs / "coco/table6"
    good = Job("good", str(folder / "percent_10_frozen.yaml"), ("SEED", "1"))
    bad = Job("bad", str(folder / "percent_100_frozen.yaml"), ("SEED", "1"))
    queue = SlurmQueue(tmp_path / "root", parallel=1, threads=1, num_gpus=0, cluster="local")
    assert queue.run([good, bad]) == [bad]
    result, failure = good.result(tmp_path / "root"), bad.failure(tmp_path / "root")
    assert result is not None and result["iterations"] == 6 and result["metrics"]["bbox"]
    assert failure is not None and "NUM_CLASSES" in failure["error"]


def test_a_plan_names_backbones_that_are_missing_and_pretrains_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["table", "1", "--cells", "masked_frozen", "--configs", str(CONFIGS), "--dry-run", "--no-probe"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "these backbones are pretrained: masked_pico_4000." in out
    assert "MiB" in next(
        line for line in out.splitlines() if line.startswith("table1/detection/masked_frozen")
    )
    assert list(tmp_path.iterdir()) == []
