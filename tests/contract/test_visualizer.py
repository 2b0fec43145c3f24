"""Drawing: where colour ends up, not how it looks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.colormap import colormap, random_color, random_colors
from detectron2.utils.visualizer import ColorMode, GenericMask, Visualizer, _create_text_labels

H, W = 120, 160
GREY = np.full((H, W, 3), 128, np.uint8)


def changed(visualizer: Visualizer) -> np.ndarray:
    """(H, W) bool: pixels that differ clearly from the grey image."""
    return (np.abs(visualizer.get_output().get_image()[:, :, :3].astype(int) - 128) > 8).any(axis=2)


def instances() -> Instances:
    found = Instances((H, W))
    found.pred_boxes = Boxes(torch.tensor([[20.0, 30, 90, 100]]))
    found.scores = torch.tensor([0.98])
    found.pred_classes = torch.tensor([1])
    found.pred_masks = torch.zeros(1, H, W, dtype=torch.bool)
    found.pred_masks[0, 50:90, 40:80] = True
    return found


def metadata():
    meta = MetadataCatalog.get("visualizer_test")
    meta.thing_classes = ["nut", "bolt"]
    meta.stuff_classes = ["wall", "floor"]
    return meta


def test_an_instance_is_drawn_where_it_is():
    visualizer = Visualizer(GREY.copy(), metadata())
    output = visualizer.draw_instance_predictions(instances())
    assert output.get_image().dtype == np.uint8 and output.get_image().shape == (H, W, 3)
    where = changed(visualizer)
    assert where[55:85, 45:75].all()  # the mask is filled
    assert where[65, 18:23].any() and where[65, 87:93].any()  # sides of the box
    assert not where[105:, :].any() and not where[:, 100:].any()  # nothing far from it


def test_nothing_is_drawn_for_no_instances():
    visualizer = Visualizer(GREY.copy(), metadata())
    visualizer.draw_instance_predictions(instances()[torch.zeros(1, dtype=torch.bool)])
    assert not changed(visualizer).any()


def test_scale_enlarges_the_output():
    visualizer = Visualizer(GREY.copy(), metadata(), scale=2.0)
    image = visualizer.draw_instance_predictions(instances()).get_image()
    assert image.shape == (2 * H, 2 * W, 3)
    assert (np.abs(image[110:170, 90:150].astype(int) - 128) > 8).any(axis=2).all()


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.7, 1.1, 1.25])
def test_a_scaled_output_has_the_size_that_a_video_writer_is_opened_for(scale):
    """cv2.VideoWriter leaves out frames of another size than (int(W * scale), int(H * scale)), silently."""
    image = Visualizer(np.zeros((427, 641, 3), np.uint8), scale=scale).get_output().get_image()
    assert image.shape[:2] == (int(427 * scale), int(641 * scale))
    tenth_more = Visualizer(np.zeros((100, 100, 3), np.uint8), scale=1.1).get_output().get_image()
    assert tenth_more.shape[:2] == (110, 110)


def test_a_subclass_keeps_the_colour_of_a_category():
    class OneColour(Visualizer):
        def _jitter(self, color):
            return color

    meta = MetadataCatalog.get("visualizer_test_colours")
    meta.set(thing_classes=["nut", "bolt"], thing_colors=[(255, 0, 0), (0, 0, 255)])
    visualizer = OneColour(GREY.copy(), meta, instance_mode=ColorMode.SEGMENTATION)
    drawn = visualizer.draw_instance_predictions(instances()).get_image().astype(int)
    assert drawn[85, 60, 2] > 180 and drawn[85, 60, 0] < 60  # 0.8 of blue over grey


def test_bw_mode_keeps_colour_inside_masks_only():
    image = np.zeros((H, W, 3), np.uint8)
    image[:] = (200, 100, 0)
    visualizer = Visualizer(image, metadata(), instance_mode=ColorMode.IMAGE_BW)
    drawn = visualizer.draw_instance_predictions(instances()).get_image().astype(int)
    assert np.ptp(drawn[115, 150]) <= 2  # grey
    assert np.ptp(drawn[80, 60]) > 20


def test_dataset_dict():
    record = {
        "annotations": [
            {
                "bbox": [20, 30, 70, 70],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [[30, 50, 80, 50, 80, 90, 30, 90]],
            }
        ]
    }
    visualizer = Visualizer(GREY.copy(), metadata())
    visualizer.draw_dataset_dict(record)
    where = changed(visualizer)
    assert where[55:85, 35:75].all() and not where[:, 110:].any()


def test_sem_seg_leaves_out_the_ignored():
    labels = np.full((H, W), 255)
    labels[:, :80] = 1
    visualizer = Visualizer(GREY.copy(), metadata())
    visualizer.draw_sem_seg(torch.from_numpy(labels), alpha=0.9)
    where = changed(visualizer)
    assert where[:, 5:75].mean() > 0.95 and not where[:, 120:].any()


def test_sem_seg_without_text_is_its_colours_alone():
    labels = torch.zeros(H, W, dtype=torch.int64)
    bare = Visualizer(GREY.copy(), metadata()).draw_sem_seg(labels, draw_text=False).get_image()
    written = Visualizer(GREY.copy(), metadata()).draw_sem_seg(labels).get_image()
    inner = np.s_[10:-10, 10:-10]
    assert np.ptp(bare[inner].reshape(-1, 3), axis=0).max() <= 2
    assert np.ptp(written[inner].reshape(-1, 3), axis=0).max() > 60


def test_fonts_grow_on_demand():
    sizes = [Visualizer(GREY.copy(), font_size_scale=scale)._default_font_size for scale in (1.0, 2.0)]
    assert sizes[1] == 2 * sizes[0]


def test_small_parts_are_left_out():
    mask = np.zeros((H, W), np.uint8)
    mask[10:20, 10:20] = 1
    mask[60:62, 60:62] = 1
    visualizer = Visualizer(GREY.copy())
    visualizer.draw_binary_mask(mask, color="r", area_threshold=50)
    where = changed(visualizer)
    assert where[12:18, 12:18].all() and not where[55:70, 55:70].any()


def test_a_mask_with_holes_is_filled_without_an_edge():
    """Scaled up, every picture row has the background and one mixture of colour and background."""
    picture = np.zeros((40, 40, 3), np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 10:30] = 1
    mask[15:20, 15:20] = 0
    drawn = Visualizer(picture, scale=3).draw_binary_mask(mask, color="blue").get_image()
    for row in (0, 50, -1):
        assert len(np.unique(drawn[row], axis=0)) == 2


def test_single_shapes():
    visualizer = Visualizer(GREY.copy())
    visualizer.draw_box([10, 10, 50, 40], edge_color="r")
    visualizer.draw_polygon(np.array([[100, 50], [140, 50], [120, 90]]), (0.0, 0.0, 1.0), alpha=1.0)
    image = visualizer.get_output().get_image()
    assert image[60, 120, 2] > 200 and image[60, 120, 0] < 60
    assert (image[8:13, 30, 0].astype(int) - image[8:13, 30, 1] > 60).any()  # red
    before = changed(visualizer).sum()
    visualizer.draw_text("Schraube", (80, 100), color="w")
    assert changed(visualizer).sum() > before


@pytest.mark.parametrize("color", ["tab:blue", "C0", "royalblue", "#1f77b4", "b"])
def test_colours_have_the_names_of_matplotlib(color):
    drawn = Visualizer(GREY.copy()).draw_polygon([(20, 20), (60, 20), (60, 60), (20, 60)], color, alpha=1.0)
    red, _, blue = drawn.get_image()[40, 40].astype(int)
    assert blue > red + 80


@pytest.mark.parametrize("style", ["-", "--", ":", "-."])
def test_line_styles(style):
    visualizer = Visualizer(GREY.copy())
    visualizer.draw_line([10, 150], [60, 60], "r", linestyle=style, linewidth=2)
    image = visualizer.get_output().get_image()[57:64, 12:148].astype(int)
    share = (np.abs(image - 128).max(axis=(0, 2)) > 40).mean()
    assert share == 1 if style == "-" else 0.2 < share < 0.95


def test_text_of_two_lines_is_higher_than_of_one():
    heights = []
    for text in ("nut", "nut\nbolt"):
        visualizer = Visualizer(GREY.copy())
        visualizer.draw_text(text, (80, 20))
        heights.append(changed(visualizer).any(axis=1).sum())
    assert heights[1] > 1.5 * heights[0]


def test_save(tmp_path: Path):
    visualizer = Visualizer(GREY.copy(), metadata())
    output = visualizer.draw_instance_predictions(instances())
    output.save(str(tmp_path / "picture.png"))
    read = cv2.imread(str(tmp_path / "picture.png"))[:, :, ::-1]
    assert np.abs(read.astype(int) - output.get_image()[:, :, :3].astype(int)).max() <= 1


def test_generic_mask():
    mask = GenericMask([[10, 10, 30, 10, 30, 20, 10, 20]], H, W)
    assert mask.area() == 200 and mask.bbox() == pytest.approx([10, 10, 30, 20], abs=1)
    ring = np.zeros((H, W), np.uint8)
    ring[10:40, 10:40] = 1
    ring[20:30, 20:30] = 0
    assert GenericMask(ring, H, W).has_holes


def test_generic_mask_turns_masks_into_polygons_and_back():
    square = np.zeros((H, W), np.uint8)
    square[10:21, 10:31] = 1
    mask = GenericMask(square, H, W)
    polygons, has_holes = mask.mask_to_polygons(square)
    assert not has_holes and len(polygons) == 1
    corners = polygons[0].reshape(-1, 2)  # through the centres of the pixels at the edge
    assert corners.min(axis=0).tolist() == [10.5, 10.5] and corners.max(axis=0).tolist() == [30.5, 20.5]
    again = mask.polygons_to_mask([np.array([10.0, 10, 31, 10, 31, 21, 10, 21])])
    assert (again == square).all()
    given = [10.25, 10, 30, 10, 30, 20]
    assert GenericMask([given], H, W).polygons[0].tolist() == given


def test_texts_of_instances():
    texts = _create_text_labels([0, 1], [0.5, 0.123], ["nut", "bolt"], is_crowd=[0, 1])
    assert texts == ["nut 50%", "bolt 12%|crowd"]
    assert _create_text_labels([0], None, None) == ["0"]
    assert _create_text_labels(None, [0.2], ["nut"]) == ["20%"]


def test_colours():
    palette = colormap(rgb=True)
    assert palette.shape[1] == 3 and palette.min() >= 0 and palette.max() <= 255
    assert np.allclose(colormap()[:, ::-1], palette)
    assert len(np.unique(palette.round(), axis=0)) > 60
    assert random_color(rgb=True, maximum=1).max() <= 1
    assert len({tuple(c) for c in random_colors(10)}) == 10
