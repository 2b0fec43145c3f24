"""Class scores and box deltas of proposals: predictor, losses, detections (Fast R-CNN, arXiv:1504.08083).

K is the number of object classes everywhere here; class K is the background. M counts proposals of all images
together, R those of one image. Boxes are XYXY in pixels of the (resized, padded) network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, batched_nms, cat, cross_entropy, nonzero_tuple
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from ..box_regression import Box2BoxTransform, _dense_box_regression_loss

__all__ = ["FastRCNNOutputLayers", "fast_rcnn_inference"]

Predictions = tuple[torch.Tensor, torch.Tensor]


class FastRCNNOutputLayers(nn.Module):
    """Two linear layers on the features of a box: K+1 class scores, and deltas (per class or for all)."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec | int,
        *,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 100,
        cls_agnostic_bbox_reg: bool = False,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        loss_weight: float | dict[str, float] = 1.0,
        use_fed_loss: bool = False,
        use_sigmoid_ce: bool = False,
        get_fed_loss_cls_weights: Callable[[], torch.Tensor] | None = None,
        fed_loss_num_classes: int = 50,
    ):
        """
        Args:
            input_shape: of the features; they are flattened.
            box2box_transform: how four deltas move a proposal.
            num_classes: K.
            test_score_thresh: detections need a score above it.
            test_nms_thresh: IoU, within each class.
            test_topk_per_image: detections kept per image.
            cls_agnostic_bbox_reg: one set of deltas for all classes.
            smooth_l1_beta: where smooth L1 turns from square to linear; 0 is plain L1.
            box_reg_loss_type: as ``_dense_box_regression_loss`` knows it.
            loss_weight: one for both losses, or by loss name.
            use_fed_loss: federated loss of CenterNet2 (arXiv:2103.07461): only some of the absent classes
                count as negatives, drawn anew each time. Needs ``use_sigmoid_ce``.
            use_sigmoid_ce: one binary cross entropy per class instead of a softmax.
            get_fed_loss_cls_weights: returns the (K,) weights of that draw; needed for ``use_fed_loss``.
            fed_loss_num_classes: how many classes take part in a federated loss.
        Raises:
            ValueError: federated loss without sigmoid or without weights.
        """
        super().__init__()
        if isinstance(input_shape, int):
            input_shape = ShapeSpec(channels=input_shape)
        self.num_classes = num_classes
        width = input_shape.channels * (input_shape.height or 1) * (input_shape.width or 1)
        box_dim = len(box2box_transform.weights)
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, box_dim if cls_agnostic_bbox_reg else box_dim * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

        # Inference.
        self.test_topk_per_image = test_topk_per_image
        self.test_nms_thresh = test_nms_thresh
        self.test_score_thresh = test_score_thresh
        # Losses.
        self.box2box_transform = box2box_transform
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.use_sigmoid_ce = use_sigmoid_ce
        self.use_fed_loss = use_fed_loss
        self.fed_loss_num_classes = fed_loss_num_classes
        weights_by_name = isinstance(loss_weight, dict)
        self.loss_weight = (
            loss_weight if weights_by_name else dict.fromkeys(("loss_cls", "loss_box_reg"), loss_weight)
        )
        if use_fed_loss:
            if not use_sigmoid_ce:
                raise ValueError("MODEL.ROI_BOX_HEAD.USE_FED_LOSS: True also needs USE_SIGMOID_CE: True")
            if get_fed_loss_cls_weights is None:
                raise ValueError("a federated loss needs get_fed_loss_cls_weights")
            weights = get_fed_loss_cls_weights()
            if len(weights) != num_classes:
                raise ValueError(
                    f"the federated loss has weights for {len(weights)} classes, "
                    f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}"
                )
            self.register_buffer("fed_loss_cls_weights", weights)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        box, roi = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS

        def class_weights() -> torch.Tensor:
            from detectron2.data.detection_utils import get_fed_loss_cls_weights

            return get_fed_loss_cls_weights(cfg.DATASETS.TRAIN, box.FED_LOSS_FREQ_WEIGHT_POWER)

        return {
            "input_shape": input_shape,
            "box2box_transform": Box2BoxTransform(weights=box.BBOX_REG_WEIGHTS),
            "num_classes": roi.NUM_CLASSES,
            "cls_agnostic_bbox_reg": box.CLS_AGNOSTIC_BBOX_REG,
            "smooth_l1_beta": box.SMOOTH_L1_BETA,
            "test_score_thresh": roi.SCORE_THRESH_TEST,
            "test_nms_thresh": roi.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "box_reg_loss_type": box.BBOX_REG_LOSS_TYPE,
            "loss_weight": {"loss_box_reg": box.BBOX_REG_LOSS_WEIGHT},
            "use_fed_loss": box.USE_FED_LOSS,
            "use_sigmoid_ce": box.USE_SIGMOID_CE,
            "get_fed_loss_cls_weights": class_weights,
            "fed_loss_num_classes": box.FED_LOSS_NUM_CLASSES,
        }

    def forward(self, x: torch.Tensor) -> Predictions:
        """(M, ...) features -> class logits (M, K+1), deltas (M, 4K) or (M, 4)."""
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(self, predictions: Predictions, proposals: list[Instances]) -> dict[str, torch.Tensor]:
        """Losses on labelled proposals.

        Args:
            predictions: of :meth:`forward`.
            proposals: per image, with ``proposal_boxes``, ``gt_classes`` (K is background) and, in images
                with objects, ``gt_boxes``.
        Returns:
            weighted loss_cls and loss_box_reg.
        """
        scores, deltas = predictions
        if proposals:
            gt_classes = cat([p.gt_classes for p in proposals], dim=0)
            boxes = cat([p.proposal_boxes.tensor for p in proposals], dim=0)
            if boxes.requires_grad:
                raise ValueError("proposals must not carry gradients; detach them before the box head")
            # Images without objects have background only, whose target box is never read.
            gt_boxes = cat(
                [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals], dim=0
            )
        else:
            gt_classes = torch.empty(0, dtype=torch.long, device=deltas.device)
            boxes = gt_boxes = torch.empty((0, len(self.box2box_transform.weights)), device=deltas.device)
        _log_classification_stats(scores, gt_classes)

        if self.use_sigmoid_ce:
            class_loss = self.sigmoid_cross_entropy_loss(scores, gt_classes)
        else:
            class_loss = cross_entropy(scores, gt_classes, reduction="mean")
        found = {
            "loss_cls": class_loss,
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, deltas, gt_classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in found.items()}

    def get_fed_loss_classes(
        self, gt_classes: torch.Tensor, num_fed_loss_classes: int, num_classes: int, weight: torch.Tensor
    ) -> torch.Tensor:
        """Classes that take part in a federated loss: all present ones, filled up by drawing absent ones.

        Args:
            gt_classes: (M,), may hold background.
            num_fed_loss_classes: wanted size; more are returned if more are present.
            num_classes: K.
            weight: (K,) unnormalised probabilities of the draw.
        """
        present = torch.unique(gt_classes)
        to_draw = num_fed_loss_classes - len(present)
        if to_draw <= 0:
            return present
        chances = torch.cat([weight.float(), weight.new_zeros(1, dtype=torch.float32)])
        chances[present] = 0
        return torch.cat([present, torch.multinomial(chances, to_draw, replacement=False)])

    def sigmoid_cross_entropy_loss(
        self, pred_class_logits: torch.Tensor, gt_classes: torch.Tensor
    ) -> torch.Tensor:
        """Binary cross entropy of (M, K+1) logits: sum over classes, mean over M; background: zeros."""
        if pred_class_logits.numel() == 0:
            return pred_class_logits.new_zeros([1])[0]
        count, num_classes = len(gt_classes), self.num_classes
        target = F.one_hot(gt_classes, num_classes + 1)[:, :num_classes].to(pred_class_logits.dtype)
        loss = F.binary_cross_entropy_with_logits(pred_class_logits[:, :-1], target, reduction="none")
        if self.use_fed_loss:
            used = self.get_fed_loss_classes(
                gt_classes, self.fed_loss_num_classes, num_classes, self.fed_loss_cls_weights
            )
            mask = loss.new_zeros(num_classes + 1)
            mask[used] = 1
            loss = loss * mask[:num_classes]
        return loss.sum() / count

    def box_reg_loss(
        self,
        proposal_boxes: torch.Tensor,
        gt_boxes: torch.Tensor,
        pred_deltas: torch.Tensor,
        gt_classes: torch.Tensor,
    ) -> torch.Tensor:
        """Box loss of the proposals that hold an object, divided by M.

        Dividing by all M proposals, not by those with an object, lets every object weigh the same whatever
        else is in its batch; it is how Fast R-CNN balances the two losses.

        Args:
            proposal_boxes, gt_boxes: (M, 4).
            pred_deltas: (M, 4) or (M, 4K).
            gt_classes: (M,); K is background.
        """
        box_dim = proposal_boxes.shape[1]
        num_classes = self.num_classes
        is_object = (gt_classes >= 0) & (gt_classes < num_classes)
        if pred_deltas.shape[1] != box_dim:
            # Background rows take any class: they are not read.
            rows = torch.arange(len(gt_classes), device=gt_classes.device)
            per_class = pred_deltas.view(-1, num_classes, box_dim)
            pred_deltas = per_class[rows, gt_classes.clamp(0, num_classes - 1)]
        loss = _dense_box_regression_loss(
            [proposal_boxes],
            self.box2box_transform,
            [pred_deltas.unsqueeze(0)],
            [gt_boxes],
            is_object.unsqueeze(0),
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return loss / max(gt_classes.numel(), 1.0)

    def inference(
        self, predictions: Predictions, proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """Detections per image, and for each the index of the proposal it came from."""
        return fast_rcnn_inference(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )

    def predict_boxes_for_gt_classes(
        self, predictions: Predictions, proposals: list[Instances]
    ) -> list[torch.Tensor]:
        """Per image (R, 4): each proposal moved by the deltas of its true class (background: any class)."""
        if not proposals:
            return []
        boxes = self._move(predictions, proposals)
        box_dim = len(self.box2box_transform.weights)
        if boxes.shape[1] > box_dim:
            gt_classes = torch.cat([p.gt_classes for p in proposals]).clamp(0, self.num_classes - 1)
            rows = torch.arange(len(boxes), device=boxes.device)
            boxes = boxes.view(len(boxes), self.num_classes, box_dim)[rows, gt_classes]
        return list(boxes.split([len(p) for p in proposals]))

    def predict_boxes(self, predictions: Predictions, proposals: list[Instances]) -> list[torch.Tensor]:
        """Per image (R, 4K) or (R, 4): the proposals moved by all deltas."""
        if not proposals:
            return []
        return list(self._move(predictions, proposals).split([len(p) for p in proposals]))

    def predict_probs(self, predictions: Predictions, proposals: list[Instances]) -> list[torch.Tensor]:
        """Per image (R, K+1) scores in 0..1."""
        scores = predictions[0]
        probs = scores.sigmoid() if self.use_sigmoid_ce else F.softmax(scores, dim=-1)
        return list(probs.split([len(p) for p in proposals], dim=0))

    def _move(self, predictions: Predictions, proposals: list[Instances]) -> torch.Tensor:
        start = cat([p.proposal_boxes.tensor for p in proposals], dim=0)
        return self.box2box_transform.apply_deltas(predictions[1], start)


def fast_rcnn_inference(
    boxes: list[torch.Tensor],
    scores: list[torch.Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[torch.Tensor]]:
    """From scored boxes to detections: threshold, NMS within each class, best ``topk_per_image`` of all.

    Args:
        boxes: per image (R, 4K), or (R, 4) shared by the classes.
        scores: per image (R, K+1), last column background.
        image_shapes: (height, width) per image; boxes are clipped to it.
        score_thresh: scores must lie above it.
        nms_thresh: IoU.
        topk_per_image: negative for no limit.
    Returns:
        per image Instances with ``pred_boxes``, ``scores``, ``pred_classes``, best first; and the row of
        ``boxes`` behind each detection.
    """
    found = [
        fast_rcnn_inference_single_image(b, s, shape, score_thresh, nms_thresh, topk_per_image)
        for s, b, shape in zip(scores, boxes, image_shapes)
    ]
    return [instances for instances, _ in found], [rows for _, rows in found]


def fast_rcnn_inference_single_image(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[Instances, torch.Tensor]:
    """:func:`fast_rcnn_inference` for one image. Rows with non-finite numbers are left out."""
    num_sets = boxes.shape[1] // 4
    finite = boxes.isfinite().all(dim=1, keepdim=True) & scores.isfinite().all(dim=1, keepdim=True)
    scores = scores[:, :-1]  # (R, K)
    rows, classes = nonzero_tuple((scores > score_thresh) & finite)
    sets = classes if num_sets > 1 else torch.zeros_like(classes)
    boxes = boxes.view(-1, num_sets, 4)[rows, sets]  # (D, 4)
    scores = scores[rows, classes]
    # Only candidates are clipped; before that most of the R * K boxes would be clipped for nothing.
    height, width = image_shape
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)

    kept = batched_nms(boxes, scores, classes, nms_thresh)
    if topk_per_image >= 0:
        kept = kept[:topk_per_image]
    result = Instances(image_shape)
    result.pred_boxes = Boxes(boxes[kept])
    result.scores = scores[kept]
    result.pred_classes = classes[kept]
    return result, rows[kept]


def _log_classification_stats(
    pred_logits: torch.Tensor, gt_classes: torch.Tensor, prefix: str = "fast_rcnn"
) -> None:
    """Log how often the classifier is right, to the current EventStorage.

    ``PREFIX/cls_accuracy`` over all proposals; of those with an object ``PREFIX/fg_cls_accuracy`` and
    ``PREFIX/false_negative``, the part that was called background.

    Args:
        pred_logits: (M, K+1).
        gt_classes: (M,); K is background.
    """
    total = gt_classes.numel()
    if total == 0:
        return
    background = pred_logits.shape[1] - 1
    guess = pred_logits.argmax(dim=1)
    is_object = (gt_classes >= 0) & (gt_classes < background)
    right = guess == gt_classes
    # One transfer to the host for all four counts.
    counts = torch.stack([right, is_object, right & is_object, (guess == background) & is_object])
    num_right, num_objects, objects_right, objects_missed = counts.sum(dim=1).tolist()

    storage = get_event_storage()
    storage.put_scalar(f"{prefix}/cls_accuracy", num_right / total)
    if num_objects > 0:
        storage.put_scalar(f"{prefix}/fg_cls_accuracy", objects_right / num_objects)
        storage.put_scalar(f"{prefix}/false_negative", objects_missed / num_objects)
