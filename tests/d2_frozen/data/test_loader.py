"""Batches depend on seed and position only: not on workers, resumes, or what the process drew before."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2_frozen.data import build_test_loader, build_train_loader, prepare_datasets, training_records
from d2_frozen.data.draws import draw_index, seeded
from d2_frozen.data.loader import DrawnDataset, Place, SampleError
from d2_frozen.data.shapes import generate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm


def draws():
    return random.random(), np.random.random_sample(), torch.rand(1).item()


def test_seeded_is_a_function_of_its_arguments_and_leaves_no_trace():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(3, 5):
        first = draws()
    assert draws() == expected
    with seeded(3, 5):
        assert draws() == first
    with seeded(3, 6):
        assert all(a != b for a, b in zip(draws(), first))
    assert len({draw_index(1000, 3, p) for p in range(20)}) > 15


@pytest.fixture
def shapes(tmp_path_factory, make_cfg):
    """``shapes("KEY", value, ...)``: a registered world of 9 pictures of 80 px, batches of 2."""
    root = tmp_path_factory.getbasetemp() / "loader_world"
    generate(root, train=9, val=4, seed=2, size=80)
    entries = [
        {
            "name": f"{n}_test_loader",
            "type": "coco_instances",
            "json": f"{root}/{n}.json",
            "images": f"{root}/{n}",
        }
        for n in ("train", "val")
    ]

    def make(*pairs):
        cfg = make_cfg(
            entries, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0,
            "INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.SIZE", 64, *pairs,
        )  # fmt: skip
        prepare_datasets(cfg)
        return cfg

    return make


def take(cfg, count, **options):
    """Batches as plain comparable values: file, pixels, boxes, classes, masks."""
    return [
        [
            (
                sample["file_name"],
                sample["image"].numpy().tobytes(),
                sample["instances"].gt_boxes.tensor.tolist(),
                sample["instances"].gt_classes.tolist(),
                [[p.tolist() for p in polygons] for polygons in sample["instances"].gt_masks.polygons],
            )
            for sample in batch
        ]
        for batch in islice(build_train_loader(cfg, **options), count)
    ]


def test_records_without_a_size_are_grouped_by_that_of_their_files(shapes):
    """As Detectron2 has it, which reads images before it groups them."""
    cfg = shapes()
    bare = [
        {key: value for key, value in record.items() if key not in ("width", "height")}
        for record in training_records(cfg)
    ]
    assert take(cfg, 5, dataset=bare) == take(cfg, 5)
    with pytest.raises(
        ValueError, match=r"has no 'width' and 'height'.*\(it has pixels\).*ASPECT_RATIO_GROUPING"
    ):
        build_train_loader(cfg, dataset=[{"pixels": None}])


def test_keypoints_come_along_for_heads_of_an_installed_detectron2(shapes):
    cfg = shapes("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 2)
    cfg.DATASETS.TRAIN = ("keypoints_of_test_loader",)
    records = [
        {
            **r,
            "annotations": [{**a, "keypoints": [9.0, 9.0, 2, 30.0, 9.0, seen]} for a in r["annotations"][:1]],
        }
        for r, seen in zip(DatasetCatalog.get("train_test_loader"), [2, 0] * 5)
    ]
    DatasetCatalog.register("keypoints_of_test_loader", lambda: records)
    MetadataCatalog.get("keypoints_of_test_loader").set(
        keypoint_names=["left", "right"], keypoint_flip_map=[("left", "right")]
    )
    assert [r["annotations"][0]["keypoints"][-1] for r in training_records(cfg)] == [2] * 5
    seen = 0
    for batch in islice(build_train_loader(cfg), 6):
        for sample in batch:
            for left, right in sample["instances"].gt_keypoints.tensor:
                if left[2] and right[2]:  # both inside the crop
                    seen += 1
                    assert left[0] < right[0], "a mirrored left is called right"
    assert seen > 4


@pytest.mark.parametrize("grouping", [True, False])
def test_workers_do_not_matter(shapes, grouping):
    expected = take(shapes("DATALOADER.ASPECT_RATIO_GROUPING", grouping), 7)
    np.random.seed(99)
    for workers in (1, 4):
        cfg = shapes("DATALOADER.ASPECT_RATIO_GROUPING", grouping, "DATALOADER.NUM_WORKERS", workers)
        assert take(cfg, 7) == expected
    assert take(shapes("DATALOADER.ASPECT_RATIO_GROUPING", grouping, "SEED", 6), 7) != expected


@pytest.mark.parametrize(
    "sampler", ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]
)
def test_resume_continues_the_stream_without_reading_the_past(shapes, sampler):
    cfg = shapes("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.9)
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.7  # Detectron2 reads it, but has no default for it
    whole = take(cfg, 8)
    assert take(cfg, 3, start_iteration=5) == whole[5:]
    read = []
    loader = build_train_loader(cfg, start_iteration=1000, mapper=lambda r: read.append(r["image_id"]) or r)
    next(iter(loader))
    assert len(read) == 2


def test_order_is_that_of_the_sampler(shapes):
    cfg = shapes("DATALOADER.ASPECT_RATIO_GROUPING", False)
    got = [s["image_id"] for batch in islice(build_train_loader(cfg, mapper=dict), 10) for s in batch]
    assert got == [index + 1 for index in islice(TrainingSampler(9, seed=5), 20)]  # image ids start at 1


def test_ranks_share_one_stream(shapes, monkeypatch):
    """Two ranks with 1 image each read together what one rank with 2 reads, augmented the same way."""
    cfg = shapes("DATALOADER.ASPECT_RATIO_GROUPING", False)
    alone = take(cfg, 4)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(cfg, 4))
    assert [[a[0], b[0]] for a, b in zip(*parts)] == alone


def test_groups_hold_one_kind_of_shape(shapes):
    batches = list(islice(build_train_loader(shapes(), mapper=dict), 20))
    kinds = [{s["width"] > s["height"] for s in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds) and set().union(*kinds) == {True, False}


def test_loading_leaves_the_generators_alone(shapes):
    cfg = shapes()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    take(cfg, 2)
    assert draws() == expected


class FailsFor:
    """A mapper to which one image is broken; picklable."""

    def __init__(self, image_id, result=None):
        self.image_id, self.result = image_id, result

    def __call__(self, record):
        if record["image_id"] == self.image_id:
            if self.result == "raise":
                raise OSError("truncated")
            return None
        return record["image_id"], np.random.random_sample()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_an_error_that_names_it(shapes, workers):
    loader = build_train_loader(shapes("DATALOADER.NUM_WORKERS", workers), mapper=FailsFor(4, "raise"))
    with pytest.raises(
        SampleError, match=r"image 4, .*000003.jpg, failed at position .* OSError: truncated.*SKIP_BAD"
    ):
        list(islice(loader, 9))


def test_bad_sample_is_replaced_counted_and_logged(shapes, caplog):
    found = []
    for workers in (0, 2):
        cfg = shapes("DATALOADER.NUM_WORKERS", workers, "DATASETS.SKIP_BAD", True)
        loader = build_train_loader(cfg, mapper=FailsFor(4, "raise"))
        found.append((list(islice(loader, 18)), loader.replaced))
    assert found[0] == found[1]
    batches, replaced = found[0]
    assert replaced >= 3 and all(image_id != 4 for batch in batches for image_id, _ in batch)
    assert caplog.text.count("000003.jpg") == 2 * replaced and f"{replaced} so far" in caplog.text


def test_mapper_may_give_up_a_sample(shapes):
    loader = build_train_loader(shapes(), mapper=FailsFor(4))
    assert all(image_id != 4 for batch in islice(loader, 18) for image_id, _ in batch)
    assert loader.replaced == 0


def test_nothing_but_bad_samples_ends(shapes):
    loader = build_train_loader(shapes(), mapper=lambda record: None)
    with pytest.raises(SampleError, match="the mapper returned None"):
        next(iter(loader))


def test_a_cause_that_all_images_share_is_said_once(shapes):
    def fail(record):
        raise ValueError("no such format")

    loader = build_train_loader(shapes("DATASETS.SKIP_BAD", True), mapper=fail)
    with pytest.raises(SampleError, match="after 20 redraws: image .*jpg, failed") as caught:
        next(iter(loader))
    assert str(caught.value).count("no such format") == 1


def test_bad_settings(shapes):
    with pytest.raises(ValueError, match="SEED is negative"):
        build_train_loader(shapes("SEED", -1))
    with pytest.raises(ValueError, match="SAMPLER_TRAIN is 'Shuffle'; choose TrainingSampler"):
        build_train_loader(shapes("DATALOADER.SAMPLER_TRAIN", "Shuffle"))
    with pytest.raises(ValueError, match="RepeatFactorTrainingSampler, which .* this data has no objects"):
        cfg = shapes(
            "DATALOADER.SAMPLER_TRAIN",
            "RepeatFactorTrainingSampler",
            "DATALOADER.ASPECT_RATIO_GROUPING",
            False,
        )
        build_train_loader(cfg, dataset=[{"file_name": "street.jpg", "sem_seg_file_name": "street.png"}])
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 0"):
        build_train_loader(shapes("SOLVER.IMS_PER_BATCH", 0))


def test_test_loader_is_in_order_and_resizes_only(shapes):
    cfg = shapes()
    batches = list(build_test_loader(cfg, "val_test_loader"))
    assert [[sample["image_id"] for sample in batch] for batch in batches] == [[1], [2], [3], [4]]
    assert all(max(batch[0]["image"].shape[1:]) == 64 and "instances" not in batch[0] for batch in batches)
    assert [b[0]["image_id"] for b in build_test_loader(cfg, "val_test_loader", indices=[3, 1])] == [4, 2]


def test_views_are_a_function_of_image_and_view(shapes):
    """9 images, 2 views: passes 0 and 2 augment alike, pass 1 otherwise; SEED changes the order alone."""

    def by_pass(*pairs):
        options = ("DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 3, *pairs)
        samples = [sample for batch in take(shapes(*options), 9) for sample in batch]
        return [sorted(samples[start : start + 9]) for start in (0, 9, 18)]

    views = ("MODEL.FROZEN.CACHE.VIEWS", 2)
    first, second, third = by_pass(*views)
    assert first == third
    assert [a[0] for a in first] == [b[0] for b in second] and all(
        a[1] != b[1] for a, b in zip(first, second)
    )
    assert by_pass(*views, "SEED", 77) == [first, second, third]
    assert by_pass(*views, "DATALOADER.NUM_WORKERS", 2) == [first, second, third]
    assert by_pass(*views, "MODEL.FROZEN.CACHE.SEED", 1)[0] != first
    assert by_pass()[0] != by_pass()[2]
    # The views of an image do not change when others are left out.
    few = by_pass(*views, "DATASETS.SUBSET.PERCENT", 40.0)
    assert {sample[0] for part in few for sample in part} < {sample[0] for sample in first}
    assert {s[1] for part in few for s in part} <= {s[1] for part in (first, second) for s in part}


def test_fast_reading_changes_pixels_a_little_and_nothing_else(shapes):
    exact, fast = (
        [
            sample
            for batch in islice(build_train_loader(shapes("INPUT.FAST_READING", on)), 6)
            for sample in batch
        ]
        for on in (False, True)
    )
    for a, b in zip(exact, fast):
        assert a.keys() == b.keys() and a["file_name"] == b["file_name"]
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert a["image"].shape == b["image"].shape
        assert (a["image"].float() - b["image"].float()).abs().mean() < 4


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_file_server_that_is_away_for_a_moment_costs_no_run(code: int, monkeypatch, caplog) -> None:
    """And changes nothing: the sample is drawn as it would have been."""
    waits: list[float] = []
    monkeypatch.setattr("d2_frozen.data.loader.time", SimpleNamespace(sleep=waits.append))

    def mapper(record: dict) -> float:
        draw = random.random()
        if len(waits) < 2:
            try:
                raise OSError(code, "server away", record["file_name"])
            except OSError as err:
                raise OSError(f"cannot read the image {record['file_name']}") from err
        return draw

    records = [{"file_name": "a.jpg", "image_id": 1}]
    sample = DrawnDataset(records, mapper, seed=3, skip_bad=False)[Place(0, 0)].sample
    assert waits == [1, 5] and "a.jpg: cannot read the image a.jpg. Tried again in 1 s." in caplog.text
    assert sample == DrawnDataset(records, mapper, seed=3, skip_bad=False)[Place(0, 0)].sample
    assert len(waits) == 2


def test_a_file_server_that_stays_away_and_a_bad_file_are_errors(monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("d2_frozen.data.loader.time", SimpleNamespace(sleep=waits.append))
    records = [{"file_name": "a.jpg", "image_id": 1}]

    def fails(err: Exception) -> str:
        def mapper(record: dict) -> None:
            raise err

        return DrawnDataset(records, mapper, seed=3, skip_bad=False)[Place(0, 0)].error

    assert "Input/output error" in fails(OSError(errno.EIO, "Input/output error")) and waits == [1, 5, 20]
    assert "truncated" in fails(OSError("image file is truncated")) and len(waits) == 3
    assert "gone" in fails(FileNotFoundError(errno.ENOENT, "gone")) and len(waits) == 3


def test_workers_that_are_killed_begin_anew_and_the_batches_are_the_same(shapes, caplog, monkeypatch):
    """By a system that is short of memory, say: the run ended in the middle of a step."""
    cfg = shapes("DATALOADER.NUM_WORKERS", 2)
    expected = [[one["file_name"] for one in batch] for batch in islice(build_train_loader(cfg), 12)]
    batches = iter(build_train_loader(cfg))
    found = [next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    found += islice(batches, 11)
    assert [[one["file_name"] for one in batch] for batch in found] == expected
    assert caplog.text.count("Workers begin anew") == 1 and "DATALOADER.NUM_WORKERS" in caplog.text
    monkeypatch.setattr("d2_frozen.data.loader._LOSSES", 0)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="2 times now.*too little memory.*NUM_WORKERS"):
        list(islice(batches, 12))
