"""Facts about models that the golden data does not hold: seeded construction, empty inputs, freezing."""

from __future__ import annotations

import pytest
import torch

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

RES = ["res2", "res3", "res4", "res5"]
C4 = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
}
FPN = C4 | {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": RES,
    "MODEL.FPN.IN_FEATURES": RES,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [48], [64], [96]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
}
CASCADE = FPN | {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}


def config(options: dict) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return cfg


def image_dict(num_objects: int) -> dict:
    """An image of 64x96 with up to two objects."""
    truth = Instances((64, 96))
    truth.gt_boxes = Boxes(torch.tensor([[8.0, 8, 40, 40], [50, 20, 90, 60]])[:num_objects])
    truth.gt_classes = torch.tensor([0, 2])[:num_objects]
    truth.gt_masks = BitMasks(torch.ones(num_objects, 64, 96, dtype=torch.bool))
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(1))
    return {"image": image.to(torch.uint8), "instances": truth, "height": 64, "width": 96}


# Squared norms after torch.manual_seed(7), and the next torch.rand(1), as the original gives them. They hold
# only if every layer is created and initialised in the same order.
SEEDED = {
    "c4": (
        C4,
        {
            "backbone.stem.conv1": 6.277934,
            "backbone.res2.0.shortcut": 20.73416,
            "proposal_generator.rpn_head.conv": 3.678872,
            "roi_heads.res5.0.shortcut": 128.623828,
            "roi_heads.box_predictor.cls_score": 0.052961,
        },
        0.78082,
    ),
    "fpn": (
        FPN,
        {
            "backbone.fpn_output5": 16.057409,
            "backbone.bottom_up.res5.0.shortcut": 127.809202,
            "proposal_generator.rpn_head.conv": 0.233825,
            "roi_heads.box_predictor.cls_score": 0.004414,
        },
        0.459588,
    ),
    "cascade": (
        CASCADE,
        {
            "proposal_generator.rpn_head.conv": 0.233825,
            "roi_heads.box_predictor.0.cls_score": 0.002157,
            "roi_heads.box_predictor.1.cls_score": 0.004178,
            "roi_heads.box_predictor.2.cls_score": 0.002299,
        },
        0.772424,
    ),
}


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_construction_gives_the_weights_of_the_original(name: str):
    options, norms, next_draw = SEEDED[name]
    torch.manual_seed(7)
    state = build_model(config(options)).state_dict()
    draw = float(torch.rand(1))
    for key, norm in norms.items():
        assert float(state[key + ".weight"].square().sum()) == pytest.approx(norm, rel=1e-4, abs=1e-6), key
    assert draw == pytest.approx(next_draw, abs=1e-5)


@pytest.mark.parametrize("options", [C4, FPN, CASCADE], ids=["c4", "fpn", "cascade"])
def test_images_without_objects_still_reach_every_trainable_parameter(options: dict):
    """DistributedDataParallel waits for all of them, so the zero losses must be part of the graph."""
    model = build_model(config(options)).train()
    with EventStorage():
        losses = model([image_dict(0), image_dict(0)])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        if "box_reg" in name or name in ("loss_mask", "loss_rpn_loc"):
            assert loss == 0, name
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_one_image_with_and_one_without_objects_train_together():
    model = build_model(config(CASCADE)).train()
    with EventStorage() as storage:
        losses = model([image_dict(0), image_dict(2)])
        assert all(loss.isfinite() for loss in losses.values())
        # Two true boxes are appended to the proposals of the second image: one object per image on average.
        assert storage.latest()["roi_head/num_fg_samples"][0] >= 1.0


@pytest.mark.parametrize("options", [C4, FPN, CASCADE], ids=["c4", "fpn", "cascade"])
def test_no_proposals_give_no_detections(options: dict):
    """A minimum size larger than the image leaves the RPN without proposals."""
    model = build_model(config(options | {"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 500})).eval()
    with torch.no_grad():
        (result,) = model([image_dict(0)])
    found = result["instances"]
    assert len(found) == 0 and found.image_size == (64, 96)
    assert found.pred_boxes.tensor.shape == (0, 4)
    assert found.pred_masks.shape == (0, 64, 96)


@pytest.mark.parametrize("freeze_at, frozen", [(0, []), (1, ["stem"]), (3, ["stem", "res2", "res3"])])
def test_freeze_at_counts_the_stem_and_the_stages(freeze_at: int, frozen: list[str]):
    options = C4 | {"MODEL.BACKBONE.FREEZE_AT": freeze_at, "MODEL.RESNETS.NORM": "BN"}
    backbone = build_backbone(config(options), ShapeSpec(channels=3))
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name
    for name, module in backbone.named_modules():
        if name.endswith("norm"):
            assert isinstance(module, FrozenBatchNorm2d) == (name.split(".")[0] in frozen), name


def test_training_mode_does_not_move_statistics_of_frozen_norms():
    options = C4 | {"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.RESNETS.NORM": "BN"}
    backbone = build_backbone(config(options), ShapeSpec(channels=3)).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))
    moved = {
        key.split(".")[0] for key, value in backbone.state_dict().items() if not value.equal(before[key])
    }
    assert moved == {"res3", "res4"}


def test_pixel_statistics_are_not_in_checkpoints():
    model = build_model(config(FPN))
    assert not [key for key in model.state_dict() if key.startswith("pixel")]
    assert model.pixel_mean.shape == (3, 1, 1)
