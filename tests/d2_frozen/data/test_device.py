"""The way of batches to a GPU: what is moved, in which order, and that nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from d2_frozen.data import build_train_loader, device, prepare_datasets
from d2_frozen.data.device import Pinnable, makes_batches_here, on_device, one_ahead, with_tensors
from d2_frozen.data.loader import Drawn
from d2_frozen.data.shapes import generate
from detectron2.data import build_detection_train_loader
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks


def sample() -> dict:
    """One image with two objects that have everything an object may have."""
    objects = Instances((4, 6))
    objects.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 4.0]]))
    objects.gt_classes = torch.tensor([3, 1])
    objects.gt_bits = BitMasks(torch.eye(4, 6).bool().expand(2, 4, 6).contiguous())
    objects.gt_keypoints = Keypoints(torch.arange(12.0).view(2, 2, 3))
    objects.gt_masks = PolygonMasks([[np.array([0.0, 0, 2, 0, 2, 2])], [np.array([1.0, 1, 3, 1, 3, 4])]])
    return {
        "file_name": "a.jpg",
        "height": 4,
        "image": torch.arange(72, dtype=torch.uint8).view(3, 4, 6),
        "sem_seg": torch.zeros(4, 6, dtype=torch.int64),
        "features": {"res5": torch.ones(1, 2, 3, 3)},
        "frame_indices": [[0, 4]],
        "instances": objects,
    }


def test_every_tensor_is_changed_and_nothing_else() -> None:
    given, seen = sample(), []
    got = with_tensors(given, lambda tensor: (seen.append(tensor), tensor.clone())[1])
    # image, sem_seg, the map, boxes, classes, bit masks, keypoints
    assert len(seen) == 7
    assert got.keys() == given.keys()
    for key in ("image", "sem_seg"):
        assert torch.equal(got[key], given[key]) and got[key] is not given[key]
    assert torch.equal(got["features"]["res5"], given["features"]["res5"])
    assert got["file_name"] is given["file_name"] and got["frame_indices"] is given["frame_indices"]
    before, after = given["instances"], got["instances"]
    assert after.image_size == (4, 6) and list(after.get_fields()) == list(before.get_fields())
    for name in ("gt_boxes", "gt_bits", "gt_keypoints"):
        one, other = before.get(name), after.get(name)
        assert type(one) is type(other) and torch.equal(one.tensor, other.tensor)
        assert one.tensor is not other.tensor
    assert torch.equal(after.gt_classes, before.gt_classes)
    assert after.gt_masks is before.gt_masks


def test_keys_may_be_left_out() -> None:
    given = sample()
    got = with_tensors(given, torch.clone, leave=("instances",))
    assert got["instances"] is given["instances"] and got["image"] is not given["image"]


def test_pixels_that_take_no_memory_still_take_none() -> None:
    """The image of a sample whose features are stored is one zero, shown as many."""
    seen = []
    image = torch.zeros((), dtype=torch.uint8).expand(3, 500, 700)
    got = with_tensors(image, lambda tensor: (seen.append(tensor.numel()), tensor.clone())[1])
    assert seen == [1] and got.shape == image.shape and got.stride() == (0, 0, 0)


def test_a_batch_of_the_loader_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with copies in place of pinned memory, which only a machine with a GPU has."""
    monkeypatch.setattr(device, "_pinned", torch.clone)
    drawn = [Drawn(sample()), Drawn(error="no sample")]
    pinned = Pinnable(drawn).pin_memory().drawn
    assert pinned[1] == drawn[1]
    assert pinned[0].sample["image"] is not drawn[0].sample["image"]
    boxes = [one[0].sample["instances"].gt_boxes.tensor for one in (drawn, pinned)]
    assert torch.equal(*boxes) and boxes[0] is not boxes[1]


def test_one_ahead_and_no_more() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for k in range(5):
            taken.append(k)
            yield k

    here = threading.get_ident()
    results = one_ahead(items(), lambda k: (10 * k, threading.get_ident()))
    for k in range(5):
        value, thread = next(results)
        assert value == 10 * k and thread != here
        assert len(taken) == min(k + 2, 5)
    assert next(results, "end") == "end"


@pytest.mark.parametrize("where", ["loader", "work"])
def test_errors_come_in_their_turn(where: str) -> None:
    """The third item fails: two are given before, whoever fails."""

    def items() -> Iterator[int]:
        yield from (0, 1)
        if where == "loader":
            raise OSError("broken image")
        yield from (2, 3)

    def work(k: int) -> int:
        if k == 2:
            raise OSError("broken image")
        return k

    results = one_ahead(items(), work)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="broken image"):
        next(results)


@pytest.fixture
def shapes(tmp_path_factory, make_cfg):
    """``shapes("KEY", value, ...)``: 9 pictures of 80 px, batches of 2."""
    root = tmp_path_factory.getbasetemp() / "device_world"
    generate(root, train=9, val=0, seed=2, size=80)
    entry = {"name": "device_train", "type": "coco_instances"}
    entry |= {"json": f"{root}/train.json", "images": f"{root}/train"}

    def make(*pairs):
        cfg = make_cfg([entry], "SOLVER.IMS_PER_BATCH", 2, "INPUT.AUGMENTATION", "scale_crop",
                       "INPUT.SCALE_CROP.SIZE", 64, *pairs)  # fmt: skip
        prepare_datasets(cfg)
        return cfg

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_where_batches_are_made_is_seen_through_wrappers(shapes, workers: int) -> None:
    here = workers == 0
    cfg = shapes("DATALOADER.NUM_WORKERS", workers)
    assert makes_batches_here(build_train_loader(cfg)) == here
    for grouping in (True, False):
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
        assert makes_batches_here(build_detection_train_loader(cfg, mapper=dict)) == here
    assert makes_batches_here(DataLoader([1, 2], num_workers=workers)) == here
    assert makes_batches_here([1, 2])  # a list, a generator: nothing is known of workers


def test_on_a_cpu_batches_stay_what_they_are() -> None:
    batches = [[sample()]]
    assert on_device(batches, "cpu") is batches


def plain(batches) -> list:
    """Batches as comparable values."""
    return [
        [
            (
                one["file_name"],
                one["image"].cpu().tolist(),
                one["instances"].gt_boxes.tensor.cpu().tolist(),
                one["instances"].gt_classes.cpu().tolist(),
                [[p.tolist() for p in polygons] for polygons in one["instances"].gt_masks.polygons],
            )
            for one in batch
        ]
        for batch in batches
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu_batches_are_those_of_the_cpu(shapes, workers: int) -> None:
    expected = plain(islice(build_train_loader(shapes("MODEL.DEVICE", "cpu")), 6))
    cfg = shapes("MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", workers)
    loader = build_train_loader(cfg, start_iteration=2)
    if workers:
        assert next(iter(loader))[0]["image"].is_pinned()
    there = list(islice(on_device(loader, "cuda"), 4))
    assert all(one["image"].is_cuda and one["instances"].gt_boxes.tensor.is_cuda for b in there for one in b)
    assert plain(there) == expected[2:]
    left = next(iter(on_device(loader, "cuda", leave=("instances",))))
    assert left[0]["image"].is_cuda and not left[0]["instances"].gt_boxes.tensor.is_cuda
    # Detectron2's own loader, which knows nothing of it.
    foreign = on_device(build_detection_train_loader(cfg), "cuda")
    assert all(one["instances"].gt_classes.is_cuda for one in next(iter(foreign)))
