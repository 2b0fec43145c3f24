"""Entries of the type sem_seg, and what is found before training: each fault with its file name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2_frozen import tasks
from d2_frozen.data import BadDataError
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from seg_app.data import prepare_datasets

GOOD = np.uint8([[0, 1, 2], [2, 1, 255]])


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in [n for n in DatasetCatalog.list() if n.startswith("mine_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config_of(images: Path, labels: Path, tmp_path: Path, **fields: object) -> CfgNode:
    cfg = tasks.read_config("", ["MODEL.META_ARCHITECTURE", "FrozenSegmentor"])
    entry = {"name": "mine_train", "type": "sem_seg", "images": str(images), "labels": str(labels), **fields}
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [entry], ("mine_train",), ()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = -1
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


def test_class_count_comes_from_the_entry_or_a_file_beside(label_folders, tmp_path: Path) -> None:
    folders = label_folders({"a": GOOD})
    cfg = config_of(*folders, tmp_path, classes=["sky", "sea", "land"])
    prepare_datasets(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\nship\n")
    cfg = config_of(*folders, tmp_path, name="mine_other")
    cfg.DATASETS.TRAIN = ("mine_other",)
    prepare_datasets(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 4
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_text('{"stuff_classes": ["sky", "sea", "land"], "ignore_label": 255}')
    cfg = config_of(*folders, tmp_path, name="mine_third")
    cfg.DATASETS.TRAIN = ("mine_third",)
    prepare_datasets(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    # As Windows' editors save it, with a mark in front.
    (tmp_path / "classes.json").write_text('{"stuff_classes": ["sky", "sea", "land"]}', encoding="utf-8-sig")
    cfg = config_of(*folders, tmp_path, name="mine_fourth")
    cfg.DATASETS.TRAIN = ("mine_fourth",)
    prepare_datasets(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3


def test_masks_in_black_and_white_do_not_train_on_black_alone(label_folders, tmp_path: Path, caplog) -> None:
    """0 and 255: 255 is ignored by default, so that everything else would be the first class, with an IoU of 100."""
    folders = label_folders({"a": np.uint8([[0, 255], [255, 0]])})
    cfg = config_of(*folders, tmp_path, classes=["background", "crack"])
    with pytest.raises(BadDataError, match=r"white \(255\) is ignored .*label_values: \[0, 255\]"):
        prepare_datasets(cfg)
    assert "have no pixel" not in caplog.text  # the error says why
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("mine_train",)
    prepare_datasets(cfg)
    assert "have no pixel: crack; 255 occurs, and is ignored." in caplog.text
    cfg = config_of(*folders, tmp_path, name="mine_alone", classes=["crack"])
    cfg.DATASETS.TRAIN = ("mine_alone",)
    with pytest.raises(BadDataError, match=r"classes: \[background, crack\] and label_values: \[0, 255\]"):
        prepare_datasets(cfg)
    cfg = config_of(
        *folders, tmp_path, name="mine_bw", classes=["background", "crack"], label_values=[0, 255]
    )
    cfg.DATASETS.TRAIN = ("mine_bw",)
    caplog.clear()
    prepare_datasets(cfg)
    assert "no pixel" not in caplog.text


def test_names_that_differ_in_their_ends(label_folders, tmp_path: Path) -> None:
    images, labels = label_folders({"a": GOOD})
    (labels / "a.png").rename(labels / "a_mask.png")
    with pytest.raises(BadDataError, match="give image_suffix and label_suffix"):
        prepare_datasets(config_of(images, labels, tmp_path, classes=["a", "b", "c"]))


@pytest.mark.parametrize("layout", ["beside", "label maps inside", "images inside"])
def test_images_and_label_maps_in_one_tree(layout: str, label_folders, tmp_path: Path) -> None:
    """Label maps were taken for images that have none, or images for label maps."""
    images, labels = label_folders({"a": GOOD, "b": GOOD})
    suffixes = {}
    if layout == "beside":
        for path in sorted(labels.iterdir()):
            path.rename(images / f"{path.stem}_mask.png")
        labels, suffixes = images, {"image_suffix": ".png", "label_suffix": "_mask.png"}
    elif layout == "label maps inside":
        labels = labels.rename(images / "masks")
    else:
        images = images.rename(labels / "photos")
    name = f"mine_{layout.replace(' ', '_')}"
    cfg = config_of(images, labels, tmp_path, name=name, classes=["a", "b", "c"], **suffixes)
    cfg.DATASETS.TRAIN = (name,)
    prepare_datasets(cfg)
    found = [(r["file_name"], r["sem_seg_file_name"]) for r in DatasetCatalog.get(name)]
    end = "_mask.png" if layout == "beside" else ".png"
    assert found == [(str(images / f"{stem}.png"), str(labels / f"{stem}{end}")) for stem in "ab"]


def test_another_class_count_or_none_at_all_is_an_error(label_folders, tmp_path: Path) -> None:
    folders = label_folders({"a": GOOD})
    with pytest.raises(ValueError, match=r"NUM_CLASSES is -1.*names its classes"):
        prepare_datasets(config_of(*folders, tmp_path))
    cfg = config_of(*folders, tmp_path, name="mine_3", classes=["a", "b", "c"])
    cfg.DATASETS.TRAIN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = ("mine_3",), 150
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 150, but dataset mine_3 has 3"):
        prepare_datasets(cfg)


def test_a_class_is_not_ignored_within_the_model(label_folders, tmp_path: Path) -> None:
    """IGNORE_VALUE 0, for instance, where it is 0 in the files that is to be ignored."""
    cfg = config_of(*label_folders({"a": GOOD}), tmp_path, classes=["sky", "sea", "land"])
    for count in (-1, 3):
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = count, 0
        with pytest.raises(ValueError, match=r"IGNORE_VALUE is 0, the number of the class sky.*ignore_label"):
            prepare_datasets(cfg)


def test_more_than_255_classes(label_folders, tmp_path: Path) -> None:
    folders = label_folders({"a": np.uint16([[0, 299], [65535, 256]])})
    cfg = config_of(*folders, tmp_path, classes=[f"c{i}" for i in range(300)])
    prepare_datasets(cfg)
    assert (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE) == (300, 65535)


def _no_label(images: Path, labels: Path) -> None:
    (labels / "bad.png").unlink()


def _no_image(images: Path, labels: Path) -> None:
    (images / "bad.png").unlink()


def _out_of_range(images: Path, labels: Path) -> None:
    Image.fromarray(np.uint8([[0, 1, 7], [2, 1, 255]])).save(labels / "bad.png")


def _other_size(images: Path, labels: Path) -> None:
    Image.fromarray(np.zeros((5, 3), np.uint8)).save(labels / "bad.png")


def _colours(images: Path, labels: Path) -> None:
    Image.new("RGB", (3, 2)).save(labels / "bad.png")


def _cut_off(images: Path, labels: Path) -> None:
    data = (images / "bad.png").read_bytes()
    (images / "bad.png").write_bytes(data[:45])


def _no_png(images: Path, labels: Path) -> None:
    (labels / "bad.png").write_text("sky")


@pytest.mark.parametrize(
    "spoil, text",
    [
        (_no_label, r"bad.png: image without label map"),
        (_no_image, r"bad.png: label map without image"),
        (
            _out_of_range,
            r"label value out of range .*bad.png has 7; the 3 classes are 0 to 2, and 255 is ignored",
        ),
        (_other_size, r"differ in size .*bad.png is 3x5, the image 3x2"),
        (_colours, r"colours instead of class ids .*bad.png is RGB"),
        (_cut_off, r"bad.png: broken image file"),
        (_no_png, r"file is no image .*bad.png"),
    ],
)
def test_faults_are_named_and_can_be_left_out(spoil, text: str, label_folders, tmp_path: Path) -> None:
    folders = label_folders({"bad": GOOD, "good": GOOD})
    spoil(*folders)
    cfg = config_of(*folders, tmp_path, classes=["a", "b", "c"])
    with pytest.raises(BadDataError, match=text):
        prepare_datasets(cfg)
    cfg.DATASETS.SKIP_BAD = True
    prepare_datasets(cfg)
    assert [Path(record["file_name"]).name for record in DatasetCatalog.get("mine_train")] == ["good.png"]


def test_empty_folders_and_maps_without_any_class_stop_even_with_skip_bad(
    label_folders, tmp_path: Path
) -> None:
    folders = label_folders({"a": np.full((4, 4), 255, np.uint8)})
    cfg = config_of(*folders, tmp_path, classes=["a"])
    cfg.DATASETS.SKIP_BAD = True
    with pytest.raises(BadDataError, match="no pixel has a class"):
        prepare_datasets(cfg)
    for folder in folders:
        (folder / "a.png").unlink()
    with pytest.raises(BadDataError, match=r"images.*no image with a label map of its name \(0 images"):
        prepare_datasets(cfg)


def test_cityscapes_layout(label_folders, tmp_path: Path) -> None:
    images, labels = label_folders({"ulm/u_01": np.uint8([[7, 0], [26, 7]])})
    (images / "ulm/u_01.png").rename(images / "ulm/u_01_leftImg8bit.png")
    (labels / "ulm/u_01.png").rename(labels / "ulm/u_01_gtFine_labelIds.png")
    Image.new("RGB", (2, 2)).save(labels / "ulm/u_01_gtFine_color.png")
    fields = {
        "classes": ["road", "car"],
        "label_values": [7, 26],
        "image_suffix": "_leftImg8bit.png",
        "label_suffix": "_gtFine_labelIds.png",
    }
    prepare_datasets(config_of(images, labels, tmp_path, **fields))
    (record,) = DatasetCatalog.get("mine_train")
    assert record["sem_seg_file_name"].endswith("u_01_gtFine_labelIds.png")


def test_ade20k_is_known_and_its_absence_explained(tmp_path: Path) -> None:
    names = MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes
    assert (
        len(names) == len(set(names)) == 150
        and names[:3] == ["wall", "building", "sky"]
        and names[149] == "flag"
    )
    cfg = config_of(tmp_path, tmp_path, tmp_path)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN = [], ("ade20k_sem_seg_train",)
    with pytest.raises(FileNotFoundError, match=r"python -m seg_app.prepare ade20k"):
        prepare_datasets(cfg)


def test_jpeg_label_maps_and_an_ignore_label_of_0_are_told_what_to_do(label_folders, tmp_path: Path) -> None:
    images, labels = label_folders({"a": GOOD})
    (labels / "a.png").rename(labels / "a.jpg")
    with pytest.raises(BadDataError, match="JPEG is no format for label maps"):
        prepare_datasets(config_of(images, labels, tmp_path, classes=["sky", "sea", "land"]))
    with pytest.raises(ValueError, match="list them in label_values"):
        prepare_datasets(
            config_of(images, labels, tmp_path, name="mine_0", classes=["sky", "sea", "land"], ignore_label=0)
        )


def test_one_folder_for_images_and_label_maps(label_folders, tmp_path: Path) -> None:
    """Suffixes tell them apart, and the message says so."""
    images, labels = label_folders({"a": GOOD})
    Image.open(images / "a.png").save(labels / "a.jpg")
    both = (labels, labels, tmp_path)
    with pytest.raises(BadDataError, match=r"a.png: two files of one name .*image_suffix: .jpg"):
        prepare_datasets(config_of(*both, classes=["a", "b", "c"]))
    suffixes = {"image_suffix": ".jpg", "label_suffix": ".png"}
    cfg = config_of(*both, name="mine_told", classes=["a", "b", "c"], **suffixes)
    cfg.DATASETS.TRAIN = ("mine_told",)
    prepare_datasets(cfg)
    assert len(DatasetCatalog.get("mine_told")) == 1
