"""``study table``: a killed queue continues, a finished job never runs twice, a failed one does not stop the rest."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from d2_frozen import train_net
from d2_frozen.backbone.weights import save_weights
from d2_frozen.study import worker
from d2_frozen.study.__main__ import main
from d2_frozen.study.jobs import SETTINGS_FILE, Job, write_json
from d2_frozen.study.worker import run_job

CELLS = ("percent_10_frozen", "percent_10_full")


def command(configs: Path, output: Path, *more: str) -> list[str]:
    flags = ["table", "6", "--scale", "full", "--configs", str(configs), "--output", str(output)]
    return [*flags, "--threads", "1", *more]


def start(configs: Path, output: Path) -> subprocess.Popen:
    whole = [sys.executable, "-m", "d2_frozen.study", *command(configs, output, "--cells", *CELLS)]
    return subprocess.Popen(whole, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.02)


def values(folder: Path) -> list[dict[str, str]]:
    with open(folder / "full" / "table6.csv") as file:
        return [
            {key: line[key] for key in ("cell", "seed", "metric", "value", "trainable")}
            for line in csv.DictReader(file)
        ]


def test_killed_at_three_points_it_ends_with_the_table_of_an_uninterrupted_one(
    configs: Path, tmp_path: Path
) -> None:
    whole = start(configs, tmp_path / "whole")
    printed = whole.communicate()[0].decode()
    assert whole.returncode == 0, printed
    broken = tmp_path / "broken" / "full" / "table6" / "detection"
    kills = (
        "percent_10_frozen/seed1/model_0000001.pth",  # in the first training
        "percent_10_frozen/seed1/result.json",  # between the two
        "percent_10_full/seed1/model_0000003.pth",  # in the second
    )
    for file in kills:
        process = start(configs, tmp_path / "broken")
        wait_for(broken / file, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    first = (broken / "percent_10_frozen/seed1/result.json").stat().st_mtime_ns
    assert main(command(configs, tmp_path / "broken", "--cells", *CELLS)) == 0
    assert values(tmp_path / "broken") == values(tmp_path / "whole") != []
    assert (broken / "percent_10_frozen/seed1/result.json").stat().st_mtime_ns == first


def test_a_result_says_that_its_run_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the seconds in it are not those of the whole training."""
    monkeypatch.setattr(train_net, "main", lambda args: {})
    monkeypatch.setattr(worker, "about_run", lambda folder: {"test_sets": []})
    for resumed in (False, True):
        worker._train_and_record(Namespace(resume=True), Job("one", "a.yaml"), str(tmp_path), 0)
        assert json.loads((tmp_path / "result.json").read_text())["resumed"] is resumed
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")


def test_of_several_test_sets_the_first_has_its_multi_scale_metrics_too() -> None:
    """Those of one set are called bbox_TTA; of several, the sets are called so."""
    one = {"bbox": {"AP": 1.0}, "bbox_TTA": {"AP": 2.0}}
    assert worker.metrics_of_first(one, ["a"]) == {"metrics": one}
    two = {"a": {"bbox": {"AP": 1.0}}, "b": {}, "a_TTA": {"bbox": {"AP": 2.0}}, "b_TTA": {}}
    assert worker.metrics_of_first(two, ["a", "b"]) == {"metrics": one, "metrics_of_sets": two}


_SIGTERM_TO_THE_FORKSERVER = """
import os, signal, time
from multiprocessing.forkserver import _forkserver
from d2_frozen.study.queue import job_context

if __name__ == "__main__":
    run = job_context().Process(target=time.sleep, args=(3,))
    run.start()
    os.kill(_forkserver._forkserver_pid, signal.SIGTERM)
    begun = time.monotonic()
    run.join()
    assert run.exitcode == 0 and time.monotonic() - begun > 1, run.exitcode
"""


def test_a_notice_to_all_its_processes_lets_the_queue_wait_for_its_runs(tmp_path: Path) -> None:
    """Slurm's way. The process that runs are forked from ended, and with it, for the queue, runs that still saved."""
    script = tmp_path / "queue_of_one.py"
    script.write_text(_SIGTERM_TO_THE_FORKSERVER)
    subprocess.run([sys.executable, str(script)], check=True)


def test_a_failed_cell_is_reported_and_the_others_run(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wanted = ("percent_10_frozen", "percent_100_frozen")
    assert main(command(configs, tmp_path / "out", "--cells", *wanted, "--parallel", "2")) == 1
    out, err = capsys.readouterr()
    assert "percent_100_frozen/seed1: ValueError: MODEL.ROI_HEADS.NUM_CLASSES is 2" in err
    assert {line["cell"] for line in values(tmp_path / "out")} == {"percent_10_frozen"}
    assert "percent 100" in out and (tmp_path / "out/full/table6.png").stat().st_size > 1000
    job = Job("table6/detection/percent_100_frozen/seed1", "")
    assert "NUM_CLASSES" in (job.failure(tmp_path / "out/full") or {})["traceback"]


def test_a_result_of_another_config_is_not_taken_for_this_ones(configs: Path, tmp_path: Path) -> None:
    config = str(configs / "coco/table6/percent_10_frozen.yaml")
    job = Job("one", config, ("SEED", "1"))
    job.write_settings(tmp_path)
    (job.folder(tmp_path) / "result.json").write_text("{}")
    assert job.result(tmp_path) == {}
    elsewhere = Job("one", config, ("SEED", "1", "MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", "9"))
    assert elsewhere.result(tmp_path) == {}  # where and how fast does not matter
    other = Job("one", config, ("SEED", "2", "SOLVER.BASE_LR", "0.5"))
    with pytest.raises(
        ValueError, match=r"SEED \(1, now 2\), SOLVER.BASE_LR \(.*, now 0.5\)\. Remove that folder"
    ):
        other.result(tmp_path)
    assert not run_job(other, tmp_path)  # nor does a training go on from another one's checkpoint
    assert "SEED (1, now 2)" in (other.failure(tmp_path) or {})["error"]
    with pytest.raises(ValueError, match="MODEL.WEIGHTS"):  # another start
        Job("one", config, ("SEED", "1", "MODEL.WEIGHTS", "a.pkl")).result(tmp_path)
    older = json.loads((job.folder(tmp_path) / SETTINGS_FILE).read_text())
    del older["TEST.EVAL_PERIOD"]
    write_json(job.folder(tmp_path) / SETTINGS_FILE, older)
    assert job.result(tmp_path) == {}  # of a version that did not have this key


def test_a_result_is_of_one_pretraining_of_its_backbone(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "masked_pico_4000.safetensors"
    config = str(configs / "coco/table6/percent_10_frozen.yaml")
    job = Job("one", config, ("SEED", "1", "MODEL.TIMM.PRETRAINED", str(path)))
    facts = {"kind": "masked", "images": "4000", "seed": "0", "batch": "64"}
    save_weights({"a": torch.zeros(1)}, path, metadata={**facts, "iterations": "2000"})
    job.write_settings(tmp_path)
    write_json(job.folder(tmp_path) / "result.json", {})
    path.unlink()
    assert job.result(tmp_path) == {}  # nothing that says otherwise
    save_weights({"a": torch.zeros(1)}, path, metadata={**facts, "iterations": "500"})
    with pytest.raises(ValueError, match=r"pretraining \(.*2000.*, now .*500"):
        job.result(tmp_path)


def test_a_cell_without_config_is_an_error_with_the_nearest_names(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(command(configs, tmp_path / "out", "--cells", "percent_11_frozen")) == 2
    assert "no cell percent_11_frozen" in (err := capsys.readouterr().err) and "percent_10_frozen" in err
    assert main(["table", "3", "--configs", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "no configs of table 3" in capsys.readouterr().err


def test_finished_jobs_need_neither_data_nor_backbones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # no datasets and no pretrained backbones here
    folder = tmp_path / "out/mini/table1/detection/masked_frozen/seed1"
    metrics = {"bbox": {"AP": 12.5}, "segm": {"AP": 11.0}}
    write_json(folder / "result.json", {"metrics": metrics, "trainable": 1_000_000, "seed": 1})
    for module in ("segmentation", "video"):
        elsewhere = tmp_path / f"out/mini/table1/{module}/masked_frozen/seed1"
        write_json(elsewhere / "result.json", {"metrics": {}, "trainable": 1_000_000, "seed": 1})
    repository = Path(__file__).resolve().parents[3]
    cells = ["table", "1", "--cells", "masked_frozen", "--configs", str(repository / "configs")]
    assert main([*cells, "--output", str(tmp_path / "out")]) == 0
    assert "12.5" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


REPOSITORY = Path(__file__).resolve().parents[3]


def finished_run(folder: Path, seed: int, box: float) -> None:
    metrics = {"bbox": {"AP": box}, "segm": {"AP": box}}
    write_json(folder / f"seed{seed}/result.json", {"metrics": metrics, "trainable": 1_000_000, "seed": seed})


def test_a_table_in_parts_has_what_earlier_parts_have_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    detection = tmp_path / "mini/table2/detection"
    for seed, box in ((1, 10.0), (2, 12.0)):
        finished_run(detection / "fpn_mask_frozen", seed, box)
        finished_run(detection / "bifpn_mask_frozen", seed, box + 5)
    # A run with other options is none of this table.
    finished_run(detection / "fpn_htc_frozen", 1, 99.0)
    htc = REPOSITORY / "configs/mini/detection/table2/fpn_htc_frozen.yaml"
    Job("table2/detection/fpn_htc_frozen/seed1", str(htc), ("SOLVER.MAX_ITER", "3")).write_settings(
        tmp_path / "mini"
    )
    flags = ["--configs", str(REPOSITORY / "configs"), "--output", str(tmp_path)]
    assert main(["table", "2", "--cells", "bifpn_mask_frozen", *flags]) == 0
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert [row[:2] for row in rows[1:]] == [["fpn mask", "11.0 ± 1.4"], ["bifpn mask", "16.0 ± 1.4"]]


def test_a_table_keeps_the_tasks_that_ran_with_options_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A part with other options replaced the table by one of its own task alone."""
    root, configs = tmp_path / "mini", REPOSITORY / "configs"
    for task, metrics, options in (
        ("video", {"video": {"top1": 35.0}}, ("SOLVER.MAX_ITER", "3")),
        ("segmentation", {"sem_seg": {"mIoU": 84.0}}, ("SOLVER.MAX_ITER", "5")),
    ):
        config = configs / f"mini/{task}/table1/none_frozen.yaml"
        job = Job(f"table1/{task}/none_frozen/seed1", str(config), (*options, "SEED", "1"))
        job.write_settings(root)
        result = {"metrics": metrics, "trainable": 1_000_000, "seed": 1, "options": list(job.options)}
        write_json(job.folder(root) / "result.json", result)
        flags = ["--configs", str(configs), "--output", str(tmp_path), "--options", *options]
        assert main(["table", "1", "--cells", f"{task}/none_frozen", *flags]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| none")]
    assert [[part.strip() for part in line.strip("|").split("|")][1] for line in lines] == [
        "35.0",
        "84.0",
        "35.0",
    ]


def test_different_options_are_told_of_tasks_that_the_call_is_not_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of those that it is about, only runs with its own options are taken anyway."""
    detection = tmp_path / "mini/table1/detection"
    for cell, value in (("none_frozen", "3"), ("none_full", "5")):
        result = {
            "metrics": {},
            "trainable": 1,
            "seed": 1,
            "options": ["SOLVER.MAX_ITER", value, "SEED", "1"],
        }
        write_json(detection / cell / "seed1/result.json", result)
    write_json(tmp_path / "mini/table1/video/none_frozen/seed1/result.json", {**result, "options": []})
    flags = ["--configs", str(REPOSITORY / "configs"), "--output", str(tmp_path)]
    for task, told in (("detection", False), ("video", True)):
        caplog.clear()
        assert main(["table", "1", "--cells", f"{task}/none_frozen", *flags]) == 0
        assert (f"{detection} has runs with different --options" in caplog.text) == told


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seeds", "0"], "--seeds 0: give at least 1"),
        (["--parallel", "0"], "--parallel 0: give at least 1"),
        (["--gpus", "0", "--num-gpus", "2"], "--gpus names 1 GPUs, and --num-gpus wants 2"),
        (["--options", "SEED", "7"], "--options SEED: --seeds says that"),
        (["--options", "SOLVER.MAX_ITR", "7"], "SOLVER.MAX_ITR"),
        (["--options", "SOLVER.MAX_ITER"], ""),  # in the words of the engine
    ],
)
def test_what_cannot_be_asked_is_an_error_before_anything_runs(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert main(command(configs, tmp_path / "out", *flags)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err
    assert not (tmp_path / "out").exists()


def test_a_result_that_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    job = Job("one", "")
    job.folder(tmp_path).mkdir()
    for text in ("", '{"metrics": {"bb'):
        (job.folder(tmp_path) / "result.json").write_text(text)
        assert job.result(tmp_path) is None


def test_gpus_that_there_are_not_are_no_run_on_the_cpu(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored afterwards
    job = Job("one", str(configs / "coco/table6/percent_10_frozen.yaml"), ("SEED", "1"))
    assert not run_job(job, tmp_path, gpus=[98, 99], num_gpus=2)
    assert "torch sees 0 GPUs with CUDA_VISIBLE_DEVICES=98,99" in (job.failure(tmp_path) or {})["error"]


def test_of_several_test_sets_the_table_shows_the_first_and_keeps_all(configs: Path, tmp_path: Path) -> None:
    sets = "('tiny_val', 'tiny_train')"
    options = ("--options", "DATASETS.TEST", sets, "SOLVER.MAX_ITER", "1")
    assert main(command(configs, tmp_path / "out", "--cells", "percent_10_frozen", *options)) == 0
    job = Job("table6/detection/percent_10_frozen/seed1", "")
    found = json.loads((job.folder(tmp_path / "out/full") / "result.json").read_text())
    assert list(found["metrics_of_sets"]) == ["tiny_val", "tiny_train"]
    assert str(found["metrics"]) == str(found["metrics_of_sets"]["tiny_val"]) and "bbox" in found["metrics"]
    assert "of several test sets the first, tiny_val" in (tmp_path / "out/full/table6.md").read_text()
    assert {line["metric"] for line in values(tmp_path / "out") if line["value"]} == {"bbox/AP", "segm/AP"}
