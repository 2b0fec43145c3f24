"""What the embedded engine's data package does better than the original on purpose: clear errors, repeatable
draws.
"""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import d2_frozen
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    build_detection_train_loader,
    detection_utils,
    print_instances_class_histogram,
)
from detectron2.data import (
    transforms as T,
)
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.datasets import load_coco_json, load_sem_seg, register_coco_instances
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode

pytestmark = pytest.mark.skipif(d2_frozen.engine_name() != "embedded", reason="about the embedded engine")


# ------------------------------------------------------------------------------------------ bad COCO files


def coco(**changes):
    """A valid file with one image and one annotation, with some parts replaced."""
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 20}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0}],
    }
    return content | changes


def annotation(**changes):
    return {"annotations": [coco()["annotations"][0] | changes]}


IMAGE = coco()["images"][0]
ANNOTATION = coco()["annotations"][0]
NO_SIZE = {"id": 1, "file_name": "a.png"}
CATEGORY = coco()["categories"][0]
# What is wrong: (content of the file, type of the error, words of its message beside the file name).
BAD = {
    "a list": ([1, 2], ValueError, ["no COCO annotation file", "list"]),
    "predictions": ({"boxes": []}, ValueError, ["no COCO annotation file", "boxes"]),
    "annotations no list": (coco(annotations={}), ValueError, ["annotations"]),
    "no categories": ({"images": [IMAGE]}, ValueError, ["categories"]),
    "image without size": (coco(images=[NO_SIZE]), KeyError, ["images", "id 1", "height, width"]),
    "image id twice": (coco(images=[IMAGE, IMAGE]), ValueError, ["image id 1", "more than once"]),
    "category id twice": (coco(categories=[CATEGORY] * 2), ValueError, ["category ids", "3"]),
    "annotation id twice": (coco(annotations=[ANNOTATION] * 2), AssertionError, ["id 7", "image 1"]),
    "unknown category": (coco(**annotation(category_id=55)), KeyError, ["annotation 7", "image 1", "55"]),
    "annotation alone": (coco(annotations=[{"id": 7}]), KeyError, ["7", "image_id, category_id"]),
    "short bbox": (coco(**annotation(bbox=[1, 2])), ValueError, ["annotation 7", "[1, 2]"]),
    "flat polygon": (coco(**annotation(segmentation=[1, 2, 3])), ValueError, ["annotation 7", "polygons"]),
    "rle without size": (coco(**annotation(segmentation={"a": 1})), ValueError, ["annotation 7", "size"]),
    "ignore": (coco(**annotation(ignore=1)), AssertionError, ["annotation 7", "ignore"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_coco_file_names_file_and_entry(tmp_path, case):
    content, error, words = BAD[case]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(error) as caught:
        load_coco_json(path, "", f"embedded_bad_{case}")
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 not json")
    with pytest.raises(ValueError, match="photo.jpg is no JSON"):
        load_coco_json(path, "")


def test_a_file_without_annotations_is_a_test_set(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"images": [IMAGE], "categories": [{"id": 3, "name": "cat"}]}))
    assert [r["annotations"] for r in load_coco_json(path, "", "embedded_test_set")] == [[]]


# ------------------------------------------------------------------------------------------ names


def test_one_name_for_two_datasets_is_an_error():
    register_coco_instances("embedded_once", {}, "a.json", "images")
    register_coco_instances("embedded_once", {"note": 1}, "a.json", "images")  # the same again is fine
    assert MetadataCatalog.get("embedded_once").note == 1
    with pytest.raises(AssertionError, match=r"embedded_once.*a\.json.*b\.json"):
        register_coco_instances("embedded_once", {}, "b.json", "images")


def test_unknown_names_are_explained():
    register_coco_instances("embedded_street_train", {}, "a.json", "images")
    with pytest.raises(KeyError, match="Did you mean embedded_street_train"):
        DatasetCatalog.get("embedded_stret_train")
    with pytest.raises(KeyError, match="needs Detectron2"):
        DatasetCatalog.get("lvis_v1_train")


def test_metadata_errors_name_the_dataset():
    metadata = MetadataCatalog.get("embedded_meta")
    with pytest.raises(AttributeError, match="embedded_meta.*thing_classes"):
        _ = metadata.thing_classes
    metadata.thing_classes = ["a"]
    with pytest.raises(AssertionError, match="embedded_meta"):
        metadata.thing_classes = ["b"]


def test_histogram_names_the_image_with_a_foreign_class():
    record = {"image_id": 31, "annotations": [{"category_id": 4, "iscrowd": 0}]}
    with pytest.raises(AssertionError, match="31.*category_id 4.*2 classes"):
        print_instances_class_histogram([record], ["a", "b"])


def test_outside_the_subset_says_so():
    import detectron2.data.datasets as datasets

    with pytest.raises(NotImplementedError, match="register_lvis_instances.*needs Detectron2"):
        datasets.register_lvis_instances("x", {}, "x.json", "x")
    with pytest.raises(ImportError, match="proposals.*needs Detectron2"):
        DatasetMapper(True, augmentations=[], image_format="RGB", precomputed_proposal_topk=5)


def test_keypoints_that_some_annotations_lack_are_counted():
    person = {"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    with pytest.raises(KeyError, match="keypoints.*1 of the 2"):
        annotations_to_instances([{**person, "keypoints": [[1, 1, 2]]}, person], (10, 10))


def test_cityscapes_without_label_maps_says_how_to_make_them(tmp_path):
    (tmp_path / "images/ulm").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no image"):
        load_cityscapes_semantic(str(tmp_path / "images"), str(tmp_path / "labels"))
    (tmp_path / "images/ulm/ulm_1_leftImg8bit.png").write_text("")
    with pytest.raises(FileNotFoundError, match="ulm_1_gtFine_labelTrainIds.png.*createTrainIdLabelImgs"):
        load_cityscapes_semantic(str(tmp_path / "images"), str(tmp_path / "labels"))


# ------------------------------------------------------------------------------------------ images


def test_unreadable_image_is_named(tmp_path):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_bytes(b"hello")
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    for path in (text, cut):
        with pytest.raises(OSError, match=path.name):
            detection_utils.read_image(str(path), "RGB")


def test_size_mismatch_names_file_and_sizes(tmp_path):
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "a.png")
    mapper = DatasetMapper(False, augmentations=[], image_format="RGB")
    with pytest.raises(detection_utils.SizeMismatchError, match=r"a\.png is 20x10.*says 10x20"):
        mapper({"file_name": str(tmp_path / "a.png"), "height": 20, "width": 10})


def test_sem_seg_folders_without_pairs_are_named(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(AssertionError, match=r"images \(1 there\).*labels \(0 there\)"):
        load_sem_seg(str(tmp_path / "labels"), str(tmp_path / "images"))


@pytest.mark.parametrize("dtype", [bool, np.int16, np.int32, np.int64])
def test_label_maps_of_any_integer_type_resize_like_uint8(dtype):
    labels = (np.arange(48).reshape(6, 8) % 2).astype(np.uint8)
    for size in ((3, 4), (13, 5), (6, 8), (1, 1)):
        resize = T.ResizeTransform(6, 8, *size)
        resized = resize.apply_segmentation(labels.astype(dtype))
        assert resized.dtype == dtype
        assert np.array_equal(resized, resize.apply_segmentation(labels).astype(dtype))


def test_extent_never_invents_labels():
    """The original interpolates label maps here: between classes 0 and 4 appear 1, 2 and 3."""
    labels = np.zeros((20, 20), np.uint8)
    labels[:, 10:] = 4
    extent = T.ExtentTransform((-3.3, 2.2, 17.7, 19.1), output_size=(31, 33))
    assert set(np.unique(extent.apply_segmentation(labels))) <= {0, 4}


# ------------------------------------------------------------------------------------------ repeatable draws


def _odd_is_bad(value):
    return None if value % 2 else value


def test_replacement_of_a_sample_depends_on_its_index_alone():
    first, second = (MapDataset(list(range(20)), _odd_is_bad) for _ in range(2))
    forwards = [first[i] for i in range(20)]
    backwards = [second[i] for i in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert all(v % 2 == 0 for v in forwards) and len({forwards[i] for i in range(1, 20, 2)}) > 3
    assert [pickle.loads(pickle.dumps(first))[i] for i in range(20)] == forwards


def test_a_mapper_that_gives_up_everything_ends_with_an_error():
    with pytest.raises(ValueError, match="every one of the 3 samples"):
        _ = MapDataset([1, 3, 5], _odd_is_bad)[0]


def _same(record):
    return record


@pytest.mark.parametrize("num_workers", [1, 2])
def test_grouped_batches_do_not_depend_on_the_number_of_workers(num_workers):
    data = [{"i": i, "width": 10 + i % 3 * 5, "height": 14} for i in range(11)]

    def batches(workers: int):
        loader = build_detection_train_loader(
            data,
            mapper=_same,
            sampler=TrainingSampler(11, seed=1),
            total_batch_size=2,
            aspect_ratio_grouping=True,
            num_workers=workers,
        )
        return [[sample["i"] for sample in batch] for batch in itertools.islice(loader, 8)]

    torch.manual_seed(0)
    assert batches(num_workers) == batches(0)


def test_a_new_iteration_begins_with_no_sample_waiting():
    wide, narrow = {"width": 2, "height": 1}, {"width": 1, "height": 2}
    grouped = AspectRatioGroupedDataset([wide, narrow, narrow], batch_size=2)
    assert list(grouped) == [[narrow, narrow]] and list(grouped) == [[narrow, narrow]]


@pytest.mark.parametrize("height, width", [(2, 3000), (3000, 2)])
def test_no_side_is_resized_to_nothing(height, width):
    """64 / 3000 of two pixels is less than half a pixel."""
    image = np.zeros((height, width, 3), np.uint8)
    for augmentation in (T.ResizeShortestEdge(64, 64), T.ResizeScale(1.0, 1.0, 64, 64)):
        resized = augmentation.get_transform(image).apply_image(image)
        assert sorted(resized.shape[:2]) == [1, 64]
