"""Facts about configs that the golden files do not hold."""

from __future__ import annotations

import pytest
import yaml

from detectron2.config import CfgNode, configurable, get_cfg, global_cfg, set_global_cfg


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
