"""The command line: Detectron2's flags, and errors before anything is built."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import (
    SEGMENTATION,
    Flags,
    coco_entries,
    flags_for,
    sem_seg_entries,
    train,
    trained_on,
    write_config,
)

import d2_frozen
from d2_frozen import config, tasks
from d2_frozen.engine.checkpoint import CheckpointMismatchError
from d2_frozen.train_net import argument_parser, evaluation_model, main, read_config, results_table, setup
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser

ROOT = Path(__file__).resolve().parents[2]


def test_flags_are_detectron2s() -> None:
    flags = {tuple(action.option_strings) for action in argument_parser()._actions}
    assert flags == {tuple(action.option_strings) for action in default_argument_parser()._actions}
    named = {name for option in flags for name in option}
    assert {
        "--config-file",
        "--resume",
        "--eval-only",
        "--num-gpus",
        "--num-machines",
        "--machine-rank",
    } <= named


@pytest.mark.parametrize("entry", [["train_net.py"], ["-m", "d2_frozen.train_net"]])
def test_help_works_from_both_entries(entry: list[str]) -> None:
    done = subprocess.run([sys.executable, *entry, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--config-file" in done.stdout and "--dist-url" in done.stdout


def test_missing_weights_are_named(flags: Flags) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        main(flags("--eval-only", "MODEL.WEIGHTS", "nowhere.pth"))


def test_weights_for_another_class_count_are_refused_at_evaluation(flags: Flags, tmp_path: Path) -> None:
    cfg = setup(flags("--eval-only"))
    model = evaluation_model(cfg)
    state = {key: value for key, value in model.state_dict().items() if "bottom_up" not in key}
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(3, 32)
    torch.save({"model": {**model.state_dict(), **state}}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"cls_score.weight.*\(3, 32\).*\(7, 32\)"):
        main(flags("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "other.pth")))


def test_evaluating_without_weights_is_said(
    flags: Flags, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation_model(setup(flags("--eval-only")))
    assert "MODEL.WEIGHTS is empty: the heads that are evaluated are untrained" in caplog.text
    caplog.clear()
    evaluation_model(setup(flags("--eval-only", "--resume")), resume=True)
    assert f"{tmp_path}/out has no checkpoint: the heads that are evaluated are untrained" in caplog.text


def test_an_evaluation_does_not_name_what_it_has_not_written(
    flags: Flags, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights and metrics in OUTPUT_DIR are of an earlier training, perhaps not those that were evaluated."""
    (tmp_path / "out").mkdir()
    for name in ("model_final.pth", "metrics.json"):
        (tmp_path / "out" / name).touch()
    main(flags("--eval-only"))
    (done,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Done.")]
    assert "config.yaml" in done and "model_final.pth" not in done and "metrics.json" not in done


def test_weights_of_another_kind_of_model_are_refused(flags: Flags, tiny_world: Path, tmp_path: Path) -> None:
    """A head of segmentation is no head of detection, though both have a backbone of the same name."""
    entries = sem_seg_entries(tiny_world, "other_kind")
    other = write_config(tmp_path / "seg.yaml", SEGMENTATION, trained_on(entries, iterations=1))
    train(flags_for(other)("OUTPUT_DIR", str(tmp_path / "seg"), "DATASETS.TEST", "()"))
    with pytest.raises(CheckpointMismatchError, match="it is a model of another kind.*config.yaml beside it"):
        main(flags("--eval-only", "MODEL.WEIGHTS", str(tmp_path / "seg/model_final.pth")))


@pytest.mark.parametrize(
    "options, advice",
    [
        (["OUTPUT_DIR", "out", "--resume"], "--resume stands behind KEY VALUE options; flags come before"),
        (["SOLVER.MAX_ITER=3"], "SOLVER.MAX_ITER=3 is no pair of KEY VALUE. Write: SOLVER.MAX_ITER 3"),
        (["SEED", "1", "MODEL.WEIGHTS="], "Write: MODEL.WEIGHTS ''"),
        (["SEED"], "expected KEY VALUE pairs|odd|length"),
    ],
)
def test_options_that_are_no_pairs(options: list[str], advice: str) -> None:
    with pytest.raises(AssertionError, match=advice):
        read_config("", options)


@pytest.mark.parametrize("key, value", [("DATASETS.TRAIN", "parts_train"), ("SOLVER.STEPS", "700")])
def test_a_list_that_is_none(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}\. A list is written as KEY "):
        read_config("", [key, value])


@pytest.mark.parametrize(
    "key, value, advice",
    [
        ("SOLVER.BASE_LR", "1", "A number with a point is wanted: 1.0"),
        ("MODEL.MASK_ON", "yes", "Write True or False"),
        (
            "MODEL.WEIGHTS",
            "12",
            "Text that looks like a number is written '12' in a yaml, \"'12'\" on a command",
        ),
    ],
)
def test_a_value_of_another_type(key: str, value: str, advice: str, tmp_path: Path) -> None:
    """In options and in files."""
    section, _, name = key.partition(".")
    (tmp_path / "a.yaml").write_text(f"{section}: {{{name}: {value}}}\n")
    for arguments in (("", [key, value]), (str(tmp_path / "a.yaml"), [])):
        if arguments[0] and value == "yes":  # yaml's word for True
            assert read_config(*arguments).MODEL.MASK_ON is True
            continue
        with pytest.raises(ValueError, match=re.escape(f"{key}. {advice}")):
            read_config(*arguments)


def test_keys_of_your_own_are_known_to_every_command_that_reads_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("MODEL: {MY_HEAD: {WIDTH: 24}}\n")
    monkeypatch.setattr(config, "_keys_of_others", {})
    with pytest.raises(KeyError, match="MODEL.MY_HEAD"):
        read_config(str(tmp_path / "mine.yaml"), [])

    for default in (8, 16):  # as a notebook's cell that is run again

        @d2_frozen.register_config
        def add_my_keys(cfg: CfgNode, default: int = default) -> None:
            assert "FROZEN" in cfg.MODEL, "this project's keys are there already"
            cfg.MODEL.MY_HEAD = CfgNode({"WIDTH": default})

    for task in ("FrozenRCNN", "FrozenSegmentor", "FrozenVideoClassifier"):
        assert read_config("", ["MODEL.META_ARCHITECTURE", task]).MODEL.MY_HEAD.WIDTH == 16
    assert read_config(str(tmp_path / "mine.yaml"), ["MODEL.MY_HEAD.WIDTH", "32"]).MODEL.MY_HEAD.WIDTH == 32
    assert read_config(str(tmp_path / "mine.yaml"), []).MODEL.MY_HEAD.WIDTH == 24


def test_home_folder_in_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a yaml nobody else expands ~: a folder of that name was made in the working directory."""
    monkeypatch.setenv("HOME", "/home/me")
    options = (
        "OUTPUT_DIR ~/out MODEL.WEIGHTS ~/w.pth MODEL.TIMM.PRETRAINED ~/b.pth MODEL.FROZEN.CACHE.DIR ~/c"
    )
    cfg = read_config("", options.split())
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("/home/me/out", "/home/me/w.pth")
    assert (cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.FROZEN.CACHE.DIR) == ("/home/me/b.pth", "/home/me/c")


def test_settings_of_testing_are_looked_at_before_training(flags: Flags) -> None:
    cfg = setup(flags("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()"))
    with pytest.raises(ValueError, match="TEST.AUG.MIN_SIZES is"):
        tasks.task_of(cfg).trainer()(cfg)


def test_a_device_that_is_none() -> None:
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'gpu'; choose cuda"):
        read_config("", ["MODEL.DEVICE", "gpu"])


def test_a_gpu_by_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The memory that the log tells, for instance, is that of the current GPU."""

    class Seen(Exception):
        pass

    def set_device(device: torch.device) -> None:
        raise Seen(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    args = argument_parser().parse_args(
        ["OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cuda:1", "DATASETS.TRAIN", "('a',)"]
    )
    with pytest.raises(Seen, match="cuda:1"):
        setup(args)


def test_config_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"# gr\xfcn\nSEED: 1\n")
    with pytest.raises(ValueError, match="a.yaml, or a _BASE_ of it, is no text in UTF-8"):
        read_config(str(tmp_path / "a.yaml"), [])
    (tmp_path / "b.yaml").write_text("MODEL: FrozenRCNN\n")
    with pytest.raises((ValueError, KeyError, AssertionError), match="MODEL"):
        read_config(str(tmp_path / "b.yaml"), [])


def test_results_of_a_test_set_that_is_named_twice() -> None:
    cfg = read_config("", ["DATASETS.TEST", "('a', 'a')"])
    assert "37.50" in results_table(cfg, {"bbox": {"AP": 37.5}})


def test_several_test_sets_keep_their_results(flags: Flags, tiny_world: Path, tmp_path: Path) -> None:
    both = coco_entries(tiny_world)
    main(flags("--eval-only", "DATASETS.REGISTER", str(both), "DATASETS.TEST", "('tiny_train', 'tiny_val')"))
    for name, images in (("tiny_train", 12), ("tiny_val", 4)):
        rows = json.loads((tmp_path / f"out/inference/{name}/coco_instances_results.json").read_text())
        assert len({row["image_id"] for row in rows}) == images


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    """The file, whose base it is, and what it may have been meant to be."""
    (tmp_path / "parts.yaml").write_text("_BASE_: Base-Frozn.yaml\n")
    (tmp_path / "Base-Frozen.yaml").write_text("SEED: 1\n")
    with pytest.raises(FileNotFoundError, match=r"no config file .*part.yaml. Beside it there is parts.yaml"):
        read_config(str(tmp_path / "part.yaml"), [])
    with pytest.raises(
        FileNotFoundError, match=r"Frozn.yaml, which is a _BASE_ of .*parts.yaml. .* is Base-Frozen.yaml"
    ):
        read_config(str(tmp_path / "parts.yaml"), [])


def test_unknown_key_is_an_error(flags: Flags) -> None:
    with pytest.raises((AssertionError, KeyError), match="OPTIMISER"):
        setup(flags("SOLVER.OPTIMISER", "ADAMW"))


def test_mismatching_class_count_is_an_error_before_training(flags: Flags) -> None:
    with pytest.raises(ValueError, match=r"NUM_CLASSES.*4.*6"):
        setup(flags("MODEL.ROI_HEADS.NUM_CLASSES", "4"))


def test_config_yaml_in_the_output_repeats_the_run(flags: Flags, tmp_path: Path) -> None:
    first = setup(flags("SOLVER.MAX_ITER", "5"))
    again = setup(argument_parser().parse_args(["--config-file", str(tmp_path / "out" / "config.yaml")]))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(first.dump())


def test_home_of_a_user_who_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that a container gives its user is often in no list; a folder with the name ~ was made."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(
        ValueError, match="OUTPUT_DIR is '~/runs', but this user has no home folder.*Set HOME"
    ):
        read_config("", ["OUTPUT_DIR", "~/runs"])
