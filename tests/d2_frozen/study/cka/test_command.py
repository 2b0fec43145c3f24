"""``study cka`` on tiny detectors: presets, globs, two models, files, and what cannot be asked."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from d2_frozen import train_net
from d2_frozen.engine import FrozenCheckpointer
from d2_frozen.study.__main__ import main
from d2_frozen.study.cka import command, inputs, measure
from d2_frozen.study.cka.command import add_cka_command
from d2_frozen.study.cka.presets import PRESETS
from detectron2.utils.env import seed_all_rng

ONE_LAYER = ("MODEL.BIFPN.NUM_LAYERS", "2")


@pytest.fixture
def cka(tiny_config: Path, tmp_path: Path):
    """``cka("bifpn", "MODEL.…", "…")`` runs on 8 training images and gives the exit code."""

    def run(*arguments: str, options: tuple[str, ...] = (), config: bool = True) -> int:
        model = ["--config-file", str(tiny_config)] if config else []
        if "--name" not in arguments and arguments[0] in PRESETS:
            model += ["--name", arguments[0]]
        flags = ["--split", "train", "--images", "8", "--batch", "4", "--output", str(tmp_path / "cka")]
        return main(["cka", *flags, *model, *arguments, *(["--options", *options] if options else [])])

    return run


def result(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "cka" / f"{name}.json").read_text())


def test_bifpn_compares_each_level_with_itself(cka, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cka("bifpn", options=ONE_LAYER) == 0
    found = result(tmp_path, "bifpn")
    (panel,) = found["panels"]
    assert panel["rows"] == ["p2", "p3", "p4", "p5", "p6"] and panel["columns"] == ["layer 1", "layer 2"]
    assert panel["pairs"][1][1] == ["backbone.layers.0:input[1]", "backbone.layers.1[1]"]
    values = np.array(panel["cka"])
    assert values.shape == (5, 2) and (values >= -1).all() and (values <= 1).all()
    assert panel["mean"] == pytest.approx(values.mean())
    assert (found["images"], found["batch"], found["side_px"], found["complete"]) == (8, 4, 64, True)
    assert found["models"][0]["frozen"]["backbone.bottom_up"]["sha256"] and "commit" in found
    arrays = np.load(tmp_path / "cka" / "bifpn.npz")
    np.testing.assert_array_equal(arrays["cka_0"], values)
    assert arrays["rows_0"].tolist() == panel["rows"]
    assert (tmp_path / "cka" / "bifpn.png").read_bytes().startswith(b"\x89PNG")
    assert "layer 2" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_numbers(cka, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert cka("bifpn", "--name", name, "--seed", seed, options=ONE_LAYER) == 0
    a, b, c = (result(tmp_path, name)["panels"][0]["cka"] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "heads, stages", [("StandardROIHeads", 0), ("CascadeROIHeads", 3), ("HTCROIHeads", 3)]
)
def test_stages_of_cascades(cka, tmp_path: Path, heads: str, stages: int) -> None:
    options = ["MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    if stages:
        options += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    assert cka("cascade", "--rois", "6", options=tuple(options)) == 0
    box, mask = result(tmp_path, "cascade")["panels"]
    if stages:
        assert box["rows"] == [f"stage {k} input" for k in (1, 2, 3)]
        assert box["columns"] == [f"stage {k} fc{layer}" for k in (1, 2, 3) for layer in (1, 2)]
        # the boxes hardly move before any training
        assert np.allclose(np.array(box["cka"])[0], np.array(box["cka"])[2], atol=0.1)
    else:
        assert (box["rows"], box["columns"]) == (["input"], ["fc1", "fc2"])
    assert mask["columns"] == ([f"stage {k} conv1" for k in (1, 2, 3)] if "HTC" in heads else ["conv1"])
    assert np.isfinite(np.array(box["cka"], dtype=float)).all()
    assert np.isfinite(np.array(mask["cka"], dtype=float)).all()
    assert np.array(mask["batches"]).min() == 2


def test_residual_blocks_start_as_the_identity(cka, tmp_path: Path) -> None:
    assert cka("residual_fpn", options=("MODEL.NECK.NAME", "ResidualFPN")) == 0
    (panel,) = result(tmp_path, "residual_fpn")["panels"]
    assert panel["rows"] == ["p2", "p3", "p4", "p5"] and panel["columns"][0] == "block 1"
    np.testing.assert_allclose(panel["cka"], 1, atol=1e-9)


def test_any_two_globs_rois_and_images_too(cka, tmp_path: Path) -> None:
    assert cka("--x", "backbone[p?]", "--y", "roi_heads.box_head*", options=("MODEL.NECK.NAME", "FPN")) == 0
    (file,) = (tmp_path / "cka").glob("*.json")
    (panel,) = result(tmp_path, file.stem)["panels"]
    assert panel["rows"] == [f"backbone[p{k}]" for k in range(2, 7)]
    assert "roi_heads.box_head.fc1" in panel["columns"] and "roi_heads.box_head" in panel["columns"]
    assert np.isfinite(np.array(panel["cka"], dtype=float)).all()


def test_list_prints_names_shapes_and_examples(cka, capsys: pytest.CaptureFixture) -> None:
    assert cka("bifpn", "--list") == 0
    names = capsys.readouterr().out
    assert cka("--list") == 0
    listed = capsys.readouterr().out
    assert listed == names  # with a preset beside it, too
    lines = {line.split()[0]: line.split()[1:] for line in listed.splitlines() if line}
    assert lines["backbone[p3]"] == ["4x64x8x8", "image"]
    assert lines["roi_heads.box_head.fc1"][1] == "RoI"


def test_fewer_images_than_a_batch_are_enough_for_a_list(cka, capsys: pytest.CaptureFixture) -> None:
    assert cka("--list", "--batch", "100") == 0
    listed = capsys.readouterr().out
    assert "shape, batch of 12" in listed and "12x64x8x8" in listed
    assert cka("--list", "--batch", "1") == 0 and "1x64x8x8" in capsys.readouterr().out
    assert "give at least 1" in error_of(cka("--list", "--batch", "0"), capsys)


def test_the_same_layers_of_two_models(cka, tmp_path: Path, tiny_config: Path) -> None:
    """The same pretrained backbone, frozen and not: equal before training, whatever stands on it."""
    shipped = ("MODEL.TIMM.PRETRAINED", "d2_frozen://swinv2_pico_fdsl.safetensors")
    other = ["MODEL.BACKBONE.FREEZE", "none", *shipped]
    flags = ["--other-config-file", str(tiny_config), "--other-options", *other]
    assert cka("backbone", *flags, options=shipped) == 0
    (file,) = (tmp_path / "cka").glob("*.json")
    assert file.stem == "backbone"
    same, pairs = result(tmp_path, file.stem)["panels"]
    np.testing.assert_allclose(same["cka"], 1, atol=1e-9)
    stages = [(0, 2), (1, 2), (2, 4), (3, 2)]  # the depths of this network
    assert same["columns"] == [f"layers.{s}.blocks.{i}" for s, depth in stages for i in range(depth)]
    np.testing.assert_allclose(np.diag(np.array(pairs["cka"])), 1, atol=1e-9)
    assert cka("backbone") == 2


def test_layers_of_a_backbone_are_those_of_its_innermost_network() -> None:
    panels = PRESETS["backbone"].comparison().panels
    neck = ["backbone.projections.res2.0", "backbone.bottom_up[res2]", "backbone[p2]"]
    for layers in (
        ["res2.0", "res2.10"],
        ["network.blocks.0"],
        ["network.stages_1.blocks.0"],
        ["network.layer1.0"],
    ):
        names = [f"backbone.bottom_up.{layer}" for layer in layers]
        assert [pair[0] for pair in panels(names + neck, names + neck)[0].pairs[0]] == names  # type: ignore[index]
    plain = ["backbone.bottom_up.bottom_up.network.blocks.1", "backbone.bottom_up.stages.0.1"]
    assert panels(plain, plain)[0].columns == ["blocks.1"]
    assert panels(neck[1:], neck[1:])[0].columns == ["res2"]  # nothing but maps
    alone = ["backbone.network.layers.0.blocks.1"]  # no neck
    assert panels(alone, alone)[0].columns == ["layers.0.blocks.1"]


def test_an_interrupted_run_writes_what_it_has(cka, tmp_path: Path, monkeypatch) -> None:
    grams = measure.GramCollector.grams
    before = signal.getsignal(signal.SIGINT)  # a shell starts background jobs with Ctrl-C ignored

    def then_ctrl_c(*arguments: object, **others: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return grams(*arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(measure.GramCollector, "grams", then_ctrl_c)
    assert cka("bifpn") == 130
    found = result(tmp_path, "bifpn")
    assert (found["complete"], found["images"]) == (False, 4)
    assert found["panels"][0]["standard_error"][0][0] is None  # of one batch
    assert signal.getsignal(signal.SIGINT) is before


def test_a_complete_measurement_is_not_replaced_by_an_interrupted_one(
    cka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert cka("bifpn") == 0
    monkeypatch.setattr(inputs.StopAsked, "__bool__", lambda self: True)
    assert cka("bifpn") == 130
    assert (result(tmp_path, "bifpn")["complete"], result(tmp_path, "bifpn")["images"]) == (True, 8)
    assert result(tmp_path, "bifpn_incomplete")["complete"] is False
    assert "bifpn.json is of all its batches and stays" in capsys.readouterr().err


def default_name(*arguments: str) -> str:
    parser = argparse.ArgumentParser()
    add_cka_command(parser.add_subparsers())
    return command._default_name(parser.parse_args(["cka", *arguments]))


def test_other_maps_and_other_models_have_files_of_their_own() -> None:
    long = "backbone.bottom_up.network.layers.*.blocks.*.attn"
    names = [
        default_name("bifpn", "--run", "a"),
        default_name("bifpn", "--run", "a", "--options", "MODEL.WEIGHTS", "b.pth"),
        default_name("bifpn", "--config-file", "a.yaml"),
        default_name("bifpn", "--config-file", "b.yaml"),
        default_name("bifpn", "--config-file", "b.yaml", "--options", "MODEL.WEIGHTS", "b.pth"),
        default_name("bifpn", "--run", "a", "--other-run", "b/table2/seed1"),
        default_name("bifpn", "--run", "a", "--other-run", "c/table2/seed1"),
        default_name("bifpn", "--run", "a", "--other-run", "c/table2/seed1", "--other-options", "SEED", "2"),
        default_name("--x", "backbone[p?]", "--y", "roi_heads.box_head*"),
        default_name("--x", "backbone[p*]", "--y", "roi_heads.box_head*"),
        default_name("--x", long, "--y", f"{long}.qkv"),
        default_name("--x", f"{long}.proj", "--y", f"{long}.qkv"),
    ]
    assert names[0] == "bifpn" and len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.-]{1,80}", name) for name in names)
    same = default_name("bifpn", "--run", "a", "--other-run", "b/table2/seed1/")
    assert same in names


def test_a_run_is_its_folder(cka, flags, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = flags("SOLVER.MAX_ITER", "1", "TEST.PICTURES", "0")
    train_net.main(args)
    run = tmp_path / "out"
    assert main(["cka", "bifpn", "--run", str(run), "--batch", "4"]) == 0
    found = json.loads((run / "cka" / "bifpn.json").read_text())
    assert found["models"][0]["weights"] == str(run / "model_final.pth") and found["datasets"] == ["tiny_val"]
    capsys.readouterr()
    # The same heads on another backbone are refused, by the checkpointer.
    other = ["--options", "MODEL.TIMM.NAME", "swinv2_cr_tiny_ns_224"]
    assert main(["cka", "bifpn", "--run", str(run), "--batch", "4", *other]) == 2
    assert "holds heads for the backbone swinv2_pico_window8_256" in capsys.readouterr().err


def error_of(code: int, capsys: pytest.CaptureFixture) -> str:
    assert code == 2
    return capsys.readouterr().err


def test_what_cannot_be_asked(cka, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "at least 4" in error_of(cka("bifpn", "--batch", "3"), capsys)
    assert "at least 1 RoI" in error_of(cka("cascade", "--rois", "0"), capsys)
    assert "--size -5 is below 0" in error_of(cka("bifpn", "--size", "-5"), capsys)
    assert "a second model" in error_of(cka("bifpn", "--other-options", "SEED", "2"), capsys)
    assert "tiny_train has 12" in error_of(cka("bifpn", "--images", "13"), capsys)
    few = error_of(cka("bifpn", "--images", "5", "--batch", "6"), capsys)
    assert "5 images are too few for one batch of 6" in few
    unknown = error_of(cka("--x", "backbone.layer.*", "--y", "roi_heads.*"), capsys)
    assert "no feature map fits 'backbone.layer.*'" in unknown and "backbone.layers.0" in unknown
    assert "nothing that this preset compares" in error_of(cka("pixel_decoder"), capsys)
    assert "a preset, or both --x and --y" in error_of(cka("bifpn", "--x", "a", "--y", "b"), capsys)
    assert "a preset, or both --x and --y" in error_of(cka("--x", "a"), capsys)
    assert "name each model by one of" in error_of(cka("bifpn", config=False), capsys)
    assert "no config.yaml" in error_of(cka("bifpn", "--run", str(tmp_path), config=False), capsys)
    assert "no config file" in error_of(main(["cka", "bifpn", "--config-file", "none.yaml"]), capsys)
    assert "MODEL.NO" in error_of(cka("bifpn", options=("MODEL.NO", "1")), capsys)
    other = ["--other-options", "INPUT.FORMAT", "BGR"]
    config = str(next(tmp_path.glob("tiny.yaml")))
    assert "both get the same" in error_of(cka("bifpn", "--other-config-file", config, *other), capsys)


def test_a_config_that_is_no_yaml_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.yaml").write_text("MODEL: [\n")
    code = main(["cka", "bifpn", "--config-file", str(tmp_path / "a.yaml")])
    assert "a.yaml is not valid yaml" in error_of(code, capsys)


def test_a_folder_without_weights_is_an_error(flags, tmp_path: Path, tiny_config: Path) -> None:
    (tmp_path / "config.yaml").write_text(tiny_config.read_text())
    with pytest.raises(FileNotFoundError, match="has no weights"):
        inputs.ModelSource(run=str(tmp_path)).open("test")
    cfg = train_net.read_config(str(tiny_config), ["MODEL.ROI_HEADS.NUM_CLASSES", "6"])
    seed_all_rng(cfg.SEED)  # its frozen backbone is a random one
    saver = FrozenCheckpointer(train_net.evaluation_model(cfg), str(tmp_path))
    saver.save("model_0000001")
    model = inputs.ModelSource(run=str(tmp_path)).open("test")
    assert str(tmp_path / "model_0000001.pth") == model.cfg.MODEL.WEIGHTS and not model.network.training
