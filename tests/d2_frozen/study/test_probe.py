"""How long a job takes, from a generated batch: without its data and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from d2_frozen import tasks
from d2_frozen.study import probe
from d2_frozen.study.__main__ import main
from d2_frozen.study.jobs import Job
from d2_frozen.summary import fill_standard_classes

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# Data and weights that nobody has.
NOWHERE = (
    "MODEL.TIMM.PRETRAINED",
    "nowhere.safetensors",
    "DATASETS.TRAIN",
    "('nothing',)",
    "DATASETS.REGISTER",
    "[]",
)
SMALL = (
    "MODEL.TIMM.NAME",
    "swinv2_pico_window8_256",
    "MODEL.FROZEN.PRECISION",
    "fp32",
    "SOLVER.AMP.ENABLED",
    "False",
)


SMALL_HEADS = ("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16")


def job_of(config: str, *options: str) -> Job:
    return Job("job", str(CONFIGS / config), (*SMALL, *NOWHERE, *options))


@pytest.mark.parametrize(
    "config, options, shape",
    [
        ("coco/table2/fpn_mask_frozen.yaml", ("INPUT.SCALE_CROP.SIZE", "64"), (3, 64, 64)),
        ("ade20k/table3/encoder_1_decoder_3_frozen.yaml", ("INPUT.CROP.SIZE", "(48, 48)"), (3, 48, 48)),
        (
            "coco/table2/fpn_mask_frozen.yaml",
            ("INPUT.SCALE_CROP.SIZE", "64", "MODEL.PIXEL_MEAN", "[120.0]", "MODEL.PIXEL_STD", "[58.0]"),
            (1, 64, 64),
        ),
        (
            "kinetics400/table4/linear_frozen.yaml",
            ("VIDEO.NUM_FRAMES", "2", "VIDEO.CROP_SIZE", "64"),
            (1, 2, 3, 64, 64),
        ),
    ],
)
def test_a_generated_batch_is_as_large_as_a_real_one(
    config: str, options: tuple[str, ...], shape: tuple
) -> None:
    cfg = tasks.read_config(CONFIGS / config, options)
    fill_standard_classes(cfg)
    batch = tasks.task_of(cfg).generated_batch(cfg, 3)
    assert len(batch) == 3
    for sample in batch:
        assert tuple(sample.get("image", sample.get("video")).shape) == shape


@pytest.mark.parametrize(
    "config, options",
    [
        ("coco/table2/fpn_mask_frozen.yaml", ("INPUT.SCALE_CROP.SIZE", "64", *SMALL_HEADS)),
        ("ade20k/table3/encoder_1_decoder_3_full.yaml", ("INPUT.CROP.SIZE", "(64, 64)")),
        ("kinetics400/table4/global_frozen.yaml", ("VIDEO.NUM_FRAMES", "2", "VIDEO.CROP_SIZE", "64")),
    ],
)
def test_a_step_is_measured_without_data_and_weights(config: str, options: tuple[str, ...]) -> None:
    """One of 16 GPUs has a sixteenth of the batch; a checkpoint has at least trained weights and AdamW's two states."""
    job = job_of(config, "SOLVER.IMS_PER_BATCH", "32", *options)
    step = probe.measure_step(job, num_gpus=16, warm_up=1, timed=1)
    assert step.images == 2 and step.seconds > 0 and step.peak_memory_mib > 0
    assert step.checkpoint_mib * 2**20 >= 3 * 4 * step.trainable
    assert step.checkpoint_mib * 2**20 < 3.1 * 4 * step.trainable + 2**20


def test_the_mask_head_has_as_many_rois_as_that_of_a_trained_network() -> None:
    """A quarter of 512."""
    cfg = tasks.read_config(CONFIGS / "coco/table2/bifpn_htc_frozen.yaml", ("INPUT.SCALE_CROP.SIZE", "64"))
    fill_standard_classes(cfg)
    (sample,) = tasks.task_of(cfg).generated_batch(cfg, 1)
    assert len(sample["instances"]) == 128


def test_a_batch_that_gpus_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="IMS_PER_BATCH 16 cannot be shared by 3 GPUs"):
        probe.measure_step(job_of("coco/table2/fpn_mask_frozen.yaml"), num_gpus=3)


def test_without_gpus_one_process_has_the_whole_batch() -> None:
    options = ("INPUT.SCALE_CROP.SIZE", "64", "SOLVER.IMS_PER_BATCH", "2", *SMALL_HEADS)
    step = probe.measure_step(job_of("coco/table2/fpn_mask_frozen.yaml", *options), 0, warm_up=1, timed=1)
    assert step.images == 2


@pytest.mark.parametrize("estimate", [probe.count_up, probe.probe_synthetic])
def test_a_job_without_config_is_told_and_the_others_are_estimated(
    estimate: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "_step_in_process", lambda *_: probe.Step(5, 2, 0.5, 100.0, 10.0, "a device"))
    (tmp_path / "unknown_key.yaml").write_text("MODEL: {NO_SUCH_KEY: 1}\n")
    (tmp_path / "no_yaml.yaml").write_text("MODEL: [\n")
    bad = [Job(name, str(tmp_path / f"{name}.yaml")) for name in ("unknown_key", "no_yaml", "missing")]
    good = job_of("coco/table2/fpn_mask_frozen.yaml", "SOLVER.CHECKPOINT_PERIOD", "0")
    *errors, found = estimate([*bad, good])
    assert isinstance(found, probe.Estimate) and found.checkpoints == 1  # the last
    for error, said in zip(errors, ("NO_SUCH_KEY", "no_yaml.yaml, or a _BASE_ of it", "no config file")):
        assert isinstance(error, str) and said in error


def test_jobs_with_the_same_step_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 %, 10 % and 100 % of the data: one model, other lengths. Another neck is another step."""
    measured = []

    def measure(job: Job, *_: object) -> probe.Step:
        measured.append(job.config_file)
        return probe.Step(5, 2, 0.5, 100.0, 10.0, "a device")

    monkeypatch.setattr(probe, "_step_in_process", measure)
    names = (
        "table6/percent_1_frozen",
        "table6/percent_100_frozen",
        "table2/bifpn_mask_frozen",
        "table2/fpn_mask_frozen",
    )
    jobs = [
        Job(name, str(CONFIGS / f"coco/{name}.yaml"), ("SEED", str(seed))) for seed, name in enumerate(names)
    ]
    estimates = probe.probe_synthetic(jobs, num_gpus=8)
    assert [Path(path).stem for path in measured] == ["percent_1_frozen", "fpn_mask_frozen"]
    assert [estimate.iterations for estimate in estimates if isinstance(estimate, probe.Estimate)] == [
        16490,
        263850,
        263850,
        263850,
    ]
    assert isinstance(estimates[1], probe.Estimate) and estimates[1].hours == pytest.approx(
        263850 * 0.5 / 3600
    )


def test_dry_run_needs_no_data(configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["table", "6", "--scale", "full", "--configs", str(configs), "--output", str(tmp_path / "out")]
    flags += ["--dry-run", "--probe-synthetic", "--cells", "percent_10_frozen", "--options", *NOWHERE]
    assert main(flags) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("table6/"))
    assert "to do" in line and " 6 " in line and "MiB" in line, out
    assert "without reading data" in out and not (tmp_path / "out").exists()
    assert main([flag for flag in flags if flag != "--dry-run"]) == 2
    assert "add that, or leave them out" in capsys.readouterr().err
