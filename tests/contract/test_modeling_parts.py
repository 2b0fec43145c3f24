"""Facts about the parts of R-CNN that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, select_foreground_proposals
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage


def top_proposals(boxes: list, logits: list, **changes) -> list[Instances]:
    """boxes and logits: one list per level, for one image of 50x100."""
    options = {
        "image_sizes": [(50, 100)],
        "nms_thresh": 0.5,
        "pre_nms_topk": 10,
        "post_nms_topk": 10,
        "min_box_size": 0.0,
        "training": False,
    }
    return find_top_rpn_proposals(
        [torch.tensor([level]) for level in boxes],
        [torch.tensor([level]) for level in logits],
        **(options | changes),
    )


def test_proposals_are_suppressed_within_a_level_only():
    box, shifted = [10.0, 10.0, 30.0, 30.0], [11.0, 10.0, 31.0, 30.0]  # IoU 19/21
    (found,) = top_proposals([[box, shifted], [box]], [[0.5, 1.0], [0.2]])
    assert found.proposal_boxes.tensor.tolist() == [shifted, box]
    assert found.objectness_logits.tolist() == pytest.approx([1.0, 0.2])


def test_proposals_are_clipped_and_small_ones_dropped():
    level = [[-20.0, 20, 40, 90], [90, 10, 140, 20], [40, 40, 42, 49]]
    (found,) = top_proposals([level], [[3.0, 2.0, 1.0]], min_box_size=2.0)
    assert found.proposal_boxes.tensor.tolist() == [[0, 20, 40, 50], [90, 10, 100, 20]]
    assert found.image_size == (50, 100)


def test_proposal_counts_before_and_after_nms():
    level = [[10.0 * i, 0.0, 10.0 * i + 5, 5.0] for i in range(6)]
    logits = [float(i) for i in range(6)]
    (found,) = top_proposals([level, level[:1]], [logits, [9.0]], pre_nms_topk=3, post_nms_topk=2)
    assert found.objectness_logits.tolist() == [9.0, 5.0]


def test_non_finite_boxes_stop_training_and_vanish_at_inference():
    level = [[0.0, 0, 10, 10], [0, 0, float("nan"), 10]]
    (found,) = top_proposals([level], [[0.0, 1.0]])
    assert found.proposal_boxes.tensor.tolist() == [level[0]]
    with pytest.raises(FloatingPointError, match="diverged"):
        top_proposals([level], [[0.0, 1.0]], training=True)


def test_ground_truth_joins_the_proposals_as_certain():
    proposals, truth = Instances((50, 100)), Instances((50, 100))
    proposals.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 5, 5]]))
    proposals.objectness_logits = torch.tensor([-3.0])
    truth.gt_boxes = Boxes(torch.tensor([[1.0, 1, 9, 9]]))
    truth.gt_classes = torch.tensor([4])
    (joined,) = add_ground_truth_to_proposals([truth], [proposals])
    assert joined.proposal_boxes.tensor.tolist() == [[0, 0, 5, 5], [1, 1, 9, 9]]
    assert torch.sigmoid(joined.objectness_logits)[1] == 1
    assert sorted(joined.get_fields()) == ["objectness_logits", "proposal_boxes"]


def test_ground_truth_must_have_the_fields_of_proposals():
    proposals = Instances((20, 20), proposal_boxes=Boxes([[0, 0, 5, 5]]), objectness_logits=torch.zeros(1))
    proposals.level = torch.tensor([3])
    truth = Instances((20, 20), gt_boxes=Boxes([[1, 1, 9, 9]]), gt_classes=torch.tensor([7]))
    for without_level in (truth, truth.gt_boxes):
        with pytest.raises(AssertionError, match="level"):
            add_ground_truth_to_proposals([without_level], [proposals])
    truth.level = torch.tensor([4])
    (joined,) = add_ground_truth_to_proposals([truth], [proposals])
    assert joined.level.tolist() == [3, 4] and not joined.has("gt_classes")


def test_detections_need_more_than_the_threshold_and_win_within_their_class():
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 0, 21, 20], [60, 30, 130, 70], [5, 5, 8, 8]])
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.05, 0.25], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    (found,), (rows,) = fast_rcnn_inference([boxes], [scores], [(50, 100)], 0.2, 0.5, 10)
    assert rows.tolist() == [1, 2, 0]  # row 0 keeps class 1 only; 0.2 of row 2 is not above 0.2
    assert found.pred_classes.tolist() == [0, 1, 1]
    assert found.scores.tolist() == pytest.approx([0.7, 0.5, 0.3])
    assert found.pred_boxes.tensor[1].tolist() == [60, 30, 100, 50]
    (found,), _ = fast_rcnn_inference([boxes], [scores], [(50, 100)], 0.2, 0.5, 1)
    assert len(found) == 1


def box_predictor(**changes) -> FastRCNNOutputLayers:
    options = {"box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)), "num_classes": 2}
    return FastRCNNOutputLayers(ShapeSpec(channels=4), **(options | changes))


def labelled_proposals() -> Instances:
    """An object of class 1 whose box is shifted by a tenth of its width, and two of background."""
    one = Instances((50, 100))
    one.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 20, 50, 30]]))
    one.gt_boxes = Boxes(torch.tensor([[1.0, 0, 11, 10], [0, 0, 0, 0], [0, 0, 0, 0]]))
    one.gt_classes = torch.tensor([1, 2, 2])
    return one


@pytest.mark.parametrize("shared", [False, True])
def test_box_losses_by_hand(shared: bool):
    """Zero logits cost log 3; zero deltas miss dx = 0.1 of one object: 0.1 / 3 proposals."""
    predictor = box_predictor(cls_agnostic_bbox_reg=shared, loss_weight={"loss_box_reg": 2.0})
    predictions = (torch.zeros(3, 3), torch.zeros(3, 4 if shared else 8))
    with EventStorage() as storage:
        losses = predictor.losses(predictions, [labelled_proposals()])
        logged = {name: value for name, (value, _) in storage.latest().items()}
    assert float(losses["loss_cls"]) == pytest.approx(1.0986123)
    assert float(losses["loss_box_reg"]) == pytest.approx(2 * 0.1 / 3)
    assert logged == {  # argmax of equal logits is class 0
        "fast_rcnn/cls_accuracy": 0.0,
        "fast_rcnn/fg_cls_accuracy": 0.0,
        "fast_rcnn/false_negative": 0.0,
    }


def test_sigmoid_loss_by_hand():
    """Zero logits cost log 2 for each of the two classes."""
    with EventStorage():
        losses = box_predictor(use_sigmoid_ce=True).losses(
            (torch.zeros(3, 3), torch.zeros(3, 8)), [labelled_proposals()]
        )
    assert float(losses["loss_cls"]) == pytest.approx(2 * 0.6931472)


def test_predictor_without_proposals():
    predictor = box_predictor()
    features = torch.zeros(0, 4, requires_grad=True)
    with EventStorage():
        none = labelled_proposals()[torch.zeros(0, dtype=torch.long)]
        losses = predictor.losses(predictor(features), [none])
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0]


def test_foreground_leaves_out_background_and_ignored():
    one = labelled_proposals()
    one.gt_classes = torch.tensor([1, 2, -1])
    (kept,), (mask,) = select_foreground_proposals([one], bg_label=2)
    assert mask.tolist() == [True, False, False]
    assert kept.gt_classes.tolist() == [1]


def test_mask_loss_and_its_log_by_hand():
    """The true mask is the left half of the box; logits say +1 everywhere for the true class."""
    one = Instances((8, 8))
    one.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 8, 8]]))
    one.gt_classes = torch.tensor([1])
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    one.gt_masks = BitMasks(mask)
    logits = torch.full((1, 2, 4, 4), -7.0)
    logits[:, 1] = 1.0
    with EventStorage() as storage:
        loss = mask_rcnn_loss(logits, [one, one[torch.zeros(0, dtype=torch.long)]])
        logged = {name: value for name, (value, _) in storage.latest().items()}
    assert float(loss) == pytest.approx((0.3132617 + 1.3132617) / 2)
    assert logged == {
        "mask_rcnn/accuracy": 0.5,
        "mask_rcnn/false_positive": 1.0,
        "mask_rcnn/false_negative": 0.0,
    }


def test_mask_inference_takes_the_predicted_class():
    one = Instances((8, 8))
    one.pred_classes = torch.tensor([1, 0])
    empty = one[torch.zeros(0, dtype=torch.long)]
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 1] = 50.0
    mask_rcnn_inference(logits, [empty, one])
    assert empty.pred_masks.shape == (0, 1, 4, 4)
    assert one.pred_masks.mean((1, 2, 3)).tolist() == [1.0, 0.5]


class TwoMaps(Backbone):
    """Ones at strides 4 and 8."""

    _out_features = ["res2", "res3"]
    _out_feature_channels = {"res2": 1, "res3": 1}
    _out_feature_strides = {"res2": 4, "res3": 8}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h, w = x.shape[-2:]
        return {name: torch.ones(1, 1, h // s, w // s) for name, s in self._out_feature_strides.items()}


@pytest.mark.parametrize("fuse_type, finest", [("sum", 5.0), ("avg", 2.5)])
def test_fpn_adds_what_comes_from_above(fuse_type: str, finest: float):
    top_block = LastLevelMaxPool()
    top_block.in_feature = "p3"
    fpn = FPN(TwoMaps(), ["res2", "res3"], 1, top_block=top_block, fuse_type=fuse_type)
    with torch.no_grad():
        for name, parameter in fpn.named_parameters():
            parameter.zero_()
            if name.endswith("weight"):  # laterals multiply by 2 and 3, outputs by 1
                height, width = parameter.shape[2:]
                factor = {"fpn_lateral2.weight": 2.0, "fpn_lateral3.weight": 3.0}.get(name, 1.0)
                parameter[0, 0, height // 2, width // 2] = factor
    maps = fpn(torch.zeros(1, 3, 32, 64))
    assert {name: (tuple(x.shape[2:]), x.mean().item()) for name, x in maps.items()} == {
        "p2": ((8, 16), finest),
        "p3": ((4, 8), 3.0),
        "p4": ((2, 4), 3.0),
    }
    assert {name: shape.stride for name, shape in fpn.output_shape().items()} == {"p2": 4, "p3": 8, "p4": 16}
    assert fpn.size_divisibility == 8


def test_segmentation_head_ignores_the_ignored_label():
    head = SemSegFPNHead(
        {"p3": ShapeSpec(channels=4, stride=8), "p2": ShapeSpec(channels=4, stride=4)},
        num_classes=3,
        conv_dims=8,
        common_stride=4,
        norm="",
        ignore_value=255,
    )
    maps = {"p2": torch.rand(2, 4, 8, 8), "p3": torch.rand(2, 4, 4, 4)}
    logits, losses = head.eval()(maps)
    assert logits.shape == (2, 3, 32, 32) and losses == {}

    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    half = labels.clone()
    half[:, :, 16:] = 255
    _, whole = head.train()(maps, labels)
    _, part = head(maps, half)
    wanted = torch.nn.functional.cross_entropy(logits[..., :16], labels[..., :16])
    assert float(part["loss_sem_seg"]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(whole["loss_sem_seg"]) != pytest.approx(float(wanted), rel=1e-5)
