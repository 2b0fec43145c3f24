"""DATASETS.REGISTER: entries become datasets; every mistake has its sentence."""

from __future__ import annotations

import json

import pytest

from d2_frozen.data import entry_type, register, register_from_config
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def files(tmp_path):
    """A COCO json of one 8x6 image with one box of category 7, beside an empty image folder."""
    (tmp_path / "photos").mkdir()
    box = {"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 1, 4, 4], "iscrowd": 0}
    document = {
        "images": [{"id": 3, "file_name": "a.png", "width": 8, "height": 6}],
        "annotations": [{**box, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
        "categories": [{"id": 7, "name": "nut"}],
    }
    (tmp_path / "nuts.json").write_text(json.dumps(document))
    return tmp_path


def entry(files, name="nuts_test_register", **changes):
    plain = {
        "name": name,
        "type": "coco_instances",
        "json": f"{files}/nuts.json",
        "images": f"{files}/photos",
    }
    return {**plain, **changes}


def test_entry_becomes_a_dataset(files, make_cfg):
    cfg = make_cfg([entry(files)])
    register_from_config(cfg)
    register_from_config(cfg)  # again is fine
    (record,) = DatasetCatalog.get("nuts_test_register")
    assert record["file_name"] == f"{files}/photos/a.png" and record["annotations"][0]["category_id"] == 0
    metadata = MetadataCatalog.get("nuts_test_register")
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == ["nut"]


def test_integer_polygons_become_floats(files, make_cfg):
    register_from_config(make_cfg([entry(files)]))
    (record,) = DatasetCatalog.get("nuts_test_register")
    (polygon,) = record["annotations"][0]["segmentation"]
    assert polygon == [1, 1, 5, 1, 5, 5] and all(type(v) is float for v in polygon)


def test_nothing_is_read_before_it_is_asked_for(files, make_cfg):
    (files / "nuts.json").write_text("broken")
    register_from_config(make_cfg([entry(files)]))


def test_relative_paths(files, make_cfg, monkeypatch):
    cfg = make_cfg([entry(files, json="nuts.json", images="photos")])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(files))
    register_from_config(cfg)
    assert MetadataCatalog.get("nuts_test_register").json_file == str(files / "nuts.json")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(files / "elsewhere"))
    monkeypatch.chdir(files)
    register_from_config(cfg)  # the working directory gives the same files


def test_missing_files_matter_for_used_datasets_only(files, make_cfg, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    broken = entry(files, name="absent_test_register", json="no/such.json")
    with pytest.raises(
        FileNotFoundError, match=r"REGISTER\[0\] \(absent_test_register\): json: 'no/such.json'.*not set"
    ):
        register_from_config(make_cfg([broken]))
    register_from_config(make_cfg([broken]), used=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "coco_instance"}, r"has the unknown type 'coco_instance' \(did you mean coco_instances"),
        ({"type": None}, "has no type; types are coco_instances"),
        ({"image": "x"}, r"unknown field 'image' \(did you mean images\?\)"),
        ({"json": None}, "lacks json; coco_instances needs json, images"),
        ({"json": 3}, "json is 3; it must be a path"),
        ({"name": None}, r"REGISTER\[0\] has no name"),
        ({"classes": []}, r"classes is \[\]; give a list of names"),
        ({"classes": ["a", "a"]}, "names a more than once"),
    ],
)  # fmt: skip
def test_malformed_entries(files, make_cfg, changes, message):
    cfg = make_cfg()
    cfg.DATASETS.REGISTER = [entry(files, **changes)]
    with pytest.raises(ValueError, match=message):
        register_from_config(cfg)


def test_entry_that_is_no_mapping(make_cfg):
    cfg = make_cfg()
    cfg.DATASETS.REGISTER = ["nuts"]
    with pytest.raises(ValueError, match=r"REGISTER\[0\] is 'nuts'; an entry is a mapping"):
        register_from_config(cfg)


def test_one_name_for_two_datasets(files, make_cfg):
    (files / "other").mkdir()
    register_from_config(make_cfg([entry(files)]))
    with pytest.raises(ValueError, match=r"two different datasets have this name \(images: .*photos.*other"):
        register_from_config(make_cfg([entry(files, images=f"{files}/other")]))
    with pytest.raises(ValueError, match="has a dataset of this name already"):
        register_from_config(make_cfg([entry(files, name="coco_2017_val")]))


def test_class_files(files):
    (files / "classes.txt").write_text("nut\n\n bolt \n")
    (files / "classes.json").write_text('["nut", "bolt"]')
    for name in ("classes.txt", "classes.json"):
        assert register.read_class_list(str(files / name), "entry") == ["nut", "bolt"]
    with pytest.raises(FileNotFoundError, match="entry: no class file at"):
        register.read_class_list(str(files / "none.txt"), "entry")
    (files / "windows.txt").write_text("Tür\n", encoding="cp1252")
    with pytest.raises(ValueError, match="entry: class file .*windows.txt is not in UTF-8"):
        register.read_class_list(str(files / "windows.txt"), "entry")


def test_files_and_folders_are_told_apart(files, make_cfg):
    json_file = entry(files)["json"]
    for changes, message in (
        ({"images": json_file}, r"images: .* is a file; a folder is wanted"),
        ({"json": str(files)}, r"json: .* is a folder; a file is wanted"),
    ):
        cfg = make_cfg([entry(files, **changes)])
        with pytest.raises(ValueError, match=message):
            register_from_config(cfg, used=[cfg.DATASETS.REGISTER[0]["name"]])


def test_apps_add_types(make_cfg, monkeypatch):
    monkeypatch.setattr(register, "ENTRY_TYPES", dict(register.ENTRY_TYPES))
    got = {}

    @entry_type("toy", required=("size",), optional=("colour",))
    def register_toy(name, fields):
        got.update(fields)
        DatasetCatalog.register(name, lambda: [])

    cfg = make_cfg()
    cfg.DATASETS.REGISTER = [{"name": "toy_test_register", "type": "toy", "size": 3}]
    register_from_config(cfg)
    assert got == {"size": 3} and "toy_test_register" in DatasetCatalog.list()
