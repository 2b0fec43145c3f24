"""What the embedded engine does not have is named when a config asks for it, and a project may add it."""

from __future__ import annotations

import pytest
from torch import nn

import d2_frozen

if d2_frozen.engine_name() != "embedded":
    pytest.skip("the installed Detectron2 is the engine", allow_module_level=True)

from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model, build_roi_heads
from detectron2.modeling.roi_heads import StandardROIHeads


@pytest.mark.parametrize(
    "key, value, build",
    [
        ("MODEL.META_ARCHITECTURE", "PanopticFPN", build_model),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", build_model),
        ("MODEL.KEYPOINT_ON", True, build_model),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", build_model),
        ("MODEL.BACKBONE.NAME", "build_mnv2_backbone", build_backbone),
    ],
)
def test_configs_outside_the_subset_name_the_key(key: str, value, build):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", key, value])
    with pytest.raises(NotImplementedError, match=rf"{key}: {value}.*needs Detectron2 itself"):
        build(cfg)


def test_keypoints_in_standard_heads_are_refused():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"])
    with pytest.raises(NotImplementedError, match="keypoint"):
        build_roi_heads(cfg, {})
    with pytest.raises(NotImplementedError, match="keypoint_head"):
        StandardROIHeads(
            box_in_features=[],
            box_pooler=None,
            box_head=None,
            box_predictor=None,
            keypoint_head=nn.Identity(),
        )


def test_a_project_may_register_what_the_engine_leaves_out():
    @META_ARCH_REGISTRY.register()
    class FCOS(nn.Module):
        def __init__(self, cfg):
            super().__init__()

    try:
        cfg = get_cfg()
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "FCOS"])
        assert isinstance(build_model(cfg), FCOS)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("FCOS")
