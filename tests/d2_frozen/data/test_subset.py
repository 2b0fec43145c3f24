"""A seed names the same images everywhere, and less of them is a part of more."""

from __future__ import annotations

import json
import logging
import random
from itertools import islice

import pytest

from d2_frozen.data import build_test_loader, build_train_loader, prepare_datasets, training_records
from d2_frozen.data.subset import take_subset
from d2_frozen.train_net import main
from detectron2.data import DatasetCatalog, MetadataCatalog

IMAGES = [{"image_id": k, "file_name": f"/photos/{k:012d}.jpg"} for k in range(1, 201)]
# By hashlib.sha256(f"0/{image_id}".encode()).hexdigest(); a change here changes everybody's low-data experiments.
GOLDEN = [16, 107, 46, 31, 87, 190, 159, 92, 96, 199]


def ids(records):
    return [record["image_id"] for record in records]


def test_these_are_the_images_of_seed_0():
    assert ids(take_subset(IMAGES, 5.0, seed=0)) == GOLDEN
    assert ids(take_subset(IMAGES, 5.0, seed=1)) != GOLDEN


def test_neither_order_nor_folder_nor_type_of_id_matters():
    shuffled = [{"image_id": str(r["image_id"]), "file_name": "/elsewhere" + r["file_name"]} for r in IMAGES]
    random.Random(3).shuffle(shuffled)
    assert [int(i) for i in ids(take_subset(shuffled, 5.0, seed=0))] == GOLDEN


def test_less_is_a_part_of_more():
    previous = []
    for percent in (0.1, 1.0, 10.0, 37.5, 100.0):
        taken = ids(take_subset(IMAGES, percent, seed=4))
        assert len(taken) == max(1, round(2 * percent)) and taken[: len(previous)] == previous
        previous = taken


def test_one_percent_of_coco_is_about_1200_images():
    assert len(take_subset([{"image_id": k} for k in range(117_266)], 1.0, seed=0)) == 1173


def test_images_without_ids_go_by_file_name_below_their_folder():
    records = [{"file_name": f"/a/b/{city}/{k}.png"} for city in ("ulm", "umea") for k in range(50)]
    moved = [{"file_name": r["file_name"].replace("/a/b/", "/c/")} for r in reversed(records)]
    names = [r["file_name"].split("/")[-2:] for r in take_subset(records, 10.0, 0)]
    assert names == [r["file_name"].split("/")[-2:] for r in take_subset(moved, 10.0, 0)]
    assert {city for city, _ in names} == {"ulm", "umea"}
    assert take_subset([], 10.0, 0) == []


@pytest.fixture
def world(tmp_path, make_cfg):
    """``world("KEY", value, ...)``: 40 images, every second of them empty, with a nut in every image that has
    objects and one bolt in all of them; a second set of 30 images."""
    categories = [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}]

    def box(k: int, image: int, category: int) -> dict:
        return {"id": k, "image_id": image, "category_id": category, "bbox": [1, 1, 4, 4], "area": 16,
                "iscrowd": 0, "segmentation": [[1, 1, 5, 1, 5, 5]]}  # fmt: skip

    def document(count: int, step: int) -> dict:
        images = [{"id": k, "file_name": f"{k}.jpg", "height": 10, "width": 20 - k % 2} for k in range(count)]
        labelled = range(0, count, step)
        annotations = [box(k, k, 1) for k in labelled] + [box(1000, labelled[-1], 2)]
        return {"images": images, "annotations": annotations, "categories": categories}

    names = {"train": (40, 2), "val": (4, 1), "more": (30, 1)}
    for name, shape in names.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document(*shape)))
    entries = [
        {
            "name": f"{n}_subset",
            "type": "coco_instances",
            "json": f"{tmp_path}/{n}.json",
            "images": str(tmp_path),
        }
        for n in names
    ]

    def make(*pairs):
        return make_cfg(
            entries, "DATASETS.CHECK_IMAGES", "off", "DATASETS.SUBSET.PERCENT", 10.0,
            "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, *pairs,
        )  # fmt: skip

    return make


def test_written_logged_and_only_for_training(world, caplog, tmp_path):
    cfg = world()
    prepare_datasets(cfg)
    with caplog.at_level(logging.INFO, "d2_frozen"):
        taken = ids(training_records(cfg))
    assert len(taken) == 2 and all(k % 2 == 0 for k in taken)
    document = json.loads((tmp_path / "out/data/train_subset.subset.json").read_text())
    assert document == {
        "dataset": "train_subset", "percent": 10.0, "seed": 0, "images": 2, "of": 20, "objects": 2,
        "classes_without_objects": ["bolt"], "ids": taken,
    }  # fmt: skip
    assert "train_subset trains on 2 of 20 images (10 %, seed 0) with 2 objects" in caplog.text
    assert "have no object of 1 classes: bolt" in caplog.text
    # Classes are those of the whole set, and the test set is whole.
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert len(build_test_loader(cfg, "val_subset").dataset) == 4
    assert len(DatasetCatalog.get("train_subset")) == 40


def test_images_without_objects_count_if_they_train(world):
    cfg = world("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    prepare_datasets(cfg)
    assert len(training_records(cfg)) == 4


def test_each_of_two_training_sets_gives_its_share(world, tmp_path):
    cfg = world("DATASETS.TRAIN", ("train_subset", "more_subset"))
    prepare_datasets(cfg)
    assert len(training_records(cfg)) == 2 + 3
    cfg.DATASETS.SUBSET.PERCENT = 0.001
    assert len(training_records(cfg)) == 1 + 1
    for name in ("train", "more"):
        assert json.loads((tmp_path / f"out/data/{name}_subset.subset.json").read_text())["images"] == 1


def test_a_set_registered_in_code_without_classes(make_cfg, tmp_path):
    DatasetCatalog.register("in_code_subset", lambda: [dict(r) for r in IMAGES])
    MetadataCatalog.get("in_code_subset").set(evaluator_type="other")
    cfg = make_cfg([], "DATASETS.TRAIN", ("in_code_subset",), "DATASETS.SUBSET.PERCENT", 5.0)
    assert ids(training_records(cfg)) == GOLDEN
    assert json.loads((tmp_path / "out/data/in_code_subset.subset.json").read_text())["ids"] == GOLDEN


def test_all_is_what_detectron2_gives(world, tmp_path):
    cfg = world("DATASETS.SUBSET.PERCENT", 100.0)
    prepare_datasets(cfg)
    assert ids(training_records(cfg)) == list(range(0, 40, 2))
    assert not (tmp_path / "out/data").exists()


def test_a_resumed_run_goes_on_with_the_same_images(world):
    def batches(count, **options):
        cfg = world("DATASETS.TRAIN", ("train_subset", "more_subset"))
        prepare_datasets(cfg)
        return [ids(b) for b in islice(build_train_loader(cfg, mapper=dict, **options), count)]

    whole = batches(9)
    assert batches(4, start_iteration=5) == whole[5:]
    assert len({i for batch in whole for i in batch}) <= 5


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.5, float("nan"), float("inf")])
def test_impossible_shares(world, percent):
    cfg = world("DATASETS.SUBSET.PERCENT", percent)
    with pytest.raises(ValueError, match=r"SUBSET.PERCENT is .*above 0 and at most 100"):
        prepare_datasets(cfg)
    prepare_datasets(cfg, train=False)  # not used there


def test_types_are_those_of_the_defaults(world):
    with pytest.raises(ValueError, match=r"DATASETS.SUBSET.PERCENT"):
        world("DATASETS.SUBSET.PERCENT", "all")
    with pytest.raises(ValueError, match=r"DATASETS.SUBSET.SEED"):
        world("DATASETS.SUBSET.SEED", 0.5)


def test_a_run_trains_on_the_share_and_is_tested_on_all(flags, tmp_path):
    main(flags("DATASETS.SUBSET.PERCENT", "25.0", "SOLVER.MAX_ITER", "2"))
    document = json.loads((tmp_path / "out/data/tiny_train.subset.json").read_text())
    assert (document["images"], document["of"]) == (3, 12)
    predictions = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert len({p["image_id"] for p in predictions}) == 4
