"""Names of published models, as far as the embedded engine knows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detectron2 import model_zoo
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.model_zoo.catalog import CHECKPOINTS
from detectron2.modeling import build_model

FACTS = json.loads((Path(__file__).parents[1] / "contract" / "golden" / "zoo.json").read_text())
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"


def test_all_of_the_zoos_rcnn_models_are_known():
    assert {f"{name}.yaml" for name in CHECKPOINTS} == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_address_of_weights_is_the_originals(name):
    expected = FACTS[name]["weights"]
    if expected is None:
        with pytest.raises(RuntimeError, match="no weights for"):
            model_zoo.get_checkpoint_url(name)
    else:
        assert model_zoo.get_checkpoint_url(name) == expected
        assert model_zoo.get_checkpoint_url(name.removesuffix(".yaml")) == expected


@pytest.mark.parametrize("name", FACTS)
def test_each_config_has_a_file(name):
    assert Path(model_zoo.get_config_file(name)).is_file()


# One of each architecture; the others differ in depth, schedule or data.
@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
        "COCO-Detection/rpn_R_50_C4_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
        "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x.yaml",
        "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
        "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml",
    ],
)
def test_config_builds(name):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        assert build_model(cfg).training


def test_config_with_trained_weights():
    cfg = model_zoo.get_config(MASK_RCNN, trained=True)
    assert FACTS[MASK_RCNN]["weights"] == cfg.MODEL.WEIGHTS


def test_get_builds_on_the_asked_device():
    model = model_zoo.get("Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml", trained=False, device="cpu")
    assert model.training and {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("ask", [model_zoo.get_checkpoint_url, model_zoo.get_config_file, model_zoo.get])
def test_models_outside_the_subset_say_so(ask):
    with pytest.raises(RuntimeError, match="needs Detectron2"):
        ask("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")
    # Right file, wrong folder: the flat folder of configs must not hide it.
    with pytest.raises(RuntimeError, match="Did you mean COCO-Detection/"):
        ask("COCO-Detections/faster_rcnn_R_50_FPN_3x.yaml")


def test_lazy_configs_are_outside():
    with pytest.raises(NotImplementedError, match="LazyConfig"):
        model_zoo.get_config("common/models/mask_rcnn_fpn.py")


def test_catalog_names():
    assert ModelCatalog.get("ImageNetPretrained/MSRA/R-50") == (
        "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl"
    )
    with pytest.raises(RuntimeError, match="ImageNetPretrained/MSRA/R-101"):
        ModelCatalog.get("ImageNetPretrained/MSRA/R-1")
