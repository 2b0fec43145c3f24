"""Every fault in a dataset is found before training, with file, image id and annotation id."""

from __future__ import annotations

import copy
import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util

from d2_frozen.data import BadDataError, build_train_loader, prepare_datasets, resolve_num_classes
from d2_frozen.data.checks import _runs_of_text, check_coco
from detectron2.data import DatasetCatalog, MetadataCatalog

WIDTH, HEIGHT = 20, 10


def annotation(number, image_id, **changes):
    plain = {
        "id": number, "image_id": image_id, "category_id": 4, "iscrowd": 0, "area": 25,
        "bbox": [2, 2, 5, 5], "segmentation": [[2, 2, 7, 2, 7, 7, 2, 7]],
    }  # fmt: skip
    return {**plain, **changes}


@pytest.fixture
def world(tmp_path):
    """Three 20x10 images (ids 1, 2, 3) with two objects each (ids 11, 12, 21, ...) of the classes 2 and 4."""
    for image_id in (1, 2, 3):
        pixels = np.random.RandomState(image_id).randint(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{image_id}.jpg", quality=95)
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)],
        "annotations": [annotation(10 * i + k, i, category_id=2 * k) for i in (1, 2, 3) for k in (1, 2)],
        "categories": [{"id": 4, "name": "bolt"}, {"id": 2, "name": "nut"}],
    }


@pytest.fixture
def check(tmp_path, world):
    def run(document=None, **options):
        path = tmp_path / "set.json"
        path.write_text(json.dumps(world if document is None else document))
        arguments = {"masks": True, "training": True, "check_images": "full", **options}
        return check_coco("set", str(path), str(tmp_path), **arguments)

    return run


def kinds(report):
    return [problem.kind for problem in report.problems]


def test_good_data(check, world):
    report = check()
    assert kinds(report) == [] and report.categories == ["nut", "bolt"]
    assert report.cleaned() == world


def rle(size=(HEIGHT, WIDTH), counts=(5, 10, 185)):
    return {"size": list(size), "counts": list(counts)}


def compressed(mask):
    """As pycocotools and most tools write it: counts are text."""
    return {"size": [HEIGHT, WIDTH], "counts": mask_util.encode(np.asfortranarray(mask))["counts"].decode()}


FAULTS = {
    "bbox is not four numbers": [{"bbox": [1, 2, 3]}, {"bbox": None}, {"bbox": [1, 2, 3, "4"]}],
    "bbox has NaN or infinity": [{"bbox": [1, float("nan"), 3, 4]}, {"bbox": [1, 1, float("inf"), 4]}],
    "bbox has a negative size": [{"bbox": [5, 5, -3, 2]}],
    "bbox has no area": [{"bbox": [5, 5, 3, 0]}],
    "bbox is outside the image": [
        {"bbox": [-1.5, 0, 5, 5]},
        {"bbox": [18, 2, 3.5, 3]},
        {"bbox": [20, 2, 1, 3]},
    ],
    "category id that is not listed": [{"category_id": 3}, {"category_id": None}, {"category_id": [4]}],
    "annotation of an image that is not listed": [{"image_id": 99}],
    "duplicate annotation id": [{"id": 11}],
    "annotation without a whole number or text as its id": [{"id": None}, {"id": 22.0}],
    "annotation that is to be ignored": [{"ignore": 1}],
    "iscrowd is neither 0 nor 1": [{"iscrowd": "0"}, {"iscrowd": None}],
    "no segmentation, but MODEL.MASK_ON is True": [{"segmentation": []}, {"segmentation": None}],
    "segmentation is neither polygons nor RLE": [{"segmentation": "x"}],
    "polygon with an odd number of coordinates": [{"segmentation": [[1, 1, 5, 1, 5, 5, 1]]}],
    "polygon with fewer than three points": [{"segmentation": [[1, 1, 5, 1]]}],
    "malformed polygon": [{"segmentation": ["x"]}, {"segmentation": [[1, 1, 5, "1", 5, 5]]}],
    "segmentation is one polygon instead of a list of them": [{"segmentation": [1, 1, 5, 1, 5, 5.5]}],
    "polygon with NaN or infinity": [{"segmentation": [[1, 1, 5, float("nan"), 5, 5]]}],
    "segmentation without area": [{"segmentation": [[2, 3, 5, 3, 7, 3]]}],
    "segmentation and bbox lie apart": [
        {"segmentation": [[0.1, 0.2, 0.35, 0.2, 0.35, 0.7]]},  # shares of the image
        {"segmentation": [[42, 2, 47, 2, 47, 7]]},
    ],
    "malformed RLE": [
        {"segmentation": {"counts": [1]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "zzzzabc!!~~"}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "04é"}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "ooooooooooo0"}},
    ],
    "RLE of another size than the image": [{"segmentation": rle(size=(WIDTH, HEIGHT))}],
    "RLE whose counts do not fill the image": [
        {"segmentation": rle(counts=(5, 10))},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "04<"}},
        {"segmentation": {**compressed(np.eye(7, dtype=np.uint8)), "size": [HEIGHT, WIDTH]}},
    ],
    "RLE of an empty mask": [
        {"segmentation": rle(counts=(200,))},
        {"segmentation": compressed(np.zeros((HEIGHT, WIDTH), np.uint8))},
    ],
}


@pytest.mark.parametrize(("kind", "changes"), [(k, c) for k, cases in FAULTS.items() for c in cases])
def test_bad_annotation_is_told_and_left_out(check, world, kind, changes):
    world["annotations"][3] = annotation(**{"number": 22, "image_id": 2, **changes})
    report = check()
    assert kinds(report) == [kind]
    assert "set.json" in report.problems[0].where
    left = [a["id"] for a in report.cleaned()["annotations"]]
    assert left == [11, 12, 21, 31, 32] and report.left_out() == (0, 1)


def test_text_names_file_image_and_annotation(check, world, tmp_path):
    world["annotations"][2]["bbox"] = [15, 2, 9, 3]
    (problem,) = check().problems
    assert str(problem) == (
        f"set: {tmp_path}/set.json, annotation 21, image 2 2.jpg: bbox is outside the image "
        "([15, 2, 9, 3] in 20x10 pixels)"
    )


@pytest.mark.parametrize("box", [[-1, -1, 22, 12], [0, 0, 20, 10], [19.5, 9.5, 1, 1]])
def test_one_pixel_of_rounding_is_fine(check, world, box):
    x, y, w, h = box
    world["annotations"][0] |= {"bbox": box, "segmentation": [[x, y, x + w, y, x + w, y + h]]}
    assert kinds(check()) == []


def test_good_polygons_of_an_object_stay(check, world):
    good = world["annotations"][0]["segmentation"][0]
    world["annotations"][0]["segmentation"] = [[1, 1, 2, 2], good]
    report = check()
    assert kinds(report) == ["polygon with fewer than three points"]
    assert report.cleaned()["annotations"][0]["segmentation"] == [good]
    assert len(report.cleaned()["annotations"]) == 6


def test_masks_are_ignored_where_none_are_used(check, world):
    world["annotations"][0]["segmentation"] = [[1, 1]]
    assert kinds(check(masks=False)) == []


def test_rle_and_crowd_are_fine(check, world):
    world["annotations"][0] |= {"segmentation": rle(), "iscrowd": 1}
    world["annotations"][1] |= {
        "segmentation": compressed(np.eye(HEIGHT, WIDTH, dtype=np.uint8)),
        "ignore": 0,
    }
    assert kinds(check()) == []


@pytest.mark.parametrize("height, width", [(HEIGHT, WIDTH), (1, 1), (700, 900)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_runs_of_compressed_masks_are_those_of_the_mask(height, width, share):
    """Down the columns, background first; differences between runs may be negative and of several characters."""
    mask = np.random.default_rng(0).random((height, width)) < share
    mask[: height // 2] = mask[: height // 2, :1]
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    text = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert _runs_of_text(text) == np.diff([0, *changes, flat.size]).tolist()


def save_sideways(path, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(path, exif=exif)


def test_image_files(check, world, tmp_path):
    """Missing; truncated (with a whole header); no image; another size; and one that its EXIF tag turns."""
    (tmp_path / "1.jpg").unlink()
    data = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(data[:-100])
    (tmp_path / "3.jpg").write_text("<html>")
    world["images"].append({"id": 4, "file_name": "4.jpg", "width": 5, "height": 5})
    Image.new("RGB", (6, 5)).save(tmp_path / "4.jpg")
    save_sideways(tmp_path / "5.jpg", (WIDTH, HEIGHT))
    for image_id, (w, h) in ((5, (HEIGHT, WIDTH)), (6, (WIDTH, HEIGHT))):
        world["images"].append({"id": image_id, "file_name": "5.jpg", "width": w, "height": h})
    report = check(training=False)
    expected = ["missing image file", "broken image file", "file is no image"] + [
        "width and height are not the file's"
    ] * 2
    assert kinds(report) == expected
    assert "before its EXIF orientation" in report.problems[-1].seen
    assert [image["id"] for image in report.cleaned()["images"]] == [5]
    assert "2.jpg" in str(report.problems[1]) and "image 2" in str(report.problems[1])
    # What the cheaper checks see.
    assert kinds(check(training=False, check_images="header")) == [
        k for k in expected if k != "broken image file"
    ]
    assert kinds(check(training=False, check_images="off")) == []
    with pytest.raises(ValueError, match="CHECK_IMAGES is 'none'; choose one of auto, full, header, off"):
        check(check_images="none")


def test_image_records(check, world):
    world["images"][1]["id"] = 1
    world["images"][2].pop("width")
    world["images"].append({"id": 4})
    report = check()
    assert kinds(report)[:3] == [
        "duplicate image id",
        "image record without a size",
        "image without a file_name",
    ]
    assert [a["id"] for a in report.cleaned()["annotations"]] == [11, 12]


def as_text(world):
    """The same with ids "c4", "i1": COCO's are whole numbers, but Detectron2 takes text too."""
    for kind, letter, keys in (("images", "i", ["id"]), ("categories", "c", ["id"])):
        for entry in world[kind]:
            entry.update({key: f"{letter}{entry[key]}" for key in keys})
    for entry in world["annotations"]:
        entry.update(image_id=f"i{entry['image_id']}", category_id=f"c{entry['category_id']}")


def test_ids_may_be_text(check, world):
    as_text(world)
    report = check()
    assert kinds(report) == [] and report.categories == ["nut", "bolt"]


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_ids_are_numbers_or_text_but_not_both(check, world, kind):
    """They could not be put in order."""
    world[kind].append({"id": "9", "name": "saw", "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT})
    problem = next(p for p in check().problems if "ids are partly numbers, partly text" in p.kind)
    assert re.search(r"\d and '9'", problem.seen) and not problem.skippable


def test_category_names_are_text(check, world):
    world["categories"][0]["name"] = 5
    assert "category whose name is no text" in kinds(check())


@pytest.mark.parametrize(
    ("there", "listed", "slip"),
    [
        ("a/1.jpg", "a\\1.jpg", "has \\ where"),
        ("1.jpg", "images/1.jpg", "has a folder"),
        ("1.jpg", "1.JPG", "suffix"),
        ("a/b c.jpg", "a/b%20c.jpg", "%20 for a blank"),
        ("b c.jpg", "/data/upload/7/b%20c.jpg", "%20 for a blank"),
    ],
)
def test_a_missing_image_that_is_there_by_another_name(check, world, tmp_path, there, listed, slip):
    (tmp_path / "a").mkdir()
    (tmp_path / "1.jpg").rename(tmp_path / there)
    world["images"][0]["file_name"] = listed
    (problem,) = check().problems
    assert problem.kind == "missing image file" and f"there is {tmp_path}/{there}" in problem.seen
    assert slip in problem.seen


@pytest.mark.parametrize("level", ["full", "header"])
def test_images_of_16_bits_would_become_white(check, world, tmp_path, level):
    for number, highest in ((1, 4095), (2, 200)):
        pixels = np.full((HEIGHT, WIDTH), highest, np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        world["images"][number - 1]["file_name"] = f"{number}.png"
    (problem,) = check(check_images=level).problems
    assert problem.kind == "image with more than 8 bits" and "1.png has values up to 4095" in problem.seen


def test_images_of_fractions_would_become_black(check, world, tmp_path):
    Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, np.float32)).save(tmp_path / "1.tif")
    world["images"][0]["file_name"] = "1.tif"
    (problem,) = check().problems
    assert (
        problem.kind == "image with more than 8 bits" and "1.tif has floating point numbers" in problem.seen
    )


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", "it is empty"),
        ("<annotation>", "XML"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ('{"images": [1,', "starts with"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [], "score": 0.5}]', "list of 1 predictions"),
        ('{"shapes": [], "imagePath": "a.jpg"}', "labelme"),
        ('{"a.jpg123": {"filename": "a.jpg", "regions": []}}', "VGG Image Annotator"),
        ('{"type": "FeatureCollection", "features": []}', "GeoJSON"),
        ('{"images": [], "categories": [], "foo": 1}', r"keys \['categories', 'foo', 'images'\]"),
        ("3", "a single int"),
    ],
)
def test_what_is_no_coco_json(tmp_path, text, seen):
    path = tmp_path / "x.json"
    path.write_text(text)
    report = check_coco("set", str(path), str(tmp_path), masks=True, training=True)
    (problem,) = report.problems
    assert not problem.skippable and "annotation file is no" in problem.kind
    assert re.search(seen, problem.seen), problem.seen


def test_missing_json(tmp_path):
    (problem,) = check_coco("set", str(tmp_path / "no.json"), "", masks=True, training=True).problems
    assert "cannot be read" in problem.kind and not problem.skippable
    (problem,) = check_coco("set", "datasets/coco/no.json", "", masks=True, training=True).problems
    assert "under $DETECTRON2_DATASETS, else datasets/" in problem.seen


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_as_windows_programs_save_it(tmp_path, world, encoding):
    """json.loads would read these bytes; Detectron2's and pycocotools' readers of the file would not."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(world), encoding=encoding)
    (problem,) = check_coco("set", str(path), str(tmp_path), masks=True, training=True).problems
    assert problem.kind == "the annotation file is not in plain UTF-8" and "save it as UTF-8" in problem.seen


def test_ids_of_the_other_type_are_told(check, world):
    """Some tools write an image's id as a number, and as text in the annotations."""
    world["annotations"][0]["image_id"] = "1"
    world["annotations"][1]["category_id"] = "4"
    image, category = check().problems
    assert "listed is 1, so write 1 here" in image.seen and "listed is 4, so write 4 here" in category.seen


def test_boxes_in_shares_of_the_image(check, world):
    for one in world["annotations"]:
        one["bbox"] = [0.1, 0.1, 0.5, 0.25]
    (problem,) = check().problems
    assert problem.kind == "boxes are shares of the image" and not problem.skippable
    world["annotations"][0]["bbox"] = [0.1, 0.1, 5, 5]
    assert kinds(check()) == []


def test_boxes_as_corners(check, world):
    """(12, 6, 18, 9) is no box of that width in 20 x 10 pixels, but fits as two corners. So do all others."""
    for one in world["annotations"]:
        one["bbox"] = [12, 6, 18, 9]
    report = check()
    assert kinds(report) == ["bbox is outside the image"] * 6 + [
        "all boxes fit if they are x0, y0, x1, y1",
        "nothing to train on",
    ]
    world["annotations"][0]["bbox"] = [12, 6, 3, 3]
    assert "all boxes fit if they are x0, y0, x1, y1" not in kinds(check())


def test_masks_that_are_all_marked_as_crowds(check, world, two_sets, make_cfg, caplog):
    """What is marked so is left out of training: that all is, or most, must not go unnoticed."""
    for one in world["annotations"]:
        one |= {"segmentation": rle(), "iscrowd": 1}
    (problem,) = check().problems
    assert problem.kind == "nothing to train on" and "of which 6 are marked iscrowd 1" in problem.seen
    assert kinds(check(training=False)) == []
    world["annotations"][0]["iscrowd"] = 0
    entries, write = two_sets
    write(train=world)
    with caplog.at_level(logging.WARNING, "d2_frozen"):
        prepare_datasets(make_cfg(entries))
    (warning,) = [record.getMessage() for record in caplog.records if "iscrowd" in record.getMessage()]
    assert warning.startswith("train_test_checks: 5 of 6 annotations are marked iscrowd 1")


def test_nothing_to_train_on(check, world):
    world["annotations"] = []
    assert kinds(check()) == ["nothing to train on"]
    assert kinds(check(training=False)) == []


def test_categories(check, world):
    assert kinds(check(classes=["nut", "bolt"])) == []
    (problem,) = check(classes=["bolt", "nut"]).problems
    assert "same names, other order" in problem.seen and not problem.skippable
    (problem,) = check(classes=["nut", "screw"]).problems
    assert "only in the entry: screw; only in the data: bolt" in problem.seen
    world["categories"].append({"id": 2, "name": "again"})
    assert kinds(check()) == ["duplicate category id"]


# ------------------------------------------------------------------------------------------ by config


@pytest.fixture
def two_sets(tmp_path, world):
    """Entries of a training and a test set; ``write(train=..., val=...)`` changes their documents."""

    def write(**documents):
        for name in ("train", "val"):
            (tmp_path / f"{name}.json").write_text(json.dumps(documents.get(name, world)))

    write()
    entries = [
        {
            "name": f"{n}_test_checks",
            "type": "coco_instances",
            "json": f"{tmp_path}/{n}.json",
            "images": str(tmp_path),
        }
        for n in ("train", "val")
    ]
    return entries, write


def test_class_count_comes_from_the_data(two_sets, make_cfg):
    cfg = make_cfg(two_sets[0])
    prepare_datasets(cfg)
    prepare_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(
        ValueError, match=r"NUM_CLASSES is 80, but dataset train_test_checks has 2 classes \(nut, bolt\)"
    ):
        resolve_num_classes(cfg)


def test_categories_of_one_name_are_told(two_sets, world, make_cfg, caplog):
    entries, write = two_sets
    with caplog.at_level(logging.WARNING, "d2_frozen"):
        prepare_datasets(make_cfg(entries))
        assert "several categories" not in caplog.text
        for category in world["categories"]:
            category["name"] = "nut"
        write(train=world, val=world)
        cfg = make_cfg(entries)
        prepare_datasets(cfg)
    assert "several categories that are called nut." in caplog.text and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


@pytest.mark.parametrize("fast", [False, True])
def test_masks_as_rle_are_trained_on(two_sets, world, make_cfg, fast):
    """A mask of columns 2 to 6 and rows 2 to 6, once as a polygon, once as RLE (column by column): equal pixels."""
    counts = [2 * HEIGHT + 2, *[5, HEIGHT - 5] * 4, 5]
    counts.append(WIDTH * HEIGHT - sum(counts))
    entries, write = two_sets
    options = ["INPUT.MIN_SIZE_TRAIN", (HEIGHT,), "INPUT.RANDOM_FLIP", "none", "INPUT.FAST_READING", fast]
    options += ["SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0]
    cfg = make_cfg(entries, *options)
    prepare_datasets(cfg)
    assert cfg.INPUT.MASK_FORMAT == "polygon"

    world["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
    write(train=world)
    cfg = make_cfg(entries, *options)
    prepare_datasets(cfg)
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    samples = {}
    for (sample,) in build_train_loader(cfg):
        samples[sample["image_id"]] = sample["instances"]
        if 1 in samples:
            break
    rle, polygon = samples[1].gt_masks.tensor
    assert torch.equal(rle, polygon) and rle.sum() == 25


def test_crowds_as_rle_change_nothing(two_sets, world, make_cfg):
    rle = {"size": [HEIGHT, WIDTH], "counts": [0, WIDTH * HEIGHT]}
    world["annotations"][0] = annotation(11, 1, iscrowd=1, segmentation=rle)
    two_sets[1](train=world)
    cfg = make_cfg(two_sets[0])
    prepare_datasets(cfg)
    assert cfg.INPUT.MASK_FORMAT == "polygon"


def test_no_dataset_to_count_in(make_cfg):
    with pytest.raises(
        ValueError, match="no dataset of DATASETS.TRAIN and TEST .both are empty. names its classes"
    ):
        resolve_num_classes(make_cfg())


def test_evaluation_does_not_need_the_training_data(two_sets, make_cfg, tmp_path):
    (tmp_path / "train.json").unlink()
    cfg = make_cfg(two_sets[0])
    prepare_datasets(cfg, train=False)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    with pytest.raises(FileNotFoundError, match="train_test_checks"):
        prepare_datasets(cfg)


def test_one_error_lists_and_counts(two_sets, world, make_cfg):
    bad = copy.deepcopy(world)
    bad["annotations"] = [annotation(100 + k, 1, bbox=[0, 0, 50, 5]) for k in range(14)]
    worse = copy.deepcopy(world)
    worse["annotations"][0]["bbox"] = [1, 1, 0, 1]
    two_sets[1](train=bad, val=worse)
    with pytest.raises(BadDataError) as caught:
        prepare_datasets(make_cfg(two_sets[0]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "16 problems in the data:"
    assert "  14 x bbox is outside the image" in lines and "  1 x bbox has no area" in lines
    # Nothing is left of the training set: that cannot be skipped, and comes first.
    assert "nothing to train on" in lines[5] and "val_test_checks" not in lines[5]
    assert len([line for line in lines if line.startswith("  train_test_checks")]) == 10
    assert "SKIP_BAD" not in lines[-1]


def test_skip_bad_leaves_out_counts_and_logs(two_sets, world, make_cfg, caplog, tmp_path):
    bad = copy.deepcopy(world)
    bad["annotations"][0]["bbox"] = [1, 1, 0, 1]
    bad["images"][2]["width"] = 21
    two_sets[1](train=bad)
    cfg = make_cfg(two_sets[0])
    with pytest.raises(BadDataError, match="or set DATASETS.SKIP_BAD True"):
        prepare_datasets(cfg)
    cfg.DATASETS.SKIP_BAD = True
    with caplog.at_level(logging.WARNING):
        prepare_datasets(cfg)
        prepare_datasets(cfg)  # a second call looks at the original file again
    assert caplog.text.count("goes on without 1 images and 3 annotations") == 2
    assert "2 problems in the data" in caplog.text
    records = DatasetCatalog.get("train_test_checks")
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [(1, 1), (2, 2)]
    # The evaluator reads the same file as the loader.
    assert MetadataCatalog.get("train_test_checks").json_file == f"{tmp_path}/out/data/train_test_checks.json"
    assert json.loads((tmp_path / "train.json").read_text()) == bad
    cfg.DATASETS.SKIP_BAD = False
    with pytest.raises(BadDataError):
        prepare_datasets(cfg)


def test_different_categories_in_training_and_test(two_sets, world, make_cfg):
    other = copy.deepcopy(world)
    other["categories"][0]["name"] = "screw"
    two_sets[1](val=other)
    cfg = make_cfg(two_sets[0], "DATASETS.SKIP_BAD", True)
    with pytest.raises(BadDataError, match="only in train_test_checks: bolt; only in val_test_checks: screw"):
        prepare_datasets(cfg)


def test_unknown_dataset_name(make_cfg):
    with pytest.raises(KeyError, match="never_registered"):
        prepare_datasets(make_cfg([], "DATASETS.TRAIN", ("never_registered",)))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["INPUT.MASK_FORMAT", "polygons"], "INPUT.MASK_FORMAT is 'polygons'; choose polygon or bitmask"),
        (["INPUT.FORMAT", "rgb"], "INPUT.FORMAT is 'rgb'; choose RGB, BGR"),
        (["INPUT.FORMAT", "RGBA"], "INPUT.FORMAT RGBA has 4 channels, MODEL.PIXEL_MEAN 3 values"),
    ],
)
def test_forms_of_images_and_masks(make_cfg, pairs, message):
    with pytest.raises(ValueError, match=message):
        prepare_datasets(make_cfg([], *pairs))
