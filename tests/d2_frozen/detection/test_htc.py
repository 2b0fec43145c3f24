"""Hybrid Task Cascade: what flows where, how it is weighted, and that it trains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from d2_frozen.detection import HTCROIHeads
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

Image = Callable[[], dict]
STAGE_LOSSES = {f"{name}_stage{t}" for t in range(3) for name in ("loss_cls", "loss_box_reg", "loss_mask")}


@pytest.fixture
def build(small_config: Callable[..., CfgNode]) -> Callable[..., nn.Module]:
    """``build("KEY", value, ...)`` gives the same small HTC model each time, in training mode."""

    def model(*options: object) -> nn.Module:
        htc = ("MODEL.ROI_HEADS.NAME", "HTCROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
        torch.manual_seed(0)
        built = build_model(small_config(*htc, *options))
        # Boxes that really move, so that refined ones can be told from given ones.
        for predictor in built.roi_heads.box_predictor:
            nn.init.constant_(predictor.bbox_pred.bias, 0.4)
        return built

    return model


def losses_of(model: nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    with EventStorage():
        return model(batch)


def without_objects(image: dict) -> dict:
    """No annotations at all: such Instances have no masks either."""
    truth = Instances((64, 96))
    truth.gt_boxes, truth.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64)
    return {**image, "instances": truth}


def test_losses_are_weighted_by_stage(build: Callable[..., nn.Module], labelled_image: Image) -> None:
    weighted = losses_of(build(), [labelled_image()])
    assert {name for name in weighted if "rpn" not in name} == STAGE_LOSSES
    plain = losses_of(build("MODEL.HTC.STAGE_LOSS_WEIGHTS", (1.0, 1.0, 1.0)), [labelled_image()])
    for name in STAGE_LOSSES:
        weight = (1.0, 0.5, 0.25)[int(name[-1])]
        assert plain[name] > 0
        assert torch.equal(weighted[name], weight * plain[name])


def test_boxes_are_class_agnostic_masks_are_not(build: Callable[..., nn.Module]) -> None:
    heads = build().roi_heads
    assert [p.bbox_pred.out_features for p in heads.box_predictor] == [4, 4, 4]
    assert [h.predictor.out_channels for h in heads.mask_head] == [3, 3, 3]
    heads = build("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True).roi_heads
    assert [h.predictor.out_channels for h in heads.mask_head] == [1, 1, 1]


def test_parameter_names(build: Callable[..., nn.Module]) -> None:
    names = {name.rsplit(".", 1)[0] for name, _ in build().roi_heads.named_parameters()}
    stage = ["box_head.{}.fc1", "box_predictor.{}.cls_score", "box_predictor.{}.bbox_pred"]
    stage += ["mask_head.{}.mask_fcn1", "mask_head.{}.deconv", "mask_head.{}.predictor"]
    expected = {name.format(t) for t in range(3) for name in stage}
    assert names == expected | {"mask_head.1.flow", "mask_head.2.flow"}
    semantic = {name for name, _ in build("MODEL.HTC.SEMANTIC_ON", True).roi_heads.named_parameters()}
    parts = {name.split(".")[1] for name in semantic if name.startswith("semantic_branch.")}
    assert parts == {"lateral", "conv", "embedding", "predictor"}


class Recorder:
    """Boxes that a pooler was called with."""

    def __init__(self, pooler: nn.Module) -> None:
        self.calls: list[torch.Tensor] = []
        pooler.register_forward_pre_hook(lambda _, args: self.calls.append(args[1][0].tensor.clone()))


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_stage_gets_the_boxes_that_the_one_before_refined(
    build: Callable[..., nn.Module], labelled_image: Image, interleaved: bool
) -> None:
    """Deltas are 0.4 / weights for every box: dx = 0.04 widths, then 0.02; the mask branch comes after or before."""
    model = build("MODEL.HTC.INTERLEAVED", interleaved)
    for predictor in model.roi_heads.box_predictor:
        nn.init.zeros_(predictor.bbox_pred.weight)
    boxes, masks = Recorder(model.roi_heads.box_pooler), Recorder(model.roi_heads.mask_pooler)
    losses_of(model, [labelled_image()])
    assert len(boxes.calls) == len(masks.calls) == 3
    refined = []
    for stage, given in enumerate(boxes.calls):
        transform = model.roi_heads.box_predictor[stage].box2box_transform
        moved = Boxes(transform.apply_deltas(torch.full((len(given), 4), 0.4), given))
        moved.clip((64, 96))
        refined.append(moved.tensor)
    torch.testing.assert_close(boxes.calls[1], refined[0])
    torch.testing.assert_close(boxes.calls[2], refined[1])
    for stage in range(3):
        source = refined[stage] if interleaved else boxes.calls[stage]
        assert len(masks.calls[stage]) > 0
        distance = (masks.calls[stage][:, None] - source[None]).abs().amax(dim=2)  # each to each
        assert distance.amin(dim=1).max() < 1e-3


@pytest.mark.parametrize("flow", [True, False])
def test_gradient_of_the_last_mask_loss_reaches_the_first_mask_head_by_the_flow_alone(
    build: Callable[..., nn.Module], labelled_image: Image, flow: bool
) -> None:
    model = build("MODEL.HTC.MASK_INFO_FLOW", flow)
    losses_of(model, [labelled_image()])["loss_mask_stage2"].backward()
    first, last = (model.roi_heads.mask_head[t] for t in (0, 2))
    assert last.mask_fcn1.weight.grad.abs().sum() > 0
    reached = first.mask_fcn1.weight.grad is not None and first.mask_fcn1.weight.grad.abs().sum() > 0
    assert reached == flow
    assert first.deconv.weight.grad is None
    assert (last.flow is not None) == flow


def test_mask_at_test_is_the_mean_over_the_stages(build: Callable[..., nn.Module]) -> None:
    heads = build().roi_heads.eval()
    features = {f"p{i}": torch.randn(1, 16, 64 >> i, 96 >> i) for i in range(2, 7)}
    given = Instances((64, 96))
    given.pred_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 50.0], [20.0, 8.0, 90.0, 60.0]]))
    given.pred_classes = torch.tensor([0, 2])
    with torch.no_grad():
        (found,) = heads.forward_with_given_boxes(features, [given])
        x = heads.mask_pooler([features[name] for name in ("p2", "p3", "p4", "p5")], [given.pred_boxes])
        one, two, three = heads.mask_head
        first = one.mask_fcn1(x)
        second = two.mask_fcn1(x + two.flow(first))
        third = three.mask_fcn1(x + three.flow(second))
        logits = [h.predictor(h.deconv(f).relu()) for h, f in zip(heads.mask_head, (first, second, third))]
    expected = sum(stage.sigmoid() for stage in logits) / 3
    torch.testing.assert_close(found.pred_masks[:, 0], expected[[0, 1], [0, 2]])


def test_scores_at_test_are_the_mean_over_the_stages(
    build: Callable[..., nn.Module], labelled_image: Image
) -> None:
    """Three predictors that say class 0 with 0.9, 0.6 and 0.3, whatever they see."""
    model = build().eval()
    for predictor, p in zip(model.roi_heads.box_predictor, (0.9, 0.6, 0.3)):
        nn.init.zeros_(predictor.cls_score.weight)
        rest = (1 - p) / 3
        predictor.cls_score.bias.data = torch.tensor([p, rest, rest, rest]).log()
    with torch.no_grad():
        found = model([labelled_image()])[0]["instances"]
    scores = found.scores[found.pred_classes == 0]
    torch.testing.assert_close(scores, torch.full_like(scores, 0.6))


def test_images_without_objects_and_without_proposals(
    build: Callable[..., nn.Module], labelled_image: Image
) -> None:
    model = build()
    losses = losses_of(model, [without_objects(labelled_image())])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not any(losses[f"loss_mask_stage{t}"].item() for t in range(3))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.parameters())
    mixed = losses_of(model, [without_objects(labelled_image()), labelled_image()])
    assert set(mixed) == set(losses) and all(torch.isfinite(loss) for loss in mixed.values())
    # No proposals: an RPN that finds nothing, and no true boxes added.
    nothing = Instances((64, 96))
    nothing.proposal_boxes, nothing.objectness_logits = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    model.roi_heads.proposal_append_gt = False
    model.proposal_generator.forward = lambda images, features, truth=None: ([nothing], {})
    assert all(torch.isfinite(loss) for loss in losses_of(model, [labelled_image()]).values())
    with torch.no_grad():
        found = model.eval()([labelled_image()])[0]["instances"]
    assert len(found) == 0 and found.pred_masks.shape == (0, 64, 96)


def test_training_on_one_image_lowers_every_loss_and_leaves_the_backbone(
    build: Callable[..., nn.Module], labelled_image: Image
) -> None:
    model = build("MODEL.FPN.NORM", "BN")
    before = {name: value.clone() for name, value in model.backbone.bottom_up.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    history = []
    for _ in range(15):
        losses = losses_of(model, [labelled_image()])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    for name in (f"loss_{kind}_stage{t}" for t in range(3) for kind in ("cls", "mask")):
        assert history[-1][name] < 0.9 * history[0][name], name
    after = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_positives_of_later_stages_are_bounded(build: Callable[..., nn.Module]) -> None:
    """A quarter of 8 sampled proposals: 2 RoIs for masks, however many boxes match."""
    heads: HTCROIHeads = build().roi_heads
    truth = Instances((64, 96))
    truth.gt_boxes, truth.gt_classes = Boxes(torch.tensor([[0.0, 0.0, 30.0, 30.0]])), torch.tensor([1])
    truth.gt_masks = torch.ones(1, 64, 96)
    boxes = Boxes(torch.tensor([[0.0, 0.0, 30.0, 30.0 + i] for i in range(6)]))
    objects = heads._objects(boxes, truth, (64, 96), stage=1)
    assert len(objects) == 2 and objects.gt_classes.tolist() == [1, 1]


def test_wrong_settings(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"STAGE_LOSS_WEIGHTS has 2 values for the 3 stages"):
        build("MODEL.HTC.STAGE_LOSS_WEIGHTS", (1.0, 0.5))
    with pytest.raises(ValueError, match=r"mask heads of its own.*NAME is 'PointRendMaskHead'"):
        build("MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead")
    with pytest.raises(ValueError, match=r"SEMANTIC_STRIDE 8 do not fit"):
        build("MODEL.HTC.SEMANTIC_ON", True, "MODEL.HTC.SEMANTIC_IN_FEATURES", ["p2", "p4"])


def test_faster_rcnn_boxes_alone(build: Callable[..., nn.Module], labelled_image: Image) -> None:
    model = build("MODEL.MASK_ON", False)
    losses = losses_of(model, [labelled_image()])
    assert {name for name in losses if "rpn" not in name} == {n for n in STAGE_LOSSES if "mask" not in n}
    assert model.roi_heads.box_pooler is not None and not hasattr(model.roi_heads, "mask_head")


def test_heads_can_be_built_by_hand_from_a_config(small_config: Callable[..., CfgNode]) -> None:
    cfg = small_config("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    shapes = {f"p{i}": ShapeSpec(channels=16, stride=1 << i) for i in range(2, 7)}
    assert HTCROIHeads(cfg, shapes).num_cascade_stages == 3
