"""What is an example of a feature map, and which of them are compared with which."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.study.cka.collect import GramCollector
from d2_frozen.study.cka.estimator import IMAGE, gram_of_rows
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes


class Pyramid(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"p2": x, "p3": x[:, :, ::2, ::2]}


class Windows(nn.Module):
    """Four windows per image, in the order of images."""

    def forward(self, x: Tensor) -> Tensor:
        B = len(x)
        return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(B * 4, -1)


class Head(nn.Module):
    """Works on three RoIs at a time, as mask heads do on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * 2 * 2, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.relu(self.layer(part)) for part in x.flatten(1).split(3)])


class Model(nn.Module):
    """Maps of 8 x 8 cells; boxes come with the input; two stages on them, then other boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid, self.windows = Pyramid(), Windows()
        self.table = nn.Identity()
        self.box_pooler = ROIPooler(2, (1.0,), 1, "ROIAlignV2")
        self.mask_pooler = ROIPooler(2, (1.0,), 1, "ROIAlignV2")
        self.head, self.mask_head = Head(), Head()

    def forward(self, batch: list[dict]) -> list[dict]:
        maps = self.pyramid(torch.stack([one["image"] for one in batch]))
        self.windows(maps["p2"])
        self.table(torch.zeros(7, 3))
        boxes = [Boxes(one["boxes"]) for one in batch]
        for shift in (0, 1):
            moved = [Boxes(one.tensor + shift) for one in boxes]
            self.head(self.box_pooler([maps["p2"]], moved))
        self.mask_head(self.mask_pooler([maps["p2"]], [Boxes(one.tensor / 2) for one in boxes]))
        return [{} for _ in batch]


def batch(counts: tuple[int, ...] = (2, 3, 1, 4)) -> list[dict]:
    corners = [torch.rand(n, 2) * 3 for n in counts]
    return [
        {"image": torch.randn(2, 8, 8), "boxes": torch.cat([corner, corner + 4], dim=1)} for corner in corners
    ]


def anything(_: str) -> bool:
    return True


def test_an_image_is_its_flattened_map_and_all_its_windows() -> None:
    images = batch()
    with GramCollector(Model(), anything) as collector:
        grams = collector.grams(images)
    flat = torch.stack([one["image"] for one in images]).flatten(1)
    for name in ("pyramid[p2]", "windows:input", "windows"):
        torch.testing.assert_close(grams[name].matrix, gram_of_rows(flat), rtol=1e-6, atol=1e-6)
        assert grams[name].kind == IMAGE
    coarse = torch.stack([one["image"][:, ::2, ::2] for one in images]).flatten(1)
    torch.testing.assert_close(grams["pyramid[p3]"].matrix, gram_of_rows(coarse))
    assert "table" not in grams  # 7 rows are no rows of 4 images


def test_an_roi_is_a_row_whatever_number_of_them_a_head_takes_at_a_time() -> None:
    model = Model()
    with GramCollector(model, anything) as collector:
        grams = collector.grams(batch())
    assert len(grams["head"].matrix) == 10
    assert grams["head"].image_of.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3]
    # layer's output is changed in place by relu after it was taken
    assert (grams["head.layer"].matrix - grams["head.relu"].matrix).abs().max() > 1e-3
    torch.testing.assert_close(grams["head.relu"].matrix, grams["head"].matrix)
    assert collector.seen["head.layer"] == ((10, 5), "RoI")
    assert {"head", "head#1", "head.layer#1", "box_pooler#1"} <= set(grams)
    assert "head#2" not in grams and "head.layer#2" not in grams


def test_stages_have_the_same_examples_and_other_boxes_have_others() -> None:
    with GramCollector(Model(), anything) as collector:
        grams = collector.grams(batch())
    assert grams["head"].kind == grams["head#1"].kind == grams["box_pooler"].kind
    assert grams["mask_head"].kind not in (grams["head"].kind, IMAGE)
    with GramCollector(Model(), anything) as other:
        assert other.grams(batch())["head"].kind != grams["head"].kind


def test_a_second_map_cropped_at_the_same_boxes_has_the_same_examples() -> None:
    class WithSemanticMap(Model):
        def forward(self, batch: list[dict]) -> list[dict]:
            x = torch.stack([one["image"] for one in batch])
            boxes = [Boxes(one["boxes"]) for one in batch]
            self.head(
                self.box_pooler([x], boxes) + self.mask_pooler([x], [Boxes(b.tensor.clone()) for b in boxes])
            )
            return [{} for _ in batch]

    with GramCollector(WithSemanticMap(), anything) as collector:
        grams = collector.grams(batch())
    assert grams["box_pooler"].kind == grams["mask_pooler"].kind == grams["head"].kind


def test_some_rois_of_an_image_are_drawn_the_same_for_all_stages() -> None:
    images = batch((9, 30, 1, 0))
    with GramCollector(Model(), anything, rois=5, seed=2) as collector:
        first, again = collector.grams(images, number=1), collector.grams(images, number=1)
        later = collector.grams(images, number=2)
    assert first["head"].image_of.tolist() == [0] * 5 + [1] * 5 + [2]
    assert torch.equal(first["head"].matrix, again["head"].matrix)
    assert not torch.equal(first["head"].matrix, later["head"].matrix)
    whole = {}
    with GramCollector(Model(), anything, rois=100) as collector:
        whole = collector.grams(images)
    # Each drawn one is one of the whole, up to the order of summation, which follows the size of the matrix.
    apart = first["box_pooler"].matrix.diagonal()[:, None] - whole["box_pooler"].matrix.diagonal()
    assert apart.abs().amin(dim=1).max() < 1e-9


def test_images_without_rois_leave_empty_matrices() -> None:
    with GramCollector(Model(), anything) as collector:
        grams = collector.grams(batch((0, 0, 0, 0)))
    assert grams["head"].matrix.shape == (0, 0)


class Clips(nn.Module):
    """A backbone of frames, a block that changes clips in place."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.block = nn.Linear(6, 4), nn.ReLU(inplace=True)

    def forward(self, batch: list[dict]) -> list[dict]:
        for one in batch:
            frames = one["video"].flatten(0, 1)  # (1 view, T, 6)
            self.block(self.backbone(frames).unflatten(0, (1, -1)))
        return [{} for _ in batch]


def test_a_clip_is_all_its_frames() -> None:
    model = Clips()
    clips = [{"video": torch.randn(1, 3, 6)} for _ in range(5)]
    with GramCollector(model, anything) as collector:
        grams = collector.grams(clips)
    flat = torch.stack([model.backbone(one["video"][0]).flatten() for one in clips]).detach()
    torch.testing.assert_close(grams["backbone"].matrix, gram_of_rows(flat))
    torch.testing.assert_close(grams["block"].matrix, gram_of_rows(flat.relu()))
    assert grams["block"].image_of.tolist() == [0, 1, 2, 3, 4]


def test_maps_are_not_kept_and_hooks_are_removed() -> None:
    alive: list[weakref.ref] = []

    class Watched(Pyramid):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            maps = {name: value.clone() for name, value in super().forward(x).items()}
            alive.extend(weakref.ref(value) for value in maps.values())
            return maps

    model = Model()
    model.pyramid = Watched()
    with GramCollector(model, anything) as collector:
        for number in range(3):
            collector.grams(batch(), number)
            gc.collect()
            assert len(alive) == 2 * (number + 1) and not any(ref() is not None for ref in alive)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Net(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res2": self.conv(x)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=4, stride=1)}


def test_modules_inside_a_frozen_backbone_are_seen() -> None:
    class Segmentor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = FrozenBackbone(Net())

        def forward(self, batch: list[dict]) -> None:
            self.backbone(torch.stack([one["image"] for one in batch]))

    model = Segmentor()
    images = [{"image": torch.randn(3, 4, 4)} for _ in range(4)]
    with GramCollector(model, anything) as collector:
        grams = collector.grams(images)
    torch.testing.assert_close(grams["backbone.conv"].matrix, grams["backbone[res2]"].matrix)
    assert "forward" not in vars(model.backbone)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    model, images = Model(), batch((9, 30, 1, 2))
    with GramCollector(model, anything, rois=5) as collector:
        here = collector.grams(images)
    model.cuda()
    with GramCollector(model, anything, rois=5) as collector:
        there = collector.grams([{key: value.cuda() for key, value in one.items()} for one in images])
    assert here.keys() == there.keys()
    for name, gram in here.items():
        assert there[name].matrix.device.type == "cpu"
        torch.testing.assert_close(there[name].matrix, gram.matrix, rtol=1e-2, atol=1e-2)  # TF32
