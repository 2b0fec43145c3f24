"""Files, samplers, mapper and loaders: facts that the golden data does not hold."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    ToIterableDataset,
    build_batch_data_loader,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data import (
    transforms as T,
)
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from detectron2.data.datasets.coco import convert_to_coco_dict, convert_to_coco_json
from detectron2.data.samplers import (
    GroupedBatchSampler,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.structures import BoxMode

# How a camera stores an upright image under each EXIF orientation: the turn that undoes it.
STORED_AS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 3),
}


@pytest.mark.parametrize("orientation", STORED_AS)
def test_read_image_undoes_the_exif_orientation(tmp_path, orientation):
    upright = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_AS[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(detection_utils.read_image(str(tmp_path / "image.png"), "RGB"), upright)


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "YUV-BT.601"])
def test_image_formats_lead_back_to_rgb(image_format):
    rgb = np.random.RandomState(0).randint(0, 255, (6, 5, 3)).astype(np.uint8)
    array = detection_utils.convert_PIL_to_numpy(Image.fromarray(rgb), image_format)
    back = detection_utils.convert_image_to_rgb(array, image_format)
    assert np.abs(back.astype(float) - rgb).max() < 0.5


def test_coco_splits_are_registered_with_80_classes():
    metadata = MetadataCatalog.get("coco_2017_val")
    assert metadata.evaluator_type == "coco" and len(metadata.thing_classes) == 80
    assert metadata.json_file.endswith("coco/annotations/instances_val2017.json")
    ids = metadata.thing_dataset_id_to_contiguous_id
    named = {metadata.thing_classes[k]: coco_id for coco_id, k in ids.items()}
    # From the annotation files of COCO itself.
    known = {
        "person": 1,
        "traffic light": 10,
        "fire hydrant": 11,
        "stop sign": 13,
        "umbrella": 28,
        "handbag": 31,
    }
    known |= {
        "bottle": 44,
        "wine glass": 46,
        "dining table": 67,
        "toilet": 70,
        "tv": 72,
        "book": 84,
        "toothbrush": 90,
    }
    assert {name: named[name] for name in known} == known
    assert {"coco_2014_train", "coco_2014_minival", "coco_2017_train", "coco_2017_test-dev"} <= set(
        DatasetCatalog.list()
    )


def test_cityscapes_pairs_images_and_label_maps(tmp_path):
    for kind, endings in (
        ("leftImg8bit", ("leftImg8bit.png",)),
        (
            "gtFine",
            [
                f"gtFine_{x}"
                for x in ("labelTrainIds.png", "labelIds.png", "instanceIds.png", "polygons.json")
            ],
        ),
    ):
        for name in ("ulm/ulm_2_", "ulm/ulm_1_", "aachen/aachen_5_"):
            for ending in endings:
                file = tmp_path / kind / (name + ending)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"imgHeight": 3, "imgWidth": 4}))
    records = load_cityscapes_semantic(str(tmp_path / "leftImg8bit"), str(tmp_path / "gtFine"))
    assert {r["file_name"].rsplit("/", 1)[1] for r in records} == {
        f"{name}_leftImg8bit.png" for name in ("aachen_5", "ulm_1", "ulm_2")
    }
    for record in records:
        expected = record["file_name"].replace("/leftImg8bit/", "/gtFine/")
        assert record["sem_seg_file_name"] == expected.replace("leftImg8bit", "gtFine_labelTrainIds")
        assert (record["height"], record["width"]) == (3, 4)
    metadata = MetadataCatalog.get("cityscapes_fine_sem_seg_val")
    assert metadata.gt_dir.endswith("cityscapes/gtFine/val/") and metadata.ignore_label == 255
    assert len(metadata.stuff_classes) == 19 and metadata.stuff_classes[11:] == metadata.thing_classes


def test_the_older_name_of_build_augmentation():
    assert detection_utils.build_transform_gen is detection_utils.build_augmentation


def test_gen_crop_contains_the_centre_of_the_box():
    np.random.seed(0)
    instance = {"bbox": [50.0, 30.0, 20.0, 10.0], "bbox_mode": BoxMode.XYWH_ABS}  # centre (60, 35)
    for _ in range(20):
        crop = detection_utils.gen_crop_transform_with_instance((20, 24), (60, 84), instance)
        assert crop.x0 <= 60 <= crop.x0 + crop.w and crop.y0 <= 35 <= crop.y0 + crop.h
        assert (crop.h, crop.w) == (20, 24) and crop.x0 + crop.w <= 84 and crop.y0 + crop.h <= 60


# ------------------------------------------------------------------------------------------ keypoints


def test_keypoints_change_places_in_a_mirrored_image():
    """Image of 10 pixels; 0 is the nose, 1 and 2 a pair."""
    points = [1.0, 2.0, 2, 3.0, 4.0, 1, 8.0, 9.0, 2]
    mirror = T.TransformList([T.HFlipTransform(10)])
    moved = detection_utils.transform_keypoint_annotations(points, mirror, (10, 10), [0, 2, 1])
    assert moved.tolist() == [[9, 2, 2], [2, 9, 2], [7, 4, 1]]
    twice = T.TransformList([T.HFlipTransform(10), T.HFlipTransform(10)])
    back = detection_utils.transform_keypoint_annotations(points, twice, (10, 10), [0, 2, 1])
    assert back.reshape(-1).tolist() == points
    for wrong in (None, [0, 1]):
        with pytest.raises(ValueError):
            detection_utils.transform_keypoint_annotations(points, mirror, (10, 10), wrong)


def test_keypoints_that_leave_the_image_are_not_labelled():
    """A crop of 4x4 at (2, 2): its border is still inside."""
    points = [2.0, 2.0, 2, 6.0, 6.0, 1, 6.5, 3.0, 2, 1.5, 3.0, 2, 3.0, 3.0, 0]
    crop = T.TransformList([T.CropTransform(2, 2, 4, 4)])
    moved = detection_utils.transform_keypoint_annotations(points, crop, (4, 4))
    assert moved.tolist() == [[0, 0, 2], [4, 4, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_keypoint_pairs_of_coco():
    (nose, *others) = detection_utils.create_keypoint_hflip_indices("keypoints_coco_2017_val")
    assert nose == 0 and others == [i + 1 if i % 2 else i - 1 for i in range(1, 17)]
    assert MetadataCatalog.get("keypoints_coco_2017_val").keypoint_names[5:7] == (
        "left_shoulder",
        "right_shoulder",
    )


@pytest.fixture
def two_hands() -> str:
    """A registered dataset of one image of a person with two keypoints, which mirroring exchanges."""
    name = "contract_two_hands"
    MetadataCatalog.get(name).set(
        thing_classes=["person"],
        keypoint_names=["left_hand", "right_hand"],
        keypoint_flip_map=[("left_hand", "right_hand")],
    )
    person = {"bbox": [1, 2, 9, 8], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    person["keypoints"] = [2.5, 3.5, 2, 7.5, 4.5, 1]
    record = {"file_name": "a.png", "height": 10, "width": 10, "image_id": 1, "annotations": [person]}
    DatasetCatalog.register(name, lambda: copy.deepcopy([record]))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_mapper_moves_keypoints(two_hands, tmp_path):
    (record,) = DatasetCatalog.get(two_hands)
    record["file_name"] = str(tmp_path / "a.png")
    Image.new("RGB", (10, 10)).save(record["file_name"])
    mapper = DatasetMapper(
        True,
        augmentations=[T.HFlipTransform(10)],
        image_format="RGB",
        use_keypoint=True,
        keypoint_hflip_indices=detection_utils.create_keypoint_hflip_indices(two_hands),
    )
    found = mapper(record)["instances"].gt_keypoints.tensor
    assert found.tolist() == [[[2.5, 4.5, 1], [7.5, 3.5, 2]]]


def test_keypoints_lead_back_through_coco_json(two_hands, tmp_path):
    path = str(tmp_path / "a.json")
    coco = convert_to_coco_dict(two_hands)
    # COCO counts pixels, whose centres lie half a pixel further on.
    assert coco["annotations"][0]["keypoints"] == [2, 3, 2, 7, 4, 1]
    assert coco["annotations"][0]["num_keypoints"] == 2
    convert_to_coco_json(two_hands, path)
    (record,) = load_coco_json(path, "")
    assert record["annotations"][0]["keypoints"] == [2.5, 3.5, 2, 7.5, 4.5, 1]


def test_images_with_few_keypoints_are_left_out(two_hands):
    kept = [len(get_detection_dataset_dicts(two_hands, min_keypoints=n)) for n in (0, 1, 2)]
    assert kept == [1, 1, 1]
    with pytest.raises(AssertionError):
        get_detection_dataset_dicts(two_hands, min_keypoints=3)


# ------------------------------------------------------------------------------------------ COCO and back


@pytest.fixture
def two_masks() -> str:
    """A registered dataset with one polygon and one RLE mask; category ids of the file are 5 and 9."""
    name = "contract_two_masks"
    mask = np.zeros((20, 30), np.uint8)
    mask[2:6, 3:10] = 1
    record = {
        "file_name": "a.png",
        "height": 20,
        "width": 30,
        "image_id": 42,
        "annotations": [
            {"bbox": [1, 2, 7, 6], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1,
             "segmentation": [[1.0, 2.0, 7.0, 2.0, 7.0, 6.0]]},
            {"bbox": [3, 2, 7, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1,
             "segmentation": mask_util.encode(np.asfortranarray(mask))},
            {"bbox": [0, 0, 4, 5], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
        ],
    }  # fmt: skip
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(
        thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id={5: 0, 9: 1}
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_convert_to_coco_dict(two_masks):
    coco = convert_to_coco_dict(two_masks)
    assert [(c["id"], c["name"]) for c in coco["categories"]] == [(5, "cat"), (9, "dog")]
    assert coco["images"] == [{"id": 42, "width": 30, "height": 20, "file_name": "a.png"}]
    polygon, crowd, plain = coco["annotations"]
    assert polygon["bbox"] == [1, 2, 6, 4] and polygon["category_id"] == 9
    assert polygon["area"] == pytest.approx(12)  # triangle, 6 * 4 / 2
    assert crowd["area"] == pytest.approx(28) and crowd["iscrowd"] == 1  # 4 * 7 pixels
    assert plain["area"] == pytest.approx(20) and "segmentation" not in plain
    assert [a["id"] for a in coco["annotations"]] == [1, 2, 3]


def test_rotated_boxes_are_written_as_they_are():
    box = {"bbox": [10, 9, 8, 4, 30], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}
    name = "contract_rotated"
    DatasetCatalog.register(
        name, lambda: [{"file_name": "a", "height": 20, "width": 20, "annotations": [box]}]
    )
    MetadataCatalog.get(name).thing_classes = ["a"]
    try:
        (written,) = convert_to_coco_dict(name)["annotations"]
        assert written["bbox"] == [10, 9, 8, 4, 30] and written["area"] == pytest.approx(32)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_coco_json_leads_back_to_the_same_dicts(two_masks, tmp_path):
    path = str(tmp_path / "out" / "a.json")
    convert_to_coco_json(two_masks, path)
    (record,) = load_coco_json(path, "", "contract_read_back")
    original = DatasetCatalog.get(two_masks)[0]
    assert record["image_id"] == 42
    for read, written in zip(record["annotations"], original["annotations"]):
        assert read["category_id"] == written["category_id"]
        box = BoxMode.convert(list(written["bbox"]), written["bbox_mode"], BoxMode.XYWH_ABS)
        assert np.allclose(read["bbox"], box)
    assert np.allclose(record["annotations"][0]["segmentation"], original["annotations"][0]["segmentation"])
    assert mask_util.area(record["annotations"][1]["segmentation"]) == 28


# ------------------------------------------------------------------------------------------ mapper


def test_boxes_are_recomputed_from_masks_after_a_crop(tmp_path):
    """The box of a triangle cut at x=10 shrinks to what is left of the triangle, not of its box."""
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    triangle = {"bbox": [0.0, 0.0, 20.0, 20.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
                "segmentation": [[0.0, 0.0, 20.0, 20.0, 0.0, 20.0]]}  # fmt: skip
    record = {"file_name": str(tmp_path / "a.png"), "annotations": [triangle]}
    for recompute, top in ((False, 0.0), (True, 10.0)):
        mapper = DatasetMapper(
            True,
            augmentations=[T.CropTransform(10, 0, 10, 20)],
            image_format="RGB",
            use_instance_mask=True,
            recompute_boxes=recompute,
        )
        sample = mapper(record)
        assert tuple(sample["image"].shape) == (3, 20, 10)
        assert sample["instances"].gt_boxes.tensor[0].tolist() == pytest.approx([0, top, 10, 20])
    assert (record.get("height"), len(record["annotations"])) == (None, 1)


def test_mapper_moves_the_label_map_with_the_image(tmp_path):
    labels = np.zeros((10, 20), np.uint8)
    labels[:, :5] = 7
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(np.dstack([labels] * 3)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}
    mapper = DatasetMapper(True, augmentations=[T.RandomFlip(prob=1.0)], image_format="RGB")
    sample = mapper(record)
    assert sample["sem_seg"].dtype == torch.int64
    assert torch.equal(sample["sem_seg"], sample["image"][0].long())
    assert (sample["sem_seg"][:, -5:] == 7).all() and (sample["sem_seg"][:, :-5] == 0).all()


# ------------------------------------------------------------------------------------------ samplers, loaders


def test_training_order_is_torchs_permutations_one_after_the_other():
    generator = torch.Generator().manual_seed(5)
    expected = [i for _ in range(3) for i in torch.randperm(7, generator=generator).tolist()]
    assert list(itertools.islice(TrainingSampler(7, seed=5), 21)) == expected


def test_repeats_are_drawn_before_the_order():
    factors = torch.tensor([1.5, 1.0, 2.25, 1.0])
    generator = torch.Generator().manual_seed(5)
    expected = []
    for _ in range(3):
        counts = factors.trunc() + (torch.rand(4, generator=generator) < factors.frac())
        indices = torch.repeat_interleave(torch.arange(4), counts.long())
        expected += indices[torch.randperm(len(indices), generator=generator)].tolist()
    assert list(itertools.islice(RepeatFactorTrainingSampler(factors, seed=5), len(expected))) == expected


def test_without_a_seed_samplers_take_one_from_numpy():
    np.random.seed(8)
    seed = np.random.randint(2**31)
    np.random.seed(8)
    sampler = TrainingSampler(9)
    torch.manual_seed(1)  # has no part in it
    assert list(itertools.islice(sampler, 9)) == list(itertools.islice(TrainingSampler(9, seed=seed), 9))


def test_workers_are_seeded_from_torchs_seed_and_their_number():
    torch.manual_seed(2**31 + 11)
    worker_init_reset_seed(2)
    drawn = np.random.rand(), torch.rand(1).item(), random.random()
    np.random.seed(13)
    torch.manual_seed(13)
    random.seed(13)
    assert drawn == (np.random.rand(), torch.rand(1).item(), random.random())


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_inference_sampler_parts_are_contiguous_and_complete(world_size):
    parts = [list(InferenceSampler._get_local_indices(10, world_size, rank)) for rank in range(world_size)]
    assert sum(parts, []) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted(map(len, parts), reverse=True) == list(map(len, parts))  # the first ranks get one more


def test_subset_sampler_stays_in_its_subset_and_covers_it():
    sampler = RandomSubsetTrainingSampler(10, 0.5, seed_shuffle=1, seed_subset=2)
    drawn = list(itertools.islice(sampler, 15))
    epochs = [sorted(drawn[i : i + 5]) for i in (0, 5, 10)]
    assert epochs[0] == epochs[1] == epochs[2] and len(set(epochs[0])) == 5


def test_repeat_factor_sampler_repeats_as_often_as_it_says():
    sampler = RepeatFactorTrainingSampler(torch.tensor([1.0, 3.0, 2.0]), seed=0)
    assert sorted(itertools.islice(sampler, 6)) == [0, 1, 1, 1, 2, 2]


def test_grouped_batches_hold_one_group_each():
    batches = GroupedBatchSampler(TrainingSampler(6, shuffle=False, seed=0), [0, 1, 0, 1, 1, 0], batch_size=2)
    assert list(itertools.islice(batches, 3)) == [[0, 2], [1, 3], [5, 0]]


def _index(record):
    return record["index"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(num_workers):
    data = [{"index": i} for i in range(7)]
    loader = build_detection_train_loader(
        data,
        mapper=_index,
        sampler=TrainingSampler(7, shuffle=False, seed=0),
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=num_workers,
    )
    assert list(itertools.islice(loader, 4)) == [[0, 1], [2, 3], [4, 5], [6, 0]]


def test_single_gpu_batch_size_and_collate_fn():
    loader = build_batch_data_loader(
        DatasetFromList(list(range(9))),
        TrainingSampler(9, shuffle=False, seed=0),
        None,
        single_gpu_batch_size=3,
        collate_fn=sum,
    )
    assert list(itertools.islice(loader, 3)) == [3, 12, 21]


def test_iterable_datasets_are_mapped_and_lose_what_the_mapper_gives_up():
    ordered = ToIterableDataset(DatasetFromList([1, 2, 3, 4]), InferenceSampler(4))
    assert list(MapDataset(ordered, lambda x: None if x == 3 else 10 * x)) == [10, 20, 40]


def test_mapped_datasets_travel_to_other_processes_with_any_function():
    pytest.importorskip("cloudpickle")
    offset = 10
    mapped = MapDataset(DatasetFromList([1, 2]), lambda x: x + offset)
    assert pickle.loads(pickle.dumps(mapped))[1] == 12


def test_serialized_list_keeps_types_and_order():
    elements = [{"mode": BoxMode.XYWH_ABS, "array": np.arange(3)}, "text", None, {"n": [1, 2.5]}]
    stored = DatasetFromList(elements, serialize=True)
    assert len(stored) == 4 and stored[1] == "text" and stored[2] is None and stored[3] == {"n": [1, 2.5]}
    assert stored[0]["mode"] is BoxMode.XYWH_ABS and stored[0]["array"].tolist() == [0, 1, 2]


def test_metadata_by_its_former_names():
    metadata = MetadataCatalog.get("test_former_names")
    metadata.set(thing_classes=["nut"], thing_dataset_id_to_contiguous_id={7: 0})
    metadata.stuff_class_names = ["wall"]
    assert metadata.class_names == ["nut"] and metadata.get("class_names") == ["nut"]
    assert metadata.dataset_id_to_contiguous_id == {7: 0}
    assert metadata.stuff_classes == ["wall"]
    assert "class_names" not in metadata.as_dict()


def test_channels_beyond_the_colours_are_not_shown():
    image = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    assert (detection_utils.convert_image_to_rgb(image, "BGR") == image[:, :, [2, 1, 0]]).all()
