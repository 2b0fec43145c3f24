"""Drawing annotations and predictions into images.

In: an RGB image and boxes, masks, labels.  Out: :class:`VisImage` (``get_image()``, ``save()``).
Drawn with OpenCV, text with Pillow; nothing here touches the global random generators.
"""

from __future__ import annotations

import colorsys
import functools
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from enum import Enum, unique
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_coding
import torch
from PIL import Image, ImageDraw, ImageFont

from detectron2._outside import outside_message, outside_subset
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.colormap import colormap
from detectron2.utils.file_io import PathManager

__all__ = ["ColorMode", "GenericMask", "VisImage", "Visualizer"]

__getattr__ = outside_subset(__name__, ("VideoVisualizer", "_PanopticPrediction"))

Color = Any  # a name that matplotlib knows ("g", "red", "tab:blue", "#ff8800"), or (r, g, b) in 0..1

# Lengths in line widths: drawn, left out, drawn, ...; the round ends of what is drawn take one more from the gaps.
_LINE_STYLES: dict[str, tuple[float, ...]] = {
    "-": (),
    "--": (6.0, 6.0),
    ":": (1.0, 3.0),
    "-.": (6.0, 3.0, 1.0, 3.0),
}
_LINE_STYLE_NAMES = {"solid": "-", "dashed": "--", "dotted": ":", "dashdot": "-."}
_SUBPIXEL_BITS = 4  # OpenCV takes coordinates as multiples of 1/16 pixel
# Objects below this area (pixels of the original image) get their label beside the box instead of inside.
_SMALL_AREA = 1000
_CROWD_COLOR = (0.8, 0.8, 0.8)
_REGION_EDGE = (1.0, 1.0, 240.0 / 255)


@unique
class ColorMode(Enum):
    """How instances are coloured."""

    IMAGE = 0  # each instance another colour, over the image
    SEGMENTATION = 1  # by category, where the metadata has thing_colors
    IMAGE_BW = 2  # as IMAGE, over a grey image that is coloured where instances are


class VisImage:
    """The picture being drawn.

    Args:
        img: (H, W, 3) RGB, 0..255.
        scale: the picture's size relative to ``img``; coordinates are always those of ``img``.
    """

    def __init__(self, img: np.ndarray, scale: float = 1.0) -> None:
        self.scale = float(scale)
        self.height, self.width = img.shape[:2]
        self.reset_image(img)

    def reset_image(self, img: np.ndarray) -> None:
        """Start over on ``img``, same size as before."""
        self.img = np.ascontiguousarray(np.clip(img, 0, 255).astype(np.uint8))
        # Rounded down, so that a video writer opened for int(scale * side) takes the frames; the little more
        # keeps 1.1 * 100 at 110.
        size = (
            max(1, int(self.width * self.scale + 0.01)),
            max(1, int(self.height * self.scale + 0.01)),
        )
        self.canvas = self.img.copy() if size == (self.width, self.height) else cv2.resize(self.img, size)

    def get_image(self) -> np.ndarray:
        """(scale * H, scale * W, 3) uint8 RGB."""
        return self.canvas

    def save(self, filepath: str) -> None:
        """Write a picture file; the format follows the ending (.png, .jpg, ...).

        Raises:
            ValueError: OpenCV cannot write this format.
        """
        ending = os.path.splitext(filepath)[1]
        try:
            ok, encoded = cv2.imencode(ending, self.canvas[:, :, ::-1])
        except cv2.error as err:
            raise ValueError(f"cannot write a picture as {filepath!r}: unknown format {ending!r}.") from err
        assert ok
        with PathManager.open(filepath, "wb") as handle:
            handle.write(encoded.tobytes())


class GenericMask:
    """One mask, given as polygons, RLE, or array.

    Args:
        mask_or_polygons: list of flat polygons (x0, y0, x1, y1, ...), a COCO RLE dict, or an (H, W) array.
        height, width: of the image, pixels.
    """

    def __init__(self, mask_or_polygons: Any, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._given_polygons: list[np.ndarray] | None = None
        if isinstance(mask_or_polygons, (list, tuple)):
            self._given_polygons = [np.asarray(p, dtype=np.float64).ravel() for p in mask_or_polygons]
        self.mask = self._rasterize(mask_or_polygons)

    def polygons_to_mask(self, polygons: Sequence[Any]) -> np.ndarray:
        """Flat polygons -> (height, width) uint8, 1 inside any of them."""
        return self._rasterize(list(polygons))

    def mask_to_polygons(self, mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
        """The outlines of an (H, W) mask, as :attr:`polygons` has them, and whether it has holes."""
        mask = np.ascontiguousarray(np.asarray(mask).astype(bool).astype(np.uint8))
        return [(c.reshape(-1, 2) + 0.5).ravel() for c in _outlines(mask) if len(c) >= 3], _has_holes(mask)

    def _rasterize(self, given: Any) -> np.ndarray:
        if isinstance(given, dict):
            code = given
            if isinstance(code["counts"], list):
                code = mask_coding.frPyObjects(code, *code["size"])
            mask = mask_coding.decode(code)
        elif isinstance(given, (list, tuple)):
            polygons = [np.asarray(p, dtype=np.float64).ravel().tolist() for p in given]
            polygons = [p for p in polygons if len(p) >= 6]
            if not polygons:
                return np.zeros((self.height, self.width), np.uint8)
            codes = mask_coding.frPyObjects(polygons, self.height, self.width)
            mask = mask_coding.decode(mask_coding.merge(codes))
        else:
            mask = np.asarray(given)
        if mask.shape != (self.height, self.width):
            raise ValueError(f"a mask of {mask.shape} does not fit the image of {(self.height, self.width)}.")
        return np.ascontiguousarray(mask.astype(bool).astype(np.uint8))

    @property
    def polygons(self) -> list[np.ndarray]:
        """Flat arrays x0, y0, x1, y1, ...: what was given, or the outlines, outer ones and holes."""
        if self._given_polygons is not None:
            return self._given_polygons
        return self.mask_to_polygons(self.mask)[0]

    @property
    def has_holes(self) -> bool:
        return _has_holes(self.mask)

    def area(self) -> int:
        """In pixels."""
        return int(self.mask.sum())

    def bbox(self) -> np.ndarray:
        """XYXY, pixels; zeros for an empty mask."""
        x, y, w, h = cv2.boundingRect(self.mask)
        return np.array([x, y, x + w, y + h], dtype=np.float32)


class Visualizer:
    """Draws into an image; every ``draw_*`` and ``overlay_*`` returns the same output, so calls add up.

    Args:
        img_rgb: (H, W, 3) **RGB**, 0..255.
        metadata: of the dataset; ``thing_classes``, ``thing_colors``, ``stuff_classes``, ``stuff_colors`` are
            used.
        scale: size of the output relative to the image.
        instance_mode: how instances are coloured.
        font_size_scale: of all text, relative to the size that suits the picture.
    """

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Any = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
    ) -> None:
        image = np.asarray(img_rgb)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"Visualizer takes an (H, W, 3) RGB image, got the shape {image.shape}.")
        self.img = np.clip(image, 0, 255).astype(np.uint8)
        self.metadata = MetadataCatalog.get("__nonexist__") if metadata is None else metadata
        self.output = VisImage(self.img, scale=scale)
        self._instance_mode = instance_mode
        self._varied_colors = 0
        # Pixels of the output.
        font_size = max(11.0, math.sqrt(self.output.height * self.output.width) / 40 * scale)
        self._default_font_size = font_size * font_size_scale
        self._line_width = max(1, round(font_size / 8))

    # ------------------------------------------------------------------ whole results

    def draw_instance_predictions(self, predictions: Instances, jittering: bool = True) -> VisImage:
        """Draw a model's instances.

        Args:
            predictions: any of ``pred_boxes``, ``pred_classes``, ``scores``, ``pred_masks``.
            jittering: in SEGMENTATION mode vary the category's colour a little between its instances.
        """
        if predictions.has("pred_keypoints"):
            raise NotImplementedError(outside_message("drawing keypoints"))
        predictions = predictions.to("cpu")
        boxes = predictions.pred_boxes if predictions.has("pred_boxes") else None
        classes = predictions.pred_classes.tolist() if predictions.has("pred_classes") else None
        scores = predictions.scores if predictions.has("scores") else None
        masks = predictions.pred_masks if predictions.has("pred_masks") else None
        labels = _create_text_labels(classes, scores, self.metadata.get("thing_classes", None))
        alpha, colors = 0.5, None
        if self._instance_mode is ColorMode.SEGMENTATION and classes is not None:
            colors = self._category_colors(classes, jittering)
            alpha = 0.8 if colors is not None else alpha
        elif self._instance_mode is ColorMode.IMAGE_BW:
            self._grey_outside(masks)
            alpha = 0.3
        return self.overlay_instances(
            masks=masks, boxes=boxes, labels=labels, assigned_colors=colors, alpha=alpha
        )

    def draw_dataset_dict(self, dic: Mapping[str, Any]) -> VisImage:
        """Draw a dict in Detectron2's dataset format: its instances, and its semantic labels if there are."""
        if dic.get("pan_seg_file_name") or dic.get("segments_info"):
            raise NotImplementedError(outside_message("drawing panoptic annotations"))
        annotations = dic.get("annotations") or []
        if annotations:
            if any("keypoints" in a for a in annotations):
                raise NotImplementedError(outside_message("drawing keypoints"))
            with_masks = all(a.get("segmentation") is not None for a in annotations)
            masks = [a["segmentation"] for a in annotations] if with_masks else None
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
            classes = [a["category_id"] for a in annotations]
            crowd = [bool(a.get("iscrowd", 0)) for a in annotations]
            names = self.metadata.get("thing_classes", None)
            colors = None
            if self._instance_mode is ColorMode.SEGMENTATION:
                colors = self._category_colors(classes, jittering=True)
            self.overlay_instances(
                masks=masks,
                boxes=np.asarray(boxes, dtype=np.float32),
                labels=_create_text_labels(classes, None, names, crowd),
                assigned_colors=colors,
            )
        labels = dic.get("sem_seg")
        if labels is None and dic.get("sem_seg_file_name"):
            with PathManager.open(dic["sem_seg_file_name"], "rb") as handle:
                labels = np.asarray(Image.open(handle))
        if labels is not None:
            self.draw_sem_seg(labels, area_threshold=0, alpha=0.5)
        return self.output

    def draw_sem_seg(
        self,
        sem_seg: torch.Tensor | np.ndarray,
        area_threshold: int | None = None,
        alpha: float = 0.8,
        draw_text: bool = True,
        edge_color: Color = _REGION_EDGE,
    ) -> VisImage:
        """Draw per-pixel classes.

        Args:
            sem_seg: (H, W) integers; values without a name in ``stuff_classes`` (255, say) are left out.
            area_threshold: connected regions below this many pixels are left out; None for none.
            alpha: 0 (transparent) .. 1.
            draw_text: write the class on its regions.
            edge_color: of the regions.
        """
        sem_seg = _array(sem_seg)
        names = self.metadata.get("stuff_classes", None)
        colors = self.metadata.get("stuff_colors", None)
        found, areas = np.unique(sem_seg, return_counts=True)
        for label in found[np.argsort(-areas, kind="stable")].tolist():
            if label < 0 or (names is not None and label >= len(names)):
                continue
            has_color = colors is not None and label < len(colors)
            self.draw_binary_mask(
                (sem_seg == label).astype(np.uint8),
                color=tuple(c / 255 for c in colors[label]) if has_color else _palette_color(label),
                edge_color=edge_color,
                text=(str(label) if names is None else names[label]) if draw_text else None,
                alpha=alpha,
                area_threshold=area_threshold,
            )
        return self.output

    def draw_panoptic_seg(self, *args: Any, **kwargs: Any) -> VisImage:
        raise NotImplementedError(outside_message("drawing panoptic segmentations"))

    draw_panoptic_seg_predictions = draw_panoptic_seg

    def overlay_instances(
        self,
        *,
        boxes: Boxes | np.ndarray | torch.Tensor | None = None,
        labels: Sequence[str] | None = None,
        masks: Any = None,
        keypoints: Any = None,
        assigned_colors: Sequence[Color] | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw N instances, large ones first.

        Args:
            boxes: (N, 4) XYXY, absolute pixels.
            labels: N texts.
            masks: BitMasks, PolygonMasks, (N, H, W) array, or N masks as :class:`GenericMask` takes them.
            keypoints: outside the subset; must be None.
            assigned_colors: N colours; by default all different.
            alpha: of the masks, 0 (transparent) .. 1.
        Raises:
            ValueError: the numbers of boxes, labels, masks and colours differ.
        """
        if keypoints is not None:
            raise NotImplementedError(outside_message("drawing keypoints"))
        corners = None if boxes is None else self._corners(boxes)
        shapes = None if masks is None else self._convert_masks(masks)
        counts = {
            what: len(items)
            for what, items in (
                ("boxes", corners),
                ("masks", shapes),
                ("labels", labels),
                ("assigned_colors", assigned_colors),
            )
            if items is not None
        }
        if len(set(counts.values())) > 1:
            raise ValueError(f"overlay_instances: {', '.join(f'{n} {what}' for what, n in counts.items())}.")
        if corners is None and shapes is None:
            return self.output
        number = max(counts.values())
        colors = (
            assigned_colors if assigned_colors is not None else [_palette_color(k) for k in range(number)]
        )
        places = corners
        if places is None:
            places = np.array([mask.bbox() for mask in shapes or ()]).reshape(-1, 4)
        areas = np.prod(places[:, 2:] - places[:, :2], axis=1)
        for k in np.argsort(-areas, kind="stable"):
            if shapes is not None:
                self._fill(shapes[k].mask, colors[k], alpha, edge_color=None)
            if corners is not None:
                self.draw_box(corners[k], edge_color=colors[k])
            if labels is not None:
                self._label_instance(labels[k], places[k], colors[k])
        return self.output

    def overlay_rotated_instances(self, *args: Any, **kwargs: Any) -> VisImage:
        raise NotImplementedError(outside_message("drawing rotated boxes"))

    draw_rotated_box_with_label = overlay_rotated_instances

    def draw_and_connect_keypoints(self, *args: Any, **kwargs: Any) -> VisImage:
        raise NotImplementedError(outside_message("drawing keypoints"))

    # ------------------------------------------------------------------ single shapes

    def draw_text(
        self,
        text: str,
        position: Sequence[float],
        *,
        font_size: float | None = None,
        color: Color = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """Write ``text`` on a dark ground.

        Args:
            position: (x, y) of the upper edge: its left end, centre or right end by ``horizontal_alignment``.
            font_size: pixels of the output.
            rotation: degrees, counter-clockwise.
        """
        patch = _text_patch(str(text), font_size or self._default_font_size, _readable(_rgb(color)))
        if rotation:
            patch = patch.rotate(rotation, expand=True, resample=Image.Resampling.BICUBIC)
        shift = {"left": 0.0, "center": 0.5, "right": 1.0}
        if horizontal_alignment not in shift:
            raise ValueError(f"horizontal_alignment is left, center or right, got {horizontal_alignment!r}.")
        x = round(position[0] * self.output.scale - shift[horizontal_alignment] * patch.width)
        y = round(position[1] * self.output.scale)
        # Inside the picture, where there is room.
        x = max(0, min(x, self.output.canvas.shape[1] - patch.width))
        y = max(0, min(y, self.output.canvas.shape[0] - patch.height))
        self._paste(np.asarray(patch), x, y)
        return self.output

    def draw_box(
        self, box_coord: Sequence[float], alpha: float = 0.5, edge_color: Color = "g", line_style: str = "-"
    ) -> VisImage:
        """Draw the outline of an XYXY box (pixels); ``line_style`` "-", "--", ":" or "-."."""
        x0, y0, x1, y1 = (float(v) for v in box_coord)
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
        self._polyline(points, edge_color, self._line_width, alpha, line_style)
        return self.output

    def draw_line(
        self,
        x_data: Sequence[float],
        y_data: Sequence[float],
        color: Color,
        linestyle: str = "-",
        linewidth: float | None = None,
    ) -> VisImage:
        """Draw a line through points (pixels)."""
        width = self._line_width if linewidth is None else max(1, round(linewidth))
        self._polyline(list(zip(x_data, y_data)), color, width, 1.0, linestyle)
        return self.output

    def draw_circle(self, circle_coord: Sequence[float], color: Color, radius: float = 3) -> VisImage:
        """Draw a filled circle around (x, y), radius in pixels of the output."""
        fixed = 1 << _SUBPIXEL_BITS
        centre = self._fixed([circle_coord])[0]
        cv2.circle(
            self.output.canvas,
            (int(centre[0]), int(centre[1])),
            round(radius * fixed),
            _bytes(color),
            thickness=-1,
            lineType=cv2.LINE_AA,
            shift=_SUBPIXEL_BITS,
        )
        return self.output

    def draw_polygon(
        self,
        segment: np.ndarray | Sequence[Sequence[float]],
        color: Color,
        edge_color: Color | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Fill a polygon and draw its edge.

        Args:
            segment: (n, 2) points, pixels.
            edge_color: by default a darker or lighter ``color``.
        """
        points = self._fixed(np.asarray(segment, dtype=np.float64).reshape(-1, 2))
        cover = np.zeros(self.output.canvas.shape[:2], np.uint8)
        cv2.fillPoly(cover, [points], 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
        self._blend(cover, color, alpha)
        edge = np.zeros_like(cover)
        cv2.polylines(edge, [points], True, 255, self._edge_width, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
        self._blend(edge, _edge_of(color) if edge_color is None else edge_color, 1.0)
        return self.output

    def draw_binary_mask(
        self,
        binary_mask: np.ndarray,
        color: Color | None = None,
        *,
        edge_color: Color | None = None,
        text: str | None = None,
        alpha: float = 0.5,
        area_threshold: int | None = 10,
    ) -> VisImage:
        """Fill a mask, draw its edge, and write ``text`` on its connected parts.

        A mask with holes gets no edge: what surrounds many small holes would hide the picture.

        Args:
            binary_mask: (H, W), non-zero where the object is.
            area_threshold: connected parts below this many pixels are left out; None for none.
        """
        given = GenericMask(_array(binary_mask), self.output.height, self.output.width)
        mask = _without_small_parts(given.mask, area_threshold or 0)
        color = _palette_color(0) if color is None else color
        if given.has_holes:
            self._blend(self._to_canvas(mask * 255, cv2.INTER_NEAREST), color, alpha)
        else:
            self._fill(mask, color, alpha, edge_color)
        if text:
            self._write_in_mask(text, mask, color)
        return self.output

    def draw_soft_mask(
        self,
        soft_mask: np.ndarray,
        color: Color | None = None,
        *,
        text: str | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Fill with a mask of weights in 0..1, (H, W)."""
        weights = _array(soft_mask).astype(np.float32)
        color = _palette_color(0) if color is None else color
        self._blend(self._to_canvas((weights * 255).clip(0, 255).astype(np.uint8)), color, alpha)
        if text:
            self._write_in_mask(text, (weights > 0.5).astype(np.uint8), color)
        return self.output

    def get_output(self) -> VisImage:
        return self.output

    # ------------------------------------------------------------------ labels and colours

    def _label_instance(self, text: str, box: np.ndarray, color: Color) -> None:
        x0, y0, x1, y1 = box.tolist()
        small = (x1 - x0) * (y1 - y0) < _SMALL_AREA or y1 - y0 < 40
        shrink = float(
            np.clip(((y1 - y0) / math.sqrt(self.output.height * self.output.width) - 0.02) / 0.08, 0, 1)
        )
        size = self._default_font_size * (0.75 + 0.25 * shrink)
        # Below a small object, if there is room; at the upper left corner of any other.
        below = y1 + size / self.output.scale < self.output.height
        top = (y1 if below else y0 - 1.5 * size / self.output.scale) if small else y0
        self.draw_text(text, (x0, top), color=color, horizontal_alignment="left", font_size=size)

    def _write_in_mask(self, text: str, mask: np.ndarray, color: Color) -> None:
        """On the largest connected part, and on every other one that has room."""
        count, parts, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        sizes = stats[1:, cv2.CC_STAT_AREA]
        for part in range(1, count):
            if part - 1 == int(sizes.argmax()) or sizes[part - 1] > _SMALL_AREA:
                # The median lies inside far more often than the mean.
                y, x = np.median(np.nonzero(parts == part), axis=1)
                self.draw_text(text, (x, y), color=color)

    def _category_colors(self, classes: Sequence[int], jittering: bool) -> list[Color] | None:
        colors = self.metadata.get("thing_colors", None)
        if colors is None:
            return None
        chosen = [tuple(v / 255 for v in colors[c]) for c in classes]
        if not jittering:
            return chosen
        return [self._jitter(color) for color in chosen]

    def _jitter(self, color: Sequence[float]) -> tuple[float, float, float]:
        """The colour, varied a little; subclasses override it to have one colour per category."""
        # A point on a small circle around the colour, the golden angle further for each instance.
        angle = 2.39996 * self._varied_colors
        self._varied_colors += 1
        steps = (math.cos(angle), math.sin(angle), -math.cos(angle))
        red, green, blue = (min(1.0, max(0.0, v + 0.1 * s)) for v, s in zip(color, steps))
        return red, green, blue

    def _grey_outside(self, masks: Any) -> None:
        grey = cv2.cvtColor(cv2.cvtColor(self.img, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if masks is not None and len(masks):
            inside = np.any([m.mask for m in self._convert_masks(masks)], axis=0)
            grey[inside] = self.img[inside]
        self.output.reset_image(grey)

    # ------------------------------------------------------------------ geometry and pixels

    @property
    def _edge_width(self) -> int:
        return max(1, self._line_width // 2)

    def _corners(self, boxes: Any) -> np.ndarray:
        if isinstance(boxes, Boxes):
            boxes = boxes.tensor
        corners = np.asarray(_array(boxes), dtype=np.float64)
        if corners.size == 0:
            return corners.reshape(0, 4)
        if corners.ndim != 2 or corners.shape[1] != 4:
            raise ValueError(
                f"boxes must be (N, 4) XYXY, got {corners.shape} (rotated boxes need Detectron2)."
            )
        return corners

    def _convert_masks(self, masks: Any) -> list[GenericMask]:
        if isinstance(masks, PolygonMasks):
            masks = masks.polygons
        elif isinstance(masks, BitMasks):
            masks = _array(masks.tensor)
        elif isinstance(masks, torch.Tensor):
            masks = _array(masks)
        height, width = self.output.height, self.output.width
        return [m if isinstance(m, GenericMask) else GenericMask(_plain(m), height, width) for m in masks]

    def _fill(self, mask: np.ndarray, color: Color, alpha: float, edge_color: Color | None) -> None:
        x, y, w, h = cv2.boundingRect(mask)
        if w == 0 or h == 0:
            return
        self._blend(self._to_canvas(mask * 255), color, alpha)
        edge = np.zeros(self.output.canvas.shape[:2], np.uint8)
        outlines = [self._fixed(c.reshape(-1, 2) + 0.5) for c in _outlines(mask)]
        cv2.polylines(edge, outlines, True, 255, self._edge_width, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
        self._blend(edge, _edge_of(color) if edge_color is None else edge_color, 1.0)

    def _to_canvas(self, cover: np.ndarray, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
        height, width = self.output.canvas.shape[:2]
        if cover.shape == (height, width):
            return cover
        return cv2.resize(cover, (width, height), interpolation=interpolation)

    def _fixed(self, points: Any) -> np.ndarray:
        """Image coordinates -> fixed-point canvas coordinates."""
        # Ours start at the corner of the first pixel, OpenCV's at its centre.
        scaled = np.asarray(points, dtype=np.float64) * self.output.scale - 0.5
        return np.round(scaled * (1 << _SUBPIXEL_BITS)).astype(np.int32)

    def _polyline(self, points: list, color: Color, width: int, alpha: float, style: str) -> None:
        pattern = _LINE_STYLES.get(_LINE_STYLE_NAMES.get(style, style))
        if pattern is None:
            raise ValueError(f"line style is one of {', '.join(map(repr, _LINE_STYLES))}, got {style!r}.")
        lengths = [length * width / self.output.scale for length in pattern]
        pieces = _dashes(points, lengths) if lengths else [points]
        cover = np.zeros(self.output.canvas.shape[:2], np.uint8)
        lines = [self._fixed(piece) for piece in pieces]
        cv2.polylines(cover, lines, False, 255, width, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
        # At the default alpha thin lines would hardly be seen on a busy photo.
        self._blend(cover, color, min(1.0, alpha + 0.4))

    def _blend(self, cover: np.ndarray, color: Color, alpha: float) -> None:
        """Mix ``color`` into the canvas where ``cover`` (uint8) is, with weight alpha * cover / 255."""
        x, y, w, h = cv2.boundingRect(cover)
        if w == 0 or h == 0:
            return
        window = self.output.canvas[y : y + h, x : x + w]
        weight = cover[y : y + h, x : x + w, None].astype(np.float32) * (alpha / 255)
        mixed = window + (np.array(_bytes(color), np.float32) - window) * weight
        window[:] = np.round(mixed).astype(np.uint8)

    def _paste(self, patch: np.ndarray, x: int, y: int) -> None:
        """Put an RGBA patch on the canvas; what sticks out is cut off."""
        window = self.output.canvas[y : y + patch.shape[0], x : x + patch.shape[1]]
        patch = patch[: window.shape[0], : window.shape[1]].astype(np.float32)
        weight = patch[:, :, 3:] / 255
        window[:] = np.round(window * (1 - weight) + patch[:, :, :3] * weight).astype(np.uint8)


# With the original's name, as projects import it.
def _create_text_labels(
    classes: Sequence[int] | None,
    scores: Any,
    class_names: Sequence[str] | None,
    is_crowd: Sequence[bool] | None = None,
) -> list[str] | None:
    """ "person 98%", "car|crowd"; None without classes and scores."""
    if classes is None and scores is None:
        return None
    number = len(classes) if classes is not None else len(scores)
    texts = []
    for k in range(number):
        parts = []
        if classes is not None:
            c = classes[k]
            names = class_names or ()
            parts.append(names[c] if 0 <= c < len(names) else str(c))
        if scores is not None:
            parts.append(f"{float(scores[k]) * 100:.0f}%")
        texts.append(" ".join(parts) + ("|crowd" if is_crowd is not None and is_crowd[k] else ""))
    return texts


def _without_small_parts(mask: np.ndarray, least_pixels: int) -> np.ndarray:
    if least_pixels <= 1:
        return mask
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= least_pixels
    large[0] = False  # what lies around the parts
    return large[parts].astype(np.uint8)


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    return list(cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0])


def _has_holes(mask: np.ndarray) -> bool:
    _, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return hierarchy is not None and bool((hierarchy[0, :, 3] >= 0).any())


def _dashes(points: list, lengths: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The drawn pieces of a line, each side begun anew; ``lengths`` in pixels: drawn, left out, drawn, ..."""
    pieces = []
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        distance = math.hypot(x1 - x0, y1 - y0)
        start = 0.0
        for k, length in enumerate(itertools.cycle(lengths)):
            if not start < distance < math.inf:  # nothing to draw of a side without length
                break
            a, b = start / distance, min(1.0, (start + length) / distance)
            if k % 2 == 0:
                pieces.append(
                    [(x0 + (x1 - x0) * a, y0 + (y1 - y0) * a), (x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)]
                )
            start += length
    return pieces


def _text_patch(text: str, size: float, color: tuple[float, float, float]) -> Image.Image:
    font = _font(size)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    margin = max(1, round(size / 8))
    patch = Image.new(
        "RGBA", (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin), (0, 0, 0, 200)
    )
    ImageDraw.Draw(patch).text((margin - left, margin - top), text, font=font, fill=(*_bytes(color), 255))
    return patch


@functools.lru_cache(maxsize=64)
def _font(size: float) -> ImageFont.FreeTypeFont:
    """Matplotlib's, which has the letters of most alphabets; Pillow's own has ASCII."""
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _palette_color(index: int) -> tuple[float, float, float]:
    palette = colormap(rgb=True, maximum=1)
    red, green, blue = palette[index % len(palette)].tolist()
    return red, green, blue


def _rgb(color: Color) -> tuple[float, float, float]:
    """Any way to name a colour -> (r, g, b) in 0..1.

    Raises:
        ValueError: no such colour.
    """
    if isinstance(color, str):
        from matplotlib.colors import to_rgb  # its names are the ones that Detectron2's users know

        return to_rgb(color)
    red, green, blue = (float(v) for v in tuple(color)[:3])
    if not all(0 <= v <= 1 for v in (red, green, blue)):
        raise ValueError(f"colours are (r, g, b) in 0..1, got {tuple(color)}.")
    return red, green, blue


def _bytes(color: Color) -> tuple[int, int, int]:
    red, green, blue = (round(v * 255) for v in _rgb(color))
    return red, green, blue


def _readable(color: tuple[float, float, float]) -> tuple[float, float, float]:
    """The colour, light enough for text on a dark ground."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*color)
    return colorsys.hls_to_rgb(hue, max(lightness, 0.8), saturation)


def _edge_of(color: Color) -> tuple[float, float, float]:
    """A darker tone; a lighter one of dark colours."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*_rgb(color))
    return colorsys.hls_to_rgb(hue, lightness * 0.6 if lightness > 0.3 else lightness + 0.3, saturation)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _plain(mask: Any) -> Any:
    return _array(mask) if isinstance(mask, torch.Tensor) else mask
