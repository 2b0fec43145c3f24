"""FrozenRCNN: every combination by yaml, and the plug-in into someone's own Detectron2 project."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from d2_frozen import engine_name
from d2_frozen.backbone import FrozenBackbone
from d2_frozen.detection import FrozenRCNN
from d2_frozen.summary import parts_table
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage

Config = Callable[..., CfgNode]
Image = Callable[[], dict]


@pytest.mark.parametrize("neck", ["FPN", "ResidualFPN", "BiFPN"])
@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
@pytest.mark.parametrize("freeze", ["all", "none", "res2"])
def test_any_combination_trains_by_yaml_alone(
    small_config: Config, labelled_image: Image, neck: str, heads: str, freeze: str
) -> None:
    options = ["MODEL.NECK.NAME", neck, "MODEL.ROI_HEADS.NAME", heads, "MODEL.BACKBONE.FREEZE", freeze]
    cfg = small_config(*options, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", heads != "StandardROIHeads")
    model = build_model(cfg)
    with EventStorage():
        losses = model([labelled_image()])
    sum(losses.values()).backward()
    bottom_up = model.backbone.bottom_up
    trained = {name for name, p in bottom_up.named_parameters() if p.grad is not None}
    trainable = {name for name, p in bottom_up.named_parameters() if p.requires_grad}
    assert trained == trainable
    assert bool(trainable) == (freeze != "all")
    if freeze == "res2":
        assert (
            "network.layer1.0.conv1.weight" not in trainable and "network.layer2.0.conv1.weight" in trainable
        )
    assert all(
        p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "mask_head" in n
    )
    model.eval()
    with torch.no_grad():
        found = model([labelled_image()])[0]["instances"]
    assert found.image_size == (64, 96) and found.has("pred_masks")


def test_parameter_names_are_those_of_detectron2_around_the_bottom_up_network(small_config: Config) -> None:
    names = set(build_model(small_config("MODEL.NECK.NAME", "FPN")).state_dict())
    assert {"backbone.fpn_lateral2.weight", "proposal_generator.rpn_head.conv.weight"} <= names
    assert "backbone.bottom_up.network.layer1.0.conv1.weight" in names


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads", "HTCROIHeads"])
def test_parts_are_the_whole_model(small_config: Config, heads: str) -> None:
    agnostic = heads != "StandardROIHeads"
    model = build_model(
        small_config("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)
    )
    assert isinstance(model, FrozenRCNN)
    counted = [p for _, part in model.parts() for p in part.parameters()]
    assert len(counted) == len(set(counted)) and set(counted) == set(model.parameters())
    table = parts_table(model)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in table
    assert "frozen" in next(line for line in table.splitlines() if line.startswith("backbone.bottom_up"))


def test_freezing_must_happen_where_the_config_says_so(small_config: Config) -> None:
    cfg = small_config(
        "MODEL.BACKBONE.NAME",
        "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES",
        ["res2", "res3", "res4", "res5"],
    )
    with pytest.raises(ValueError, match=r"MODEL.BACKBONE.FREEZE: all.*build_frozen_backbone"):
        build_model(cfg)


def test_a_zoo_resnet_freezes_under_a_bifpn(small_config: Config) -> None:
    cfg = small_config(
        *("MODEL.FROZEN.BOTTOM_UP", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
        *(
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            64,
            "MODEL.RESNETS.OUT_FEATURES",
            ["res2", "res3", "res4", "res5"],
        ),
    )
    model = build_model(cfg)
    assert isinstance(model.backbone.bottom_up, FrozenBackbone)
    assert "backbone.bottom_up.stem.conv1.weight" in model.state_dict()
    assert not any(p.requires_grad for p in model.backbone.bottom_up.parameters())


def test_plug_in_needs_the_config_call_and_a_backbone_name(small_config: Config) -> None:
    """Someone's own project: Detectron2's GeneralizedRCNN with our backbone."""
    model = build_model(small_config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    assert type(model).__name__ == "GeneralizedRCNN"
    assert isinstance(model.backbone.bottom_up, FrozenBackbone)


@pytest.mark.parametrize(("size", "batch"), [(128, (128, 128)), (100, (128, 128)), (64, (64, 96))])
def test_square_padding_of_test_images(
    small_config: Config, labelled_image: Image, size: int, batch: tuple[int, int]
) -> None:
    """64 x 96 pixels: padded up to a multiple of 32 at least SIZE, left alone where larger (multi-scale test)."""
    square = ("INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.TEST_RESIZE", "square")
    model = build_model(small_config(*square, "INPUT.SCALE_CROP.SIZE", size)).eval()
    image = labelled_image()
    images = model.preprocess_image([image])
    assert images.tensor.shape[-2:] == batch and images.image_sizes == [(64, 96)]
    whole = GeneralizedRCNN.preprocess_image(model, [image]).tensor
    assert torch.equal(images.tensor[..., :64, :96], whole)
    assert images.tensor.count_nonzero() == whole.count_nonzero()
    with torch.no_grad():
        found = model([image])[0]["instances"]
    assert found.image_size == (64, 96)


def test_no_square_unless_asked_for(small_config: Config, labelled_image: Image) -> None:
    model = build_model(small_config("INPUT.AUGMENTATION", "scale_crop", "INPUT.SCALE_CROP.SIZE", 256))
    assert model.preprocess_image([labelled_image()]).tensor.shape[-2:] == (64, 96)


@pytest.mark.parametrize(
    "key, value, missing",
    [("MODEL.NECK.NAME", "none", "p2"), ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p9"], "p9")],
)
def test_levels_that_the_backbone_does_not_give(
    small_config: Config, key: str, value: object, missing: str
) -> None:
    with pytest.raises(ValueError, match=f"ROI_HEADS.IN_FEATURES is .*the backbone gives no '{missing}'"):
        build_model(small_config(key, value))


def test_a_class_count_that_nobody_has_taken_from_the_data_is_refused(small_config: Config) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES is -1.*prepare_datasets"):
        build_model(small_config("MODEL.ROI_HEADS.NUM_CLASSES", -1))


@pytest.mark.skipif(engine_name() == "embedded", reason="needs an installed Detectron2")
def test_tracing_by_an_installed_detectron2_holds_for_other_images(small_config: Config) -> None:
    from detectron2.export import TracingAdapter

    weights = "d2_frozen://swinv2_pico_fdsl.safetensors"
    cfg = small_config("MODEL.TIMM.NAME", "swinv2_pico_window8_256", "MODEL.TIMM.PRETRAINED", weights)
    model = build_model(cfg).eval()
    with torch.no_grad():
        adapter = TracingAdapter(
            model, [{"image": torch.rand(3, 64, 96) * 255}], lambda m, x: m.inference(x, do_postprocess=False)
        )
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for height, width in ((64, 96), (96, 64)):
            image = torch.rand(3, height, width) * 255
            assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(adapter(image), traced(image)))
