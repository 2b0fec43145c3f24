"""What the embedded engine says, on top of Detectron2, about wrong configs."""

from __future__ import annotations

import pytest
import yaml

from detectron2.config import LazyConfig, get_cfg
from detectron2.config.suggest import nearest_keys
from detectron2.utils.registry import Registry


def _file(tmp_path, text, name="my.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("MODEL.WEIGTHS", "MODEL.WEIGHTS"),
        ("SOLVER.MASK_ON", "MODEL.MASK_ON"),
        ("solver.base_lr", "SOLVER.BASE_LR"),
        ("DATASET.TRAIN", "DATASETS.TRAIN"),
        ("INPUT.MIN_SIZE", "INPUT.MIN_SIZE_TEST"),
    ],
)
def test_unknown_key_names_the_nearest(key, meant):
    with pytest.raises(AssertionError, match=f"{key}; did you mean {meant}\\?"):
        get_cfg().merge_from_list([key, 1])


def test_far_key_has_no_suggestion():
    assert nearest_keys("COMPLETELY.ELSE", ["MODEL.WEIGHTS", "SOLVER.BASE_LR"]) == []


def test_unknown_key_in_a_file_names_key_and_file_and_changes_nothing(tmp_path):
    path = _file(tmp_path, "SOLVER:\n  BASE_LR: 0.5\nMODEL:\n  WEIGTHS: x.pth\n")
    cfg = get_cfg()
    with pytest.raises(KeyError) as error:
        cfg.merge_from_file(path)
    for part in (path, "MODEL.WEIGTHS;", "did you mean MODEL.WEIGHTS?"):
        assert part in str(error.value)
    assert cfg == get_cfg()


def test_wrong_type_in_a_file_names_key_and_file_and_changes_nothing(tmp_path):
    path = _file(tmp_path, "MODEL:\n  MASK_ON: True\nSOLVER:\n  BASE_LR: fast\n")
    cfg = get_cfg()
    with pytest.raises(ValueError) as error:
        cfg.merge_from_file(path)
    assert path in str(error.value) and "SOLVER.BASE_LR" in str(error.value)
    assert cfg == get_cfg()


def test_empty_section_is_refused(tmp_path):
    """In Detectron2 it deletes the section."""
    path = _file(tmp_path, "MODEL:\nSOLVER:\n  BASE_LR: 0.5\n")
    with pytest.raises(ValueError, match="section MODEL is empty"):
        get_cfg().merge_from_file(path)


def test_empty_file_changes_nothing(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(_file(tmp_path, "# only a comment\n"))
    assert cfg == get_cfg()


@pytest.mark.parametrize("allow_unsafe", [True, False])
@pytest.mark.parametrize("where", ["leaf", "base"])
def test_python_tags_are_refused_and_not_run(tmp_path, allow_unsafe, where):
    witness = tmp_path / "it_ran"
    hostile = f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {witness}']\n"
    if where == "base":
        _file(tmp_path, hostile, "base.yaml")
        path = _file(tmp_path, "_BASE_: base.yaml\n")
    else:
        path = _file(tmp_path, hostile)
    with pytest.raises(yaml.constructor.ConstructorError) as error:
        get_cfg().merge_from_file(path, allow_unsafe=allow_unsafe)
    assert "python/object/apply:os.system" in str(error.value)
    assert ("base.yaml" if where == "base" else "my.yaml") in str(error.value)
    assert not witness.exists()


@pytest.mark.parametrize("text", ["just words\n", "- a\n- b\n", "MODEL: [1\n", "\tMODEL: 1\n"])
def test_files_that_are_no_config_are_named(tmp_path, text):
    path = _file(tmp_path, text)
    with pytest.raises((ValueError, yaml.YAMLError), match="my.yaml"):
        get_cfg().merge_from_file(path)


def test_circle_of_bases_is_an_error(tmp_path):
    _file(tmp_path, "_BASE_: b.yaml\n", "a.yaml")
    path = _file(tmp_path, "_BASE_: a.yaml\n", "b.yaml")
    with pytest.raises(ValueError, match="_BASE_"):
        get_cfg().merge_from_file(path)


def test_names_of_version_1_lead_to_the_present_ones(tmp_path):
    path = _file(tmp_path, "MODEL:\n  ROI_HEADS:\n    NMS: 0.4\n")
    with pytest.raises(KeyError, match="MODEL.ROI_HEADS.NMS_THRESH_TEST"):
        get_cfg().merge_from_file(path)
    with pytest.raises(AssertionError, match="MODEL.ANCHOR_GENERATOR.SIZES"):
        get_cfg().merge_from_list(["MODEL.RPN.ANCHOR_SIZES", [[32]]])
    path = _file(tmp_path, "VERSION: 1\nMODEL:\n  WEIGHTS: x\n")
    with pytest.raises(KeyError, match="my.yaml.*MODEL.WEIGHTS.*VERSION: 2"):
        get_cfg().merge_from_file(path)


@pytest.mark.parametrize("version", ["new", "1.5", "True"])
def test_a_version_is_an_integer(tmp_path, version):
    with pytest.raises(TypeError, match="my.yaml: VERSION"):
        get_cfg().merge_from_file(_file(tmp_path, f"VERSION: {version}\n"))


def test_names_outside_the_subset_say_so():
    with pytest.raises(NotImplementedError, match="needs Detectron2"):
        LazyConfig.load("config.py")
    with pytest.raises(KeyError, match="needs Detectron2"):
        Registry("META_ARCH").get("PanopticFPN")


def test_registry_names_the_nearest():
    registry = Registry("BACKBONE")
    registry.register(type("build_timm_backbone", (), {}))
    with pytest.raises(KeyError, match="did you mean build_timm_backbone"):
        registry.get("build_tim_backbone")
