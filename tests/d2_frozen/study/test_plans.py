"""Sweeps, the probe of a dry run, and the cluster's queue, run by submitit on this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from d2_frozen.backbone.weights import save_weights
from d2_frozen.study import __main__ as command
from d2_frozen.study import pretraining
from d2_frozen.study.__main__ import main
from d2_frozen.study.jobs import FAILURE_FILE, Job, write_json
from d2_frozen.study.layout import sweep_markdown
from d2_frozen.study.pretraining import Pretraining
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


def test_a_plan_says_what_it_could_not_estimate(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = configs / "coco/table6/percent_1_full.yaml"
    bad.write_text("MODEL: {NO_SUCH_KEY: 1}\n")
    flags = ["table", "6", "--scale", "full", "--configs", str(configs), "--output", str(tmp_path / "out")]
    wanted = ["--cells", "percent_1_full", "percent_10_frozen", "--seeds", "2"]
    assert main([*flags, "--dry-run", "--no-probe", *wanted]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("table6/")]
    assert ["MiB" in row for row in rows] == [False, True, False, True]
    assert (
        f"error: table6/detection/percent_1_full/seed1: ValueError: {bad}: " in out and "NO_SUCH_KEY" in out
    )
    assert "Without 2 of 4 jobs to do, which could not be estimated." in out


def test_a_plan_probes_no_model_that_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its data and backbone may be elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "SHIPPED_DIR", tmp_path)
    cells = tmp_path / "out/mini/table1/detection"
    result = {"metrics": {}, "trainable": 1_000_000}
    for seed in (1, 2):
        write_json(cells / f"masked_frozen/seed{seed}/result.json", {**result, "seed": seed})
    write_json(cells / "contrastive_frozen/seed1/result.json", {**result, "seed": 1})
    probed: list[str] = []

    def count_up(jobs: list[Job]) -> list[str]:
        probed.extend(job.name for job in jobs)
        return ["no estimate"] * len(jobs)

    monkeypatch.setattr(command, "count_up", count_up)
    flags = ["--configs", str(CONFIGS), "--output", "out", "--seeds", "2", "--dry-run", "--no-probe"]
    wanted = ["detection/masked_frozen", "detection/contrastive_frozen"]
    assert main(["table", "1", "--cells", *wanted, *flags]) == 0
    assert probed == ["table1/detection/contrastive_frozen/seed1"]
    out = capsys.readouterr().out
    rows = [line.split()[:2] for line in out.splitlines() if line.startswith("table1/")]
    assert [state for name, state in rows if "masked" in name] == ["finished"] * 2
    assert "are pretrained: contrastive_pico_4000.\n" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--slurm", "slurm_partition"], "--slurm takes NAME=VALUE"),
        (["--slurm", "slurm_partition=gpu", "slurm_partitoin=gpu"], "slurm_partitoin"),
        (["--slurm", "timeout_min=long"], "timeout_min"),
        (["--slurm", "slurm_time=12:00:00"], "times are in minutes"),
        (["--slurm", "slurm_setup=[a"], "while parsing"),
        (["--slurm", "slurm_partition=gpu", "--gpus", "0"], "--num-gpus N asks for N for each run"),
    ],
)
def test_mistakes_of_slurm_are_found_before_pretraining(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert error_of_a_table_on_a_cluster(flags, tmp_path, monkeypatch, capsys, message)


def test_no_cluster_is_found_before_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--slurm", "slurm_partition=gpu"]
    assert error_of_a_table_on_a_cluster(flags, tmp_path, monkeypatch, capsys, '"srun"')


def error_of_a_table_on_a_cluster(
    flags: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    message: str,
) -> bool:
    """Is it said before anything is generated or pretrained?"""

    def too_late(*_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(command, "_generate", too_late)
    monkeypatch.setattr(command, "pretrain", too_late)
    monkeypatch.chdir(folder)
    table = ["table", "1", "--cells", "detection/masked_frozen", "--configs", str(CONFIGS), "--output", "out"]
    assert main([*table, *flags]) == 2
    err = capsys.readouterr().err
    return err.startswith("error: ") and message in err


def test_before_submission_it_is_said_where_backbones_are_pretrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Queue:
        def __init__(self, *_: object) -> None: ...

        def run(self, jobs: list[Job]) -> list[Job]:
            return jobs

    monkeypatch.setattr(command, "SlurmQueue", Queue)
    monkeypatch.setattr(command, "_generate", lambda tasks: None)
    monkeypatch.setattr(command, "pretrain", lambda *_: None)
    monkeypatch.setattr(pretraining, "SHIPPED_DIR", tmp_path)
    monkeypatch.chdir(tmp_path)
    table = ["table", "1", "--cells", "detection/masked_frozen", "--configs", str(CONFIGS), "--output", "out"]
    assert main([*table, "--slurm", "slurm_partition=gpu"]) == 1
    assert "masked_pico_4000 is pretrained here, in this process" in caplog.text
    assert "study pretrain --kind" in caplog.text


def test_a_table_does_not_take_a_backbone_of_another_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_generate", lambda tasks: None)
    monkeypatch.setattr(command.LocalQueue, "run", lambda self, jobs: [])
    table = ["table", "1", "--cells", "detection/masked_frozen", "--configs", str(CONFIGS), "--output", "out"]
    path = Path("output/study/pretrained/masked_pico_4000.safetensors")
    for facts, code in (({"iterations": "2000"}, 0), ({"iterations": "10", "seed": "0"}, 2)):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights({"a": torch.zeros(1)}, path, metadata=facts)
        assert main(table) == code
    assert f"{path} is of another pretraining" in capsys.readouterr().err
    assert main([*table, "--pretraining-iterations", "10"]) == 0


def test_missing_backbones_are_pretrained_for_as_long_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_generate", lambda tasks: None)
    monkeypatch.setattr(command.LocalQueue, "run", lambda self, jobs: [])
    monkeypatch.setattr(command, "pretrain", lambda what, *_: pretrained.append(what))
    monkeypatch.setattr(pretraining, "SHIPPED_DIR", tmp_path)
    table = ["table", "5", "--cells", "detection/nano_500", "--configs", str(CONFIGS), "--output", "out"]
    assert main([*table, "--pretraining-iterations", "10"]) == 0
    assert pretrained == [Pretraining("supervised", "nano", images=500, iterations=10)]


def test_cells_go_on_without_a_backbone_whose_pretraining_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    queued = []

    def fail(what: Pretraining, *_: object) -> None:
        raise FloatingPointError(f"{what.name}: the loss is nan at iteration 3.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "SHIPPED_DIR", tmp_path)
    monkeypatch.setattr(command, "_generate", lambda tasks: None)
    monkeypatch.setattr(command, "pretrain", fail)
    monkeypatch.setattr(command.LocalQueue, "run", lambda self, jobs: queued.extend(jobs) or [])
    cells = ["--cells", "detection/none_frozen", "detection/masked_frozen"]
    assert main(["table", "1", *cells, "--configs", str(CONFIGS), "--output", "out"]) == 0
    assert [job.name.split("/")[2] for job in queued] == ["none_frozen", "masked_frozen"]
    assert "masked_pico_4000.safetensors is not there: masked_pico_4000: the loss is nan" in caplog.text


def test_a_backbone_that_comes_with_the_package_is_not_pretrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pretrained = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "SHIPPED_DIR", tmp_path / "shipped")
    monkeypatch.setattr(command, "_generate", lambda tasks: None)
    monkeypatch.setattr(command.LocalQueue, "run", lambda self, jobs: [])
    monkeypatch.setattr(command, "pretrain", lambda what, *_: pretrained.append(what.name))
    facts = {"kind": "supervised", "images": "500", "seed": "0", "iterations": "2000", "batch": "64"}
    (tmp_path / "shipped/study").mkdir(parents=True)
    ready = tmp_path / "shipped/study/supervised_pico_500.safetensors"
    save_weights({"a": torch.zeros(1)}, ready, metadata=facts)
    table = ["table", "5", "--cells", "detection/pico_500", "detection/nano_500", "--configs", str(CONFIGS)]
    plan = [*table, "--output", "out", "--dry-run", "--no-probe"]
    assert main(plan) == 0
    assert "these backbones are pretrained: supervised_nano_500." in capsys.readouterr().out
    assert not Path("output").exists()
    assert main([*plan, "--pretraining-iterations", "10"]) == 0
    assert "pretrained: supervised_nano_500, supervised_pico_500." in capsys.readouterr().out
    assert main([*table, "--output", "out"]) == 0
    assert pretrained == ["supervised_nano_500"]
    copied = Path("output/study/pretrained/supervised_pico_500.safetensors")
    assert copied.read_bytes() == ready.read_bytes()


def test_submitit_runs_a_job_and_reports_a_failure(configs: Path, tmp_path: Path) -> None:
    folder = configs / "coco/table6"
    good = Job("good", str(folder / "percent_10_frozen.yaml"), ("SEED", "1"))
    bad = Job("bad", str(folder / "percent_100_frozen.yaml"), ("SEED", "1"))
    queue = SlurmQueue(tmp_path / "root", parallel=1, threads=1, num_gpus=0, cluster="local")
    assert queue.run([good, bad]) == [bad]
    result, failure = good.result(tmp_path / "root"), bad.failure(tmp_path / "root")
    assert result is not None and result["iterations"] == 6 and result["metrics"]["bbox"]
    assert failure is not None and "NUM_CLASSES" in failure["error"]


def test_a_task_that_is_killed_before_it_says_why_is_not_named_with_an_older_error(tmp_path: Path) -> None:
    class Executor:
        batch = contextlib.nullcontext

        def submit(self, run: object) -> SimpleNamespace:
            paths = SimpleNamespace(stderr="7_0_log.err")
            return SimpleNamespace(job_id="7_0", done=lambda: True, state="OUT_OF_MEMORY", paths=paths)

    job = Job("killed", "a.yaml")
    write_json(job.folder(tmp_path) / FAILURE_FILE, {"error": "ValueError: mended since", "traceback": ""})
    queue = SlurmQueue(tmp_path, parallel=1, num_gpus=0, cluster="local")
    queue._executor = Executor()
    assert queue.run([job]) == [job]
    failure = job.failure(tmp_path)
    assert failure is not None and failure["error"] == "OUT_OF_MEMORY, 7_0_log.err"


def test_a_plan_names_backbones_that_are_missing_and_pretrains_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "SHIPPED_DIR", tmp_path)
    flags = ["table", "1", "--cells", "masked_frozen", "--configs", str(CONFIGS), "--dry-run", "--no-probe"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "these backbones are pretrained: masked_pico_4000." in out
    assert "MiB" in next(
        line for line in out.splitlines() if line.startswith("table1/detection/masked_frozen")
    )
    assert list(tmp_path.iterdir()) == []
