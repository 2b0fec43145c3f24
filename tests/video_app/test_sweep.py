"""A head of a sweep is what it would be alone, whatever becomes of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Flags, loaded_trainer, weights
from torch import nn

from d2_frozen import tasks
from d2_frozen.train_net import argument_parser, main, setup
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from video_app.models.sweep import Candidate, candidates
from video_app.sweep import report, save_head
from video_app.trainer import VideoTrainer

SWEEP = (
    *("MODEL.META_ARCHITECTURE", "FrozenVideoSweep"),
    *("MODEL.VIDEO_HEAD.SWEEP.NAMES", "['TemporalVideoHead','AttentiveProbe','LinearVideoHead']"),
    *("MODEL.VIDEO_HEAD.SWEEP.LR", "[0.01,0.001]"),
)


def test_candidates_are_every_combination(tiny_config: Path) -> None:
    cfg = tasks.read_config(tiny_config, [*SWEEP, "MODEL.VIDEO_HEAD.SWEEP.WEIGHT_DECAY", "[0.0,'1e-2']"])
    found = candidates(cfg)
    assert len(found) == 3 * 2 * 2 and found[1] == Candidate("TemporalVideoHead", 0.01, 0.01)
    alone = found[-1].config(cfg)
    assert alone.MODEL.META_ARCHITECTURE == "FrozenVideoClassifier"
    assert (alone.MODEL.VIDEO_HEAD.NAME, alone.SOLVER.BASE_LR) == ("LinearVideoHead", 0.001)
    assert candidates(alone) == [found[-1]]
    for lr in ("[0.01,0.01]", "[0.0]", "['a']"):
        with pytest.raises(ValueError, match="SWEEP"):
            candidates(tasks.read_config(tiny_config, [*SWEEP, "MODEL.VIDEO_HEAD.SWEEP.LR", lr]))


@pytest.mark.parametrize("clip", ["none", "full_model"])
def test_each_head_is_as_if_alone_and_resumes(flags: Flags, tmp_path: Path, clip: str) -> None:
    """Dropout, drop-path, schedule, decay and clipping included: equal bits."""
    options = ["TEST.PICTURES", "0"]
    if clip == "full_model":
        options += ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip]
        options += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.1"]
    out = tmp_path / "sweep"
    results = main(flags(*options, *SWEEP, "MODEL.VIDEO_HEAD.SWEEP.SAVE", "all", "OUTPUT_DIR", str(out)))
    table = json.loads((out / "sweep.json").read_text())
    assert len(table["heads"]) == 6 and results["video"] == results[f"head_{table['best']:02d}"]
    assert results["video"]["top1"] == max(results[f"head_{k:02d}"]["top1"] for k in range(6))

    for number in (1, 2):
        row = table["heads"][number]
        alone = tmp_path / f"alone{number}"
        own = ["MODEL.VIDEO_HEAD.NAME", row["name"], "SOLVER.BASE_LR", str(row["lr"])]
        single = main(flags(*options, *own, "OUTPUT_DIR", str(alone)))
        expected = weights(alone)
        found = weights(out / f"sweep/{number:02d}")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        assert single["video"] == results[f"head_{number:02d}"]
    if clip == "none":
        return

    # The folder of a head is that of a run: its config and weights are all that evaluation needs.
    folder = out / "sweep/02"
    arguments = ["--config-file", str(folder / "config.yaml"), "--eval-only"]
    again = main(argument_parser().parse_args([*arguments, "MODEL.WEIGHTS", str(folder / "model_final.pth")]))
    assert again["video"] == results["head_02"]

    parts = tmp_path / "parts"
    trainer = VideoTrainer(setup(flags(*options, *SWEEP, "OUTPUT_DIR", str(parts))))
    trainer.resume_or_load(resume=False)
    trainer.max_iter = 2
    trainer.train()
    (parts / "last_checkpoint").write_text("model_0000001.pth")
    main(flags("--resume", *options, *SWEEP, "OUTPUT_DIR", str(parts)))
    whole, resumed = weights(out), weights(parts)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_diverged_head_is_set_aside(flags: Flags, tmp_path: Path) -> None:
    """A rate of 1e30 makes one head's loss no number; the other trains as if alone."""
    options = ["TEST.PICTURES", "1", "MODEL.META_ARCHITECTURE", "FrozenVideoSweep"]
    options += ["MODEL.VIDEO_HEAD.SWEEP.LR", "[1e30,0.001]", "SOLVER.MAX_ITER", "6"]
    main(flags(*options, "OUTPUT_DIR", str(tmp_path / "sweep")))
    table = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [row["state"] for row in table["heads"]] == ["diverged", ""] and table["best"] == 1
    own = ["TEST.PICTURES", "0", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "6"]
    main(flags(*own, "OUTPUT_DIR", str(tmp_path / "alone")))
    expected = weights(tmp_path / "alone")
    found = weights(tmp_path / "sweep/sweep/01")
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_head_that_another_process_has_lost_is_lost_here_too(
    flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its scores are there for the videos of some processes, and None for those of others."""
    trainer = VideoTrainer(setup(flags(*SWEEP)))
    model, batch = trainer.model.train(), next(iter(trainer.stream))
    assert all(loss > 0 for loss in model(batch).values()) and not model.diverged.any()

    def with_other(counts: torch.Tensor) -> None:
        counts[1] += 1

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", with_other)
    losses = list(model(batch).values())
    assert model.diverged.tolist() == [False, True, False, False, False, False]
    assert losses[1] == 0 and all(loss > 0 for k, loss in enumerate(losses) if k != 1)


def test_rates_of_a_sweep_scale_with_the_number_of_processes_as_that_of_a_run_alone(flags: Flags) -> None:
    """Made for two processes, run in one: half the batch, half the rates."""
    options = ["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.01"]
    cfg = setup(flags(*SWEEP, *options))
    scaled = VideoTrainer.auto_scale_workers(cfg, 1)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR) == (1, 0.005)
    assert [one.lr for one in candidates(scaled)] == [0.005, 0.0005] * 3
    assert [one.lr for one in candidates(cfg)] == [0.01, 0.001] * 3 and scaled.is_frozen()
    rates = {group["lr"] for group in VideoTrainer(cfg).optimizer.param_groups}
    assert rates == {0.005, 0.0005}


def test_when_all_heads_have_diverged_the_run_ends(flags: Flags) -> None:
    """There would be no best head, only one whose weights are no numbers."""
    options = ["MODEL.META_ARCHITECTURE", "FrozenVideoSweep", "MODEL.VIDEO_HEAD.SWEEP.LR", "[1e30,1e31]"]
    with pytest.raises(FloatingPointError, match=r"all 2 heads of the sweep have diverged.*1e\+31"):
        main(flags(*options, "SOLVER.MAX_ITER", "6"))


def test_a_sweep_needs_a_frozen_backbone(tiny_config: Path) -> None:
    options = [*SWEEP, "MODEL.BACKBONE.FREEZE", "none", "MODEL.VIDEO_HEAD.NUM_CLASSES", "3"]
    with pytest.raises(ValueError, match="FREEZE: all"):
        build_model(tasks.read_config(tiny_config, options))


def test_a_head_that_was_the_best_once_is_no_result(flags: Flags, tmp_path: Path) -> None:
    """TEST.EVAL_PERIOD: the best head of the middle of training lay beside that of the end."""
    cfg = setup(flags(*SWEEP, "TEST.PICTURES", "0"))
    model = VideoTrainer.build_model(cfg)
    for best in (0, 3, 3):
        found = {f"head_{k:02d}": {"top1": 10.0 * (k == best)} for k in range(6)}
        report(cfg, model, {**found, "head_05": {"top1": 5.0}})
        folder = Path(cfg.OUTPUT_DIR, "sweep")
        assert [path.name for path in folder.iterdir()] == [f"{best:02d}"]
        assert (folder / f"{best:02d}/model_final.pth").is_file()
    # Where all were asked for, none is removed.
    save_head(cfg, model, 1)
    cfg.defrost()
    cfg.MODEL.VIDEO_HEAD.SWEEP.SAVE = "all"
    report(cfg, model, {f"head_{k:02d}": {"top1": float(k == 4)} for k in range(6)})
    assert len(list(folder.iterdir())) == 6


def test_the_file_of_a_sweep_predicts_by_the_head_that_is_best_in_the_end(
    flags: Flags, tmp_path: Path
) -> None:
    """It was written before the evaluation that finds it, and predicted by the first head."""

    class Chooses(VideoTrainer):
        best = iter([3, 4])

        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
            model.best.fill_(next(cls.best))
            return {"video": {"top1": 50.0}}

    options = (*SWEEP, "SOLVER.MAX_ITER", "1", "TEST.PICTURES", "0")
    Chooses(setup(flags(*options))).train()
    assert weights(tmp_path / "out")["best"] == 3
    # And where the last evaluation was interrupted, and is made up for.
    resumed = Chooses(setup(flags("--resume", *options)))
    resumed.resume_or_load(resume=True)
    resumed.record_last_evaluation(resumed.test(resumed.cfg, resumed.model))
    assert weights(tmp_path / "out")["best"] == 4
    assert loaded_trainer(flags("--resume", *options)).start_iter == 1


def test_heads_that_cannot_be_written_end_no_training(flags: Flags, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that is full during an evaluation: its numbers count, and sweep.json names no head that is not there."""
    cfg = setup(flags(*SWEEP, "TEST.PICTURES", "0"))
    Path(cfg.OUTPUT_DIR, "sweep").write_text("no folder can be made here")
    results = {f"head_{k:02d}": {"top1": float(k)} for k in range(6)}
    assert report(cfg, VideoTrainer.build_model(cfg), results)["video"] == {"top1": 5.0}
    assert "heads in sweep/ are not written" in caplog.text and "The run goes on" in caplog.text
    assert not Path(cfg.OUTPUT_DIR, "sweep.json").exists()


def test_a_head_written_again_without_the_training_data_keeps_its_class_names(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --eval-only does where only the test set is there."""
    cfg = setup(flags(*SWEEP, "TEST.PICTURES", "0"))
    model = VideoTrainer.build_model(cfg)
    file = save_head(cfg, model, 1) / "model_final.pth"
    named = torch.load(file, weights_only=True)["classes"]
    monkeypatch.setattr(type(tasks.task_of(cfg)), "classes", lambda self, cfg: None)
    save_head(cfg, model, 1)
    assert named and torch.load(file, weights_only=True)["classes"] == named


def test_the_best_is_also_measured_where_it_was_not_chosen(flags: Flags, tmp_path: Path) -> None:
    """The log says that the first set chose the head, and what the head does on the second."""
    options = ["TEST.PICTURES", "0", "SOLVER.MAX_ITER", "1", "MODEL.META_ARCHITECTURE", "FrozenVideoSweep"]
    options += ["MODEL.VIDEO_HEAD.SWEEP.LR", "[0.1,0.001]"]
    main(flags(*options))
    assert (
        "chose the best of 2 heads, so its figure there flatters it" in (tmp_path / "out/log.txt").read_text()
    )
    both = tmp_path / "both"
    sets = ("DATASETS.TEST", "('tiny_video_val', 'tiny_video_train')")
    results = main(flags(*options, *sets, "OUTPUT_DIR", str(both)))
    best = json.loads((both / "sweep.json").read_text())["best"]
    other = results["tiny_video_train"][f"head_{best:02d}"]
    line = f"Head {best}, chosen on tiny_video_val, on sets that had no say in it: tiny_video_train: top-1 "
    assert f"{line}{other['top1']:.2f}" in (both / "log.txt").read_text()
    assert results["tiny_video_train"]["video"] == other
