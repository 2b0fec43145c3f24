"""Training samples are those of Detectron2's mapper for the same draws, however their pixels were made."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from d2_frozen.data.cached_mapper import FrozenDatasetMapper
from d2_frozen.data.draws import seeded
from d2_frozen.data.label_maps import LabelMapError
from d2_frozen.data.label_values import LABEL_VALUES
from d2_frozen.data.transforms import SquareCrop
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode


class Doubled(T.Augmentation):
    """An augmentation whose transform is a subclass that makes another size than its base says."""

    class Twice(T.NoOpTransform):
        def apply_image(self, image):
            return image.repeat(2, axis=0).repeat(2, axis=1)

        def apply_segmentation(self, labels):
            return labels.repeat(2, axis=0).repeat(2, axis=1)

        def apply_coords(self, coords):
            return coords * 2

    def get_transform(self, image):
        return self.Twice()


SCALE_CROP = [T.ResizeScale(0.1, 2.0, 64, 64), SquareCrop(64), T.RandomFlip()]
CROP_FIRST = [T.RandomCrop("relative_range", (0.4, 0.4)), T.ResizeShortestEdge((40, 70), 90, "range")]
LOOKS_AT_PIXELS = [T.ResizeShortestEdge((40, 70), 90, "range"), T.RandomSaturation(0.5, 1.5), T.RandomFlip()]
OTHER_SIZE = [T.RandomFlip(), Doubled(), T.RandomCrop("absolute", (50, 50))]


@pytest.fixture
def record(tmp_path) -> dict:
    random = np.random.RandomState(0)
    Image.fromarray(random.randint(0, 256, (60, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(random.randint(0, 4, (60, 90), dtype=np.uint8)).save(tmp_path / "labels.png")
    polygon = [10.0, 10.0, 70.0, 15.0, 60.0, 50.0, 20.0, 45.0]
    annotation = {"bbox": [10.0, 10.0, 70.0, 50.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2}
    return {
        "file_name": str(tmp_path / "a.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": 60,
        "width": 90,
        "image_id": 1,
        "annotations": [{**annotation, "segmentation": [polygon], "iscrowd": 0}],
    }


def test_padding_belongs_to_no_mask_whatever_label_maps_get_there(record: dict) -> None:
    """An image of 90 x 60 in a square of 100: the left upper quarter of it is an RLE mask; 255 is padded to labels."""
    quarter = np.zeros((60, 90), np.uint8, order="F")
    quarter[:30, :45] = 1
    rle = mask_util.encode(quarter)
    record["annotations"][0] |= {"segmentation": rle, "bbox": [0.0, 0.0, 45.0, 30.0]}
    mapper = FrozenDatasetMapper(
        True,
        augmentations=[SquareCrop(100)],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        recompute_boxes=True,
    )
    sample = mapper(record)
    assert sample["instances"].gt_masks.tensor.sum() == 30 * 45
    assert sample["instances"].gt_boxes.tensor.tolist() == [[0.0, 0.0, 45.0, 30.0]]
    assert (sample["sem_seg"][60:] == 255).all() and (sample["sem_seg"][:, 90:] == 255).all()


def test_label_maps_with_a_palette_give_their_numbers_and_colours_are_refused(record: dict) -> None:
    """Detectron2 takes the brightness of the colours, which is no class."""
    ids = np.asarray(Image.open(record["sem_seg_file_name"]))
    image = Image.fromarray(ids, mode="P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 255, 90, 90, 90])
    image.save(record["sem_seg_file_name"])
    mapper = FrozenDatasetMapper(True, augmentations=[], image_format="RGB")
    assert torch.equal(mapper(record)["sem_seg"], torch.tensor(ids).long())
    image.convert("RGB").save(record["sem_seg_file_name"])
    with pytest.raises(LabelMapError, match=r"colours instead of class ids.*labels.png is RGB"):
        mapper(record)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("augmentations", [SCALE_CROP, CROP_FIRST, LOOKS_AT_PIXELS, OTHER_SIZE, []])
def test_samples_are_detectron2s_bit_for_bit(record: dict, augmentations: list, image_format: str) -> None:
    arguments = {"augmentations": augmentations, "image_format": image_format, "use_instance_mask": True}
    ours, theirs = (kind(True, **arguments) for kind in (FrozenDatasetMapper, DatasetMapper))
    for seed in range(6):
        with seeded(seed):
            one = ours(record)
            drawn = np.random.rand()
        with seeded(seed):
            other = theirs(record)
            assert drawn == np.random.rand()  # as many draws were taken
        assert one.pop(LABEL_VALUES) == one["sem_seg"].unique().tolist()
        assert one.keys() == other.keys()
        for key in ("image", "sem_seg"):
            assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key])
        a, b = one["instances"], other["instances"]
        assert a.image_size == b.image_size and torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
        assert torch.equal(a.gt_classes, b.gt_classes)
        outlines = [[p.tolist() for parts in each.gt_masks.polygons for p in parts] for each in (a, b)]
        assert outlines[0] == outlines[1]
