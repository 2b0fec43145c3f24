"""From the size that the model worked at to the size that the user asked for."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from detectron2.structures import Instances, ROIMasks


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Detections in another image size, clipped to it, masks pasted into it.

    Args:
        results: ``pred_boxes`` (or ``proposal_boxes``), and optionally ``pred_masks`` (N, 1, M, M)
            probabilities or ROIMasks, and ``pred_keypoints``; in the pixels of ``results.image_size``. Not
            changed.
        output_height, output_width: pixels of the image that the result refers to.
        mask_threshold: see ``paste_masks_in_image``.
    Returns:
        New Instances without the boxes that are empty now; ``pred_masks`` is (N, output_height, output_width)
        bool.
    """
    height, width = int(output_height), int(output_width)
    scale_x, scale_y = width / results.image_size[1], height / results.image_size[0]
    scaled = Instances((height, width), **results.get_fields())

    for name in ("pred_boxes", "proposal_boxes"):
        if scaled.has(name):
            break
    else:
        raise AssertionError("detector_postprocess: results have neither pred_boxes nor proposal_boxes")
    boxes = scaled.get(name).clone()
    boxes.scale(scale_x, scale_y)
    boxes.clip(scaled.image_size)
    scaled.set(name, boxes)
    scaled = scaled[boxes.nonempty()]

    if scaled.has("pred_masks"):
        masks = scaled.pred_masks
        if not isinstance(masks, ROIMasks):
            masks = ROIMasks(masks[:, 0])
        scaled.pred_masks = masks.to_bitmasks(scaled.get(name), height, width, mask_threshold).tensor
    if scaled.has("pred_keypoints"):
        points = scaled.pred_keypoints.clone()
        points[:, :, 0] *= scale_x
        points[:, :, 1] *= scale_y
        scaled.pred_keypoints = points
    return scaled


def sem_seg_postprocess(
    result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> Tensor:
    """Class scores in another image size, without the padding of the batch.

    Args:
        result: (classes, H, W) scores.
        img_size: (height, width) of the image inside H x W.
        output_height, output_width: pixels of the result.
    Returns:
        (classes, output_height, output_width), bilinear.
    """
    unpadded = result[None, :, : img_size[0], : img_size[1]]
    size = (output_height, output_width)
    return F.interpolate(unpadded, size=size, mode="bilinear", align_corners=False)[0]
