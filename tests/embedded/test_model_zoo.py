"""Names of published models, as far as the embedded engine knows them."""

from __future__ import annotations

import pytest

from detectron2 import model_zoo
from detectron2.checkpoint.catalog import ModelCatalog


@pytest.mark.parametrize("ending", ["", ".yaml"])
def test_address_of_known_weights(ending):
    """As in Detectron2's MODEL_ZOO.md."""
    assert model_zoo.get_checkpoint_url(f"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x{ending}") == (
        "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/"
        "137849600/model_final_f10217.pkl"
    )


def test_models_outside_the_subset_say_so():
    for ask in (model_zoo.get_checkpoint_url, model_zoo.get_config_file):
        with pytest.raises(RuntimeError, match="needs Detectron2"):
            ask("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")


def test_catalog_names():
    assert ModelCatalog.get("ImageNetPretrained/MSRA/R-50") == (
        "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl"
    )
    with pytest.raises(RuntimeError, match="ImageNetPretrained/MSRA/R-101"):
        ModelCatalog.get("ImageNetPretrained/MSRA/R-1")
