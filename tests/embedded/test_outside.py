"""A part of Detectron2 that the embedded engine lacks can be imported and mentioned; using it names the part."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
from abc import ABC, abstractmethod

import pytest

import detectron2.export
from detectron2.modeling import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.structures import Boxes, RotatedBoxes

NAMES = [
    "config.LazyCall",
    "data.datasets.builtin_meta.KEYPOINT_CONNECTION_RULES",
    "data.datasets.register_lvis_instances",
    "evaluation.LVISEvaluator",
    "evaluation.coco_evaluation._evaluate_predictions_on_coco",
    "layers.ROIAlignRotated",
    "layers.nms_rotated",
    "modeling.PanopticFPN",
    "modeling.anchor_generator.RotatedAnchorGenerator",
    "modeling.backbone.ViT",
    "modeling.box_regression.Box2BoxTransformRotated",
    "modeling.meta_arch.RetinaNet",
    "modeling.proposal_generator.RRPN",
    "modeling.roi_heads.KRCNNConvDeconvUpsampleHead",
    "modeling.roi_heads.roi_heads.select_proposals_with_visible_keypoints",
    "structures.RotatedBoxes",
    "structures.pairwise_iou_rotated",
    "utils.testing.has_dynamic_axes",
    # Whole modules.
    "config.lazy.LazyConfig",
    "export.TracingAdapter",
    "export.torchscript.scripting_with_instances",
    "layers.rotated_boxes.pairwise_iou_rotated",
    "modeling.backbone.swin.SwinTransformer",
    "modeling.mmdet_wrapper.MMDetBackbone",
    "projects.deeplab.add_deeplab_config",
    "projects.point_rend.point_features.point_sample",
    "structures.rotated_boxes.RotatedBoxes",
    "tracking.bbox_iou_tracker.BBoxIOUTracker",
]


@pytest.mark.parametrize("name", NAMES)
def test_import_works_and_use_says_what_is_needed(name: str):
    module, attribute = f"detectron2.{name}".rsplit(".", 1)
    value = getattr(importlib.import_module(module), attribute)
    message = rf"{module}\.{attribute} is outside the subset.*needs Detectron2 itself"
    with pytest.raises(NotImplementedError, match=message):
        value()
    with pytest.raises(NotImplementedError, match=message):
        _ = value.some_attribute


def test_nothing_is_an_instance_and_annotations_work():
    assert not isinstance(Boxes([]), RotatedBoxes) and not isinstance(3, (RotatedBoxes, str))
    assert not issubclass(Boxes, RotatedBoxes)

    def f(boxes: Boxes | RotatedBoxes) -> dict[str, RotatedBoxes]: ...

    assert f(Boxes([])) is None


def test_a_placeholder_is_one_object():
    assert RotatedBoxes is importlib.import_module("detectron2.structures").RotatedBoxes
    assert pickle.loads(pickle.dumps(RotatedBoxes)) is copy.deepcopy(RotatedBoxes) is RotatedBoxes


def test_a_subclass_may_be_defined_but_not_made():
    class Tracker(ABC):
        @abstractmethod
        def update(self): ...

    class Mine(RotatedBoxes, Tracker):
        def update(self): ...

    with pytest.raises(NotImplementedError, match=r"structures\.RotatedBoxes is outside"):
        Mine()


def test_a_project_may_register_a_keypoint_head_while_it_is_imported():
    @ROI_KEYPOINT_HEAD_REGISTRY.register()
    class HeadOfAProject: ...

    assert ROI_KEYPOINT_HEAD_REGISTRY.get("HeadOfAProject") is HeadOfAProject
    ROI_KEYPOINT_HEAD_REGISTRY._obj_map.pop("HeadOfAProject")


def test_a_module_that_hides_a_function_of_its_package_is_refused_like_it():
    """Detectron2 has config.instantiate twice: a module, and the function that the package exports."""
    instantiate = importlib.import_module("detectron2.config.instantiate")
    with pytest.raises(NotImplementedError, match=r"config\.instantiate is outside"):
        instantiate({})


@pytest.mark.parametrize("name", ["detectron2._C", "detectron2.projects.panoptic_deeplab"])
def test_what_an_installed_detectron2_may_lack_is_an_import_error(name: str):
    """Code that can do without them tries the import."""
    with pytest.raises(ImportError, match="needs Detectron2 itself"):
        importlib.import_module(name)


def test_what_no_detectron2_has_is_unknown():
    with pytest.raises(ModuleNotFoundError, match="No module named 'detectron2.modelling'"):
        importlib.import_module("detectron2.modelling")
    with pytest.raises(ImportError, match="cannot import name 'Boxen'"):
        from detectron2.structures import Boxen  # noqa: F401
    assert importlib.util.find_spec("detectron2.export.nothing") is None
    assert not hasattr(detectron2.export, "__all__")
