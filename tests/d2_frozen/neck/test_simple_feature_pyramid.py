"""The pyramid of a plain ViT: strides, sizes, and where the frozen part ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_frozen import add_frozen_config
from d2_frozen.backbone import FrozenBackbone
from d2_frozen.neck import PlainPyramid, SimpleFeaturePyramid, build_neck
from d2_frozen.summary import backbone_parts
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage


class Plain(Backbone):
    """One map of a given stride; each cell is the mean of its pixels, times a weight."""

    def __init__(self, stride: int = 16, channels: int = 32) -> None:
        super().__init__()
        self.stride, self.scale = stride, nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, images):
        return {"plain": nn.functional.avg_pool2d(images.mean(1, keepdim=True), self.stride) * self.scale}

    def output_shape(self):
        return {"plain": ShapeSpec(channels=len(self.scale), stride=self.stride)}

    @property
    def size_divisibility(self):
        return self.stride


def config(neck: str, name: str = "vit_tiny_patch16_224"):
    cfg = add_frozen_config(get_cfg())
    cfg.MODEL.NECK.NAME = neck
    cfg.MODEL.TIMM.NAME = name
    for key, value in {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}.items():
        cfg.MODEL.TIMM.ARGS[key] = value
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.NORM = "LN"
    cfg.MODEL.BIFPN.NUM_LAYERS = 1
    return cfg


@pytest.mark.parametrize(
    ("stride", "channels"), [(8, (16, 32, 32, 32)), (16, (8, 16, 32, 32)), (32, (4, 8, 16, 32))]
)
def test_branches_double_or_halve_the_map(stride, channels):
    """Channels halve with each deconvolution, as in ViTDet; pooling leaves them."""
    pyramid = PlainPyramid(Plain(stride))
    maps = pyramid(torch.randn(1, 3, 64, 96))
    assert {n: tuple(m.shape) for n, m in maps.items()} == {
        f"res{i + 2}": (1, channels[i], 64 >> i + 2, 96 >> i + 2) for i in range(4)
    }
    assert {n: (s.channels, s.stride) for n, s in pyramid.output_shape().items()} == {
        f"res{i + 2}": (channels[i], 4 << i) for i in range(4)
    }
    assert pyramid.size_divisibility == 32


def test_own_stride_is_the_map_itself_and_half_is_its_maximum():
    plain = Plain()
    images = torch.randn(1, 3, 64, 64)
    maps, source = PlainPyramid(plain)(images), plain(images)["plain"]
    assert torch.equal(maps["res4"], source)
    assert torch.equal(maps["res5"], nn.functional.max_pool2d(source, 2))


def test_levels_of_the_neck():
    neck = SimpleFeaturePyramid(Plain(), ["res2", "res3", "res4", "res5"], 16)
    out = neck(torch.randn(2, 3, 64, 96))
    assert {n: tuple(m.shape) for n, m in out.items()} == {
        f"p{i}": (2, 16, -(-64 // 2**i), -(-96 // 2**i)) for i in range(2, 7)
    }
    assert {n: (s.channels, s.stride) for n, s in neck.output_shape().items()} == {
        f"p{i}": (16, 2**i) for i in range(2, 7)
    }
    assert neck.size_divisibility == 32
    assert torch.equal(out["p6"], out["p5"][..., ::2, ::2])


def test_parameters_of_the_neck():
    """ViTDet's: deconvolutions 32 -> 16 -> 8 with a norm between, 32 -> 16; per level a 1x1 and a 3x3 with norm."""
    neck = SimpleFeaturePyramid(Plain(), ["res2", "res3", "res4", "res5"], 16)
    own = sum(p.numel() for n, p in neck.named_parameters() if not n.startswith("bottom_up."))
    branches = (4 * 32 * 16 + 16) + 2 * 16 + (4 * 16 * 8 + 8) + (4 * 32 * 16 + 16)
    outputs = sum(c * 16 + 2 * 16 + 9 * 16 * 16 + 2 * 16 for c in (8, 16, 32, 32))
    assert own == branches + outputs


@pytest.mark.parametrize("neck", ["SimpleFeaturePyramid", "FPN", "ResidualFPN", "BiFPN"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_every_neck_on_a_frozen_vit_trains_all_but_the_vit(neck, name):
    backbone = BACKBONE_REGISTRY.get("build_frozen_backbone")(config(neck, name), ShapeSpec(channels=3))
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.values()] == [
        (1, 16, -(-64 // 2**i), -(-96 // 2**i)) for i in range(2, 7)
    ]
    assert backbone.size_divisibility == 32
    sum(m.square().mean() for m in maps.values()).backward()
    (prefix,) = [n for n, m in backbone.named_modules() if isinstance(m, FrozenBackbone)]
    for parameter_name, parameter in backbone.named_parameters():
        inside = parameter_name.startswith(f"{prefix}.")
        assert parameter.requires_grad != inside and (parameter.grad is None) == inside
    parts = list(backbone_parts("backbone", backbone))
    expected = ["bottom_up", "neck"] if neck == "SimpleFeaturePyramid" else ["bottom_up", "pyramid", "neck"]
    assert [part.split(".")[-1] for part, _ in parts] == expected
    assert sum(p.numel() for _, part in parts for p in part.parameters()) == sum(
        p.numel() for p in backbone.parameters()
    )


def test_wrong_uses_are_named():
    with pytest.raises(ValueError, match="SimpleFeaturePyramid is for plain ViTs"):
        cfg = config("SimpleFeaturePyramid")
        cfg.MODEL.TIMM.NAME = "resnet18"
        cfg.MODEL.TIMM.ARGS.clear()
        BACKBONE_REGISTRY.get("build_frozen_backbone")(cfg, ShapeSpec(channels=3))
    with pytest.raises(ValueError, match=r"MODEL.FPN.IN_FEATURES is \['res6'\]"):
        PlainPyramid(Plain(), ["res6"])


BOXES = {"MODEL.RPN.IN_FEATURES": ["res4"], "MODEL.ROI_HEADS.IN_FEATURES": ["res4"]}
PIXELS = {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res5"]}


@pytest.mark.parametrize(
    ("architecture", "options", "levels"),
    [
        ("FrozenRCNN", BOXES, ["res4"]),
        ("FrozenRCNN", {**BOXES, "MODEL.ROI_HEADS.IN_FEATURES": ["res5", "res4"]}, ["res4", "res5"]),
        (
            "FrozenRCNN",
            {**BOXES, "MODEL.HTC.SEMANTIC_ON": True, "MODEL.HTC.SEMANTIC_IN_FEATURES": ["res3"]},
            ["res3", "res4"],
        ),
        ("ProposalNetwork", {**BOXES, "MODEL.ROI_HEADS.IN_FEATURES": ["res2"]}, ["res4"]),
        ("FrozenSegmentor", PIXELS, ["res2", "res5"]),
        ("SomebodysOwn", BOXES, ["res2", "res3", "res4", "res5"]),
    ],
)
def test_without_neck_a_vit_has_the_levels_that_heads_read(architecture, options, levels):
    cfg = config("none")
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", architecture, *(item for pair in options.items() for item in pair)]
    )
    assert list(build_neck(cfg, Plain()).output_shape()) == levels


def test_without_neck_all_of_a_detector_on_a_vit_trains():
    """A branch that no head reads would get no gradient, which DistributedDataParallel refuses."""
    cfg = config("none")
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "FrozenRCNN", "MODEL.BACKBONE.NAME", "build_frozen_backbone"),
            *("MODEL.RPN.IN_FEATURES", ["res3"], "MODEL.ROI_HEADS.IN_FEATURES", ["res3"]),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 2),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.DEVICE", "cpu"),
            *("MODEL.PIXEL_MEAN", [120.0] * 3, "MODEL.PIXEL_STD", [60.0] * 3),
        ]
    )
    model = build_model(cfg).train()
    boxes = Boxes(torch.tensor([[8.0, 8.0, 56.0, 56.0]]))
    objects = Instances((64, 96), gt_boxes=boxes, gt_classes=torch.tensor([1]))
    with EventStorage():
        sum(model([{"image": torch.full((3, 64, 96), 90.0), "instances": objects}]).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any("branches.res3" in n for n, _ in model.named_parameters())
