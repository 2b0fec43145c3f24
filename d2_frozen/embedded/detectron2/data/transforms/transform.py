"""Which deterministic changes can be made to an image and its labels, beyond the ones that fvcore has?

Coordinates are (x, y) in pixels of the *continuous* image: 0..W and 0..H, pixel centres at .5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import CropTransform, HFlipTransform, NoOpTransform, Transform, TransformList
from PIL import Image

__all__ = [
    "ColorTransform",
    "ExtentTransform",
    "HFlip_rotated_box",
    "PILColorTransform",
    "ResizeTransform",
    "Resize_rotated_box",
    "RotationTransform",
]

_TORCH_MODE = {
    Image.Resampling.NEAREST: "nearest",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}


def _through_pil(array: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Apply a PIL operation to a uint8 array (H, W) or (H, W, C); a single channel keeps its axis."""
    single = array.ndim == 3 and array.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(array[:, :, 0] if single else array))
    result = np.asarray(change(picture))
    return result[:, :, None] if single else result


class ResizeTransform(Transform):
    """Resize an image of h x w pixels to new_h x new_w.

    Args:
        h, w: size of the input; an image of another size is refused.
        new_h, new_w: size of the output.
        interp: a PIL resampling filter; bilinear when None. Label maps always use nearest.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        super().__init__()
        self.h, self.w = h, w
        self.new_h, self.new_w = new_h, new_w
        self.interp = Image.Resampling.BILINEAR if interp is None else interp

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """uint8 goes through PIL (antialiased), floating point through torch (not antialiased)."""
        assert img.shape[:2] == (self.h, self.w), (
            f"this transform resizes {self.h}x{self.w} (h x w) images, but was given one of shape {img.shape}"
        )
        interp = self.interp if interp is None else interp
        if img.dtype == np.uint8:
            return _through_pil(img, lambda picture: picture.resize((self.new_w, self.new_h), interp))
        return self._resize_by_torch(img, interp)

    def _resize_by_torch(self, img: np.ndarray, interp: int) -> np.ndarray:
        mode = _TORCH_MODE.get(interp)
        if mode is None:
            raise ValueError(
                f"{img.dtype} images can be resized with NEAREST, BILINEAR or BICUBIC, not {interp!r}."
            )
        trailing = img.shape[2:]
        planes = (
            torch.from_numpy(np.ascontiguousarray(img)).reshape(self.h, self.w, -1).permute(2, 0, 1)[None]
        )
        if mode == "nearest":
            resized = F.interpolate(planes, (self.new_h, self.new_w), mode=mode)
        else:
            resized = F.interpolate(planes, (self.new_h, self.new_w), mode=mode, align_corners=False)
        return resized[0].permute(1, 2, 0).reshape(self.new_h, self.new_w, *trailing).numpy()

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords[:, 0] = coords[:, 0] * (self.new_w / self.w)
        coords[:, 1] = coords[:, 1] * (self.new_h / self.h)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Nearest label for every output pixel centre, for any integer or bool dtype."""
        if segmentation.dtype == np.uint8 or np.issubdtype(segmentation.dtype, np.floating):
            return self.apply_image(segmentation, interp=Image.Resampling.NEAREST)
        # PIL and torch know few integer types; picking rows and columns is the same operation for all of
        # them.
        rows = _nearest_source(self.new_h, self.h)
        columns = _nearest_source(self.new_w, self.w)
        return segmentation[rows][:, columns]

    def inverse(self) -> Transform:
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


def _nearest_source(new_size: int, size: int) -> np.ndarray:
    """Index of the input pixel under the centre of each output pixel."""
    return np.minimum(((np.arange(new_size) + 0.5) * size / new_size).astype(np.int64), size - 1)


class ExtentTransform(Transform):
    """Cut a rectangle, which may reach outside the image, and stretch it to an output size.

    Args:
        src_rect: (x0, y0, x1, y1) in input pixels.
        output_size: (h, w).
        interp: PIL filter for images; label maps use nearest.
        fill: value of pixels that lie outside the input.
    """

    def __init__(
        self,
        src_rect: tuple[float, float, float, float],
        output_size: tuple[int, int],
        interp: int = Image.Resampling.BILINEAR,
        fill: float = 0,
    ):
        super().__init__()
        self.src_rect = src_rect
        self.output_size = output_size
        self.interp = interp
        self.fill = fill

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        height, width = self.output_size
        return _through_pil(
            img,
            lambda picture: picture.transform(
                (width, height),
                Image.Transform.EXTENT,
                data=tuple(self.src_rect),
                resample=self.interp if interp is None else interp,
                fillcolor=self._fill_for(img),
            ),
        )

    def _fill_for(self, img: np.ndarray) -> Any:
        colours = img.shape[2] if img.ndim == 3 else 1
        return self.fill if colours == 1 else (int(self.fill),) * colours

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = self.src_rect
        height, width = self.output_size
        scale = np.array([width / (x1 - x0), height / (y1 - y0)])
        return (coords.astype(np.float32) - np.array([x0, y0], np.float32)) * scale.astype(np.float32)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=Image.Resampling.NEAREST)


class RotationTransform(Transform):
    """Rotate by ``angle`` degrees, counter-clockwise as seen on the screen.

    Args:
        h, w: size of the input.
        angle: degrees.
        expand: grow the canvas so that the whole rotated image is visible; else keep h x w.
        center: (x, y) in pixels; the middle of the image when None. Without effect on the picture when
            expanding.
        interp: OpenCV interpolation for images (bilinear when None); label maps use nearest.
    """

    def __init__(
        self,
        h: int,
        w: int,
        angle: float,
        expand: bool = True,
        center: tuple[float, float] | None = None,
        interp: int | None = None,
    ):
        super().__init__()
        self.h, self.w = h, w
        self.angle = angle
        self.expand = expand
        self.center = center
        self.interp = cv2.INTER_LINEAR if interp is None else interp
        # |cos| and |sin| of the angle give the bounding box of the rotated rectangle.
        turn = np.deg2rad(angle)
        cos, sin = abs(np.cos(turn)), abs(np.sin(turn))
        if expand:
            self.bound_w, self.bound_h = (int(np.rint(v)) for v in (h * sin + w * cos, h * cos + w * sin))
        else:
            self.bound_w, self.bound_h = w, h
        self._coords_matrix = self._matrix(pixel_offset=0.0)
        # Images are indexed by pixel centres, which lie half a pixel before the continuous coordinate.
        self._image_matrix = self._matrix(pixel_offset=-0.5)

    def _matrix(self, pixel_offset: float) -> np.ndarray:
        """(2, 3) affine map from input to output coordinates."""
        middle = (self.w / 2, self.h / 2)
        # Single precision, as OpenCV keeps a centre of rotation.
        cx, cy = np.float32(np.asarray(middle if self.center is None else self.center) + pixel_offset).astype(
            float
        )
        turn = np.deg2rad(self.angle)
        cos, sin = np.cos(turn), np.sin(turn)
        linear = np.array([[cos, sin], [-sin, cos]])
        shift = np.array([cx, cy]) - linear @ [cx, cy]
        if self.expand:
            # The middle of the input has to land on the middle of the new canvas.
            canvas_middle = np.array([self.bound_w / 2, self.bound_h / 2]) + pixel_offset
            shift = canvas_middle - linear @ (np.asarray(middle) + pixel_offset)
        return np.column_stack([linear, shift])

    @property
    def _is_identity(self) -> bool:
        return self.angle % 360 == 0

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if len(img) == 0 or self._is_identity:
            return img
        assert img.shape[:2] == (self.h, self.w), (
            f"this transform rotates {self.h}x{self.w} (h x w) images, but was given one of shape {img.shape}"
        )
        flags = self.interp if interp is None else interp
        return cv2.warpAffine(img, self._image_matrix, (self.bound_w, self.bound_h), flags=flags)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords = np.asarray(coords, dtype=float)
        if len(coords) == 0 or self._is_identity:
            return coords
        return coords @ self._coords_matrix[:, :2].T + self._coords_matrix[:, 2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=cv2.INTER_NEAREST)

    def inverse(self) -> Transform:
        """Rotate back and cut out the original rectangle; only where nothing was lost, i.e. with
        ``expand``.
        """
        if not self.expand:
            raise NotImplementedError("RotationTransform(expand=False) cuts corners off: it has no inverse.")
        back = RotationTransform(self.bound_h, self.bound_w, -self.angle, True, None, self.interp)
        x0, y0 = (back.bound_w - self.w) // 2, (back.bound_h - self.h) // 2
        crop = CropTransform(x0, y0, self.w, self.h, orig_w=back.bound_w, orig_h=back.bound_h)
        return TransformList([back, crop])


class ColorTransform(Transform):
    """A change of colours by any function array -> array; coordinates and label maps stay.

    Args:
        op: receives the image array and returns one of the same height and width.
    """

    def __init__(self, op: Callable[[Any], Any]):
        if not callable(op):
            raise ValueError(f"op must be a function of the image, not {op!r}.")
        super().__init__()
        self.op = op

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self.op(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def inverse(self) -> Transform:
        return NoOpTransform()


class PILColorTransform(ColorTransform):
    """The same for a function PIL image -> PIL image, e.g. one of ``PIL.ImageOps``."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.asarray(self.op(Image.fromarray(img)))


# Rotated boxes, (N, 5): x and y of the centre, width, height in pixels, angle in degrees, counter-clockwise.
# fvcore gives each transform a method apply_rotated_box from these functions.


def HFlip_rotated_box(transform: HFlipTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Mirrored boxes turn the other way round."""
    mirrored = np.array(rotated_boxes)
    mirrored[:, 0] = transform.width - mirrored[:, 0]
    mirrored[:, 4] *= -1
    return mirrored


def Resize_rotated_box(transform: ResizeTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Scaled boxes. Unless both axes scale alike a turned box becomes a parallelogram: the result keeps the
    lengths of its sides, and the direction of what was the height.
    """
    scale = np.array([transform.new_w / transform.w, transform.new_h / transform.h])
    boxes = np.array(rotated_boxes, dtype=np.float64)
    turn = np.deg2rad(boxes[:, 4])
    along_width = np.stack([np.cos(turn), np.sin(turn)], axis=1) * scale  # (N, xy)
    along_height = np.stack([np.sin(turn), np.cos(turn)], axis=1) * scale
    boxes[:, :2] *= scale
    boxes[:, 2] *= np.linalg.norm(along_width, axis=1)
    boxes[:, 3] *= np.linalg.norm(along_height, axis=1)
    boxes[:, 4] = np.rad2deg(np.arctan2(along_height[:, 0], along_height[:, 1]))
    return boxes.astype(np.result_type(rotated_boxes, np.float32), copy=False)


HFlipTransform.register_type("rotated_box", HFlip_rotated_box)
ResizeTransform.register_type("rotated_box", Resize_rotated_box)
