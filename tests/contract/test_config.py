"""Facts about configs that the golden files do not hold."""

from __future__ import annotations

import pytest
import yaml

from detectron2.config import (
    CfgNode,
    configurable,
    downgrade_config,
    get_cfg,
    global_cfg,
    set_global_cfg,
    upgrade_config,
)


def test_get_cfg_hands_out_copies():
    first, second = get_cfg(), get_cfg()
    first.MODEL.MASK_ON = True
    assert second.MODEL.MASK_ON is False


def test_dump_and_merge_lead_back(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.STEPS", "(3, 4)", "MODEL.WEIGHTS", "a.pkl"])
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(file))
    # Inner tuples come back as lists; the values are the same.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_global_cfg_is_filled_in_place():
    cfg = get_cfg()
    cfg.OUTPUT_DIR = "./elsewhere"
    set_global_cfg(cfg)
    assert global_cfg.OUTPUT_DIR == "./elsewhere"


def test_new_keys_are_taken_where_the_node_allows_them(tmp_path):
    cfg = get_cfg()
    cfg.MY = CfgNode({"A": 1}, new_allowed=True)
    file = tmp_path / "config.yaml"
    file.write_text("MY:\n  B: 2\n")
    cfg.merge_from_file(str(file))
    assert (cfg.MY.A, cfg.MY.B) == (1, 2)


def test_renamed_key_names_its_new_name(tmp_path):
    cfg = get_cfg()
    cfg.register_renamed_key("MODEL.OLD_NAME", "MODEL.WEIGHTS")
    with pytest.raises(KeyError, match="MODEL.WEIGHTS"):
        cfg.merge_from_list(["MODEL.OLD_NAME", "x"])
    file = tmp_path / "config.yaml"
    file.write_text("MODEL:\n  OLD_NAME: x\n")
    with pytest.raises(KeyError, match="MODEL.WEIGHTS"):
        cfg.merge_from_file(str(file))


class _Layer:
    @configurable
    def __init__(self, width: int, *, depth: int = 1):
        self.size = (width, depth)

    @classmethod
    def from_config(cls, cfg, extra=0):
        return {"width": cfg.MODEL.FPN.OUT_CHANNELS + extra}


class _Deeper(_Layer):
    @classmethod
    def from_config(cls, cfg, extra=0):
        return {**super().from_config(cfg, extra), "depth": 5}


def test_configurable_is_inherited():
    """The subclass has its own from_config and the parent's __init__."""
    cfg = get_cfg()
    assert _Layer(cfg).size == (256, 1)
    assert _Deeper(cfg, extra=1).size == (257, 5)
    assert _Deeper(cfg, depth=2).size == (256, 2)
    assert _Deeper(8).size == (8, 1)


def test_configurable_wants_cfg_first():
    class Wrong:
        @configurable
        def __init__(self, width):
            pass

        @classmethod
        def from_config(cls, options):
            return {}

    with pytest.raises(TypeError, match="cfg"):
        Wrong(get_cfg())


def test_configurable_wants_its_from_config_in_any_call():
    class Without:
        @configurable
        def __init__(self, width=1):
            pass

    class NoClassMethod(Without):
        def from_config(self, cfg):
            return {}

    with pytest.raises(AttributeError):
        Without(width=2)
    with pytest.raises(TypeError):
        NoClassMethod(width=2)


def test_configurable_takes_a_config_of_omegaconf():
    omegaconf = pytest.importorskip("omegaconf")
    assert _Layer(omegaconf.OmegaConf.create(get_cfg().dump())).size == (256, 1)


# ------------------------------------------------------------------------------------------ older versions


def _merged(tmp_path, text, cfg=None):
    file = tmp_path / "old.yaml"
    file.write_text(text)
    cfg = get_cfg() if cfg is None else cfg
    cfg.merge_from_file(str(file))
    return cfg


def test_a_version_1_file_means_what_it_meant(tmp_path):
    cfg = _merged(
        tmp_path,
        """
VERSION: 1
MODEL:
  WEIGHT: a.pkl
  ROI_HEADS: {NMS: 0.4, SCORE_THRESH: 0.1}
  RPN: {ANCHOR_SIZES: [[16]]}
  RETINANET: {ANCHOR_SIZES: [[8]], ANCHOR_STRIDES: [4]}
  PANOPTIC_FPN: {RPN_LOSS_SCALE: 3.0, COMBINE_ON: False}
TEST: {DETECTIONS_PER_IMG: 7, AUG_ON: True, AUG_MAX_SIZE: 50}
""",
    )
    expected = get_cfg()
    expected.merge_from_list(
        ["MODEL.WEIGHTS", "a.pkl", "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.4]
        + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.1, "MODEL.ANCHOR_GENERATOR.SIZES", [[16]]]
        + ["MODEL.RPN.LOSS_WEIGHT", 3.0, "MODEL.PANOPTIC_FPN.COMBINE.ENABLED", False]
        + ["TEST.DETECTIONS_PER_IMAGE", 7, "TEST.AUG.ENABLED", True, "TEST.AUG.MAX_SIZE", 50]
    )
    assert cfg == expected


def test_version_1_anchors_are_those_of_the_architecture(tmp_path):
    text = "VERSION: 1\nMODEL:\n  RPN: {ANCHOR_SIZES: [[16]]}\n  RETINANET: {ANCHOR_SIZES: [[8]]}\n"
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert _merged(tmp_path, text, cfg).MODEL.ANCHOR_GENERATOR.SIZES == [[8]]
    assert _merged(tmp_path, text).MODEL.ANCHOR_GENERATOR.SIZES == [[16]]


def test_version_0_and_files_that_do_not_say(tmp_path):
    assert _merged(tmp_path, "VERSION: 0\nMODEL: {RPN_HEAD: {NAME: Own}}\n").MODEL.RPN.HEAD_NAME == "Own"
    cfg = _merged(tmp_path, "MODEL: {WEIGHT: b.pkl}\n")  # a name of version 1 only
    assert cfg.MODEL.WEIGHTS == "b.pkl" and "WEIGHT" not in cfg.MODEL and cfg.VERSION == 2


def test_versions_are_not_mixed(tmp_path):
    with pytest.raises(KeyError):
        _merged(tmp_path, "VERSION: 1\nMODEL: {WEIGHTS: b.pkl}\n")
    with pytest.raises(AssertionError):
        _merged(tmp_path, "VERSION: 3\n")


def test_downgrade_and_upgrade_lead_back():
    cfg = get_cfg()
    cfg.MY_KEY = 3
    old = downgrade_config(cfg, to_version=0)
    assert old.VERSION == 0 and old.MODEL.RPN_HEAD.NAME == "StandardRPNHead" and "WEIGHTS" not in old.MODEL
    assert upgrade_config(old) == cfg
    with pytest.raises(AssertionError):
        downgrade_config(cfg, to_version=3)


# ------------------------------------------------------------------------------------------ unknown keys


def test_unknown_keys_of_files_and_of_lists(tmp_path):
    """Callers of either catch different errors."""
    with pytest.raises(KeyError, match="MODEL.NOPE"):
        _merged(tmp_path, "MODEL: {NOPE: 1}\n")
    with pytest.raises(AssertionError, match="NOPE"):
        get_cfg().merge_from_list(["MODEL.NOPE", 1])
