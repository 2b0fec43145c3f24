"""Necks by config: names, frozen bottom-up network, padding rules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_frozen import add_frozen_config
from d2_frozen.backbone import FrozenBackbone
from d2_frozen.neck import NECK_REGISTRY, BiFPN, ResidualFPN, build_neck
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN

NECKS = {"FPN": FPN, "ResidualFPN": ResidualFPN, "BiFPN": BiFPN}


def config(*pairs):
    cfg = add_frozen_config(get_cfg())
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.BIFPN.NUM_LAYERS = 1
    cfg.MODEL.RESIDUAL_FPN.NUM_BLOCKS = 2
    cfg.merge_from_list(list(pairs))
    return cfg


@pytest.fixture
def registered_bottom_up(make_bottom_up):
    def build_tiny(cfg, input_shape):
        return make_bottom_up()

    name = "build_tiny_bottom_up_of_test_build"
    build_tiny.__name__ = name
    if name not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(build_tiny)
    return name


@pytest.mark.parametrize("name", NECKS)
def test_each_neck_gives_p2_to_p6(name, tiny_bottom_up):
    neck = build_neck(config("MODEL.NECK.NAME", name), tiny_bottom_up)
    assert isinstance(neck, NECKS[name])
    assert neck.bottom_up is tiny_bottom_up
    out = neck(torch.zeros(1, 3, 64, 96))
    assert {key: value.shape[-2:] for key, value in out.items()} == {
        "p2": (16, 24), "p3": (8, 12), "p4": (4, 6), "p5": (2, 3), "p6": (1, 2),
    }  # fmt: skip
    assert {key: spec.stride for key, spec in neck.output_shape().items()} == {
        "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64,
    }  # fmt: skip


@pytest.mark.parametrize("name", NECKS)
def test_padding_rules_come_from_both(name, make_bottom_up):
    cfg = config("MODEL.NECK.NAME", name)
    assert build_neck(cfg, make_bottom_up()).size_divisibility == 32
    assert build_neck(cfg, make_bottom_up(divisibility=128)).size_divisibility == 128
    square = build_neck(cfg, make_bottom_up(constraints={"square_size": 256}))
    assert square.padding_constraints["square_size"] == 256


def test_unknown_neck_lists_the_choices(tiny_bottom_up):
    with pytest.raises(ValueError, match="MODEL.NECK.NAME is 'PAFPN'; choose one of FPN, ResidualFPN, BiFPN"):
        build_neck(config("MODEL.NECK.NAME", "PAFPN"), tiny_bottom_up)


@pytest.mark.parametrize("name", NECKS)
def test_frozen_below_trained_above(name, registered_bottom_up):
    cfg = config("MODEL.NECK.NAME", name, "MODEL.FROZEN.BOTTOM_UP", registered_bottom_up)
    backbone = BACKBONE_REGISTRY.get("build_frozen_backbone")(cfg, ShapeSpec(channels=3))
    names = [key for key, _ in backbone.named_parameters()]
    frozen = [key for key, p in backbone.named_parameters() if not p.requires_grad]
    assert frozen == [key for key in names if key.startswith("bottom_up.")] != []
    assert "bottom_up.convs.0.weight" in names  # as without the wrapper
    sum(level.square().mean() for level in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    assert all((p.grad is None) == (key in frozen) for key, p in backbone.named_parameters())


def test_residual_fpn_starts_as_the_plain_fpn(make_bottom_up):
    """Equal seeds give equal FPN weights, as the blocks are made last; each starts as the identity."""
    outs = []
    for name in ("FPN", "ResidualFPN"):
        torch.manual_seed(3)
        neck = build_neck(config("MODEL.NECK.NAME", name), make_bottom_up()).eval()
        outs.append(neck(torch.ones(1, 3, 64, 64)))
    assert all(torch.equal(outs[0][level], outs[1][level]) for level in outs[0])
    blocks = [key for key, _ in neck.named_parameters() if ".conv1." in key]
    assert len(blocks) == 4 * 2  # levels x blocks


def test_no_neck_is_the_bottom_up_network_itself(tiny_bottom_up):
    assert build_neck(config("MODEL.NECK.NAME", "none"), tiny_bottom_up) is tiny_bottom_up


def test_stochastic_depth_of_a_frozen_network_is_pointed_out(registered_bottom_up, caplog):
    cfg = config("MODEL.FROZEN.BOTTOM_UP", registered_bottom_up, "MODEL.TIMM.DROP_PATH_RATE", 0.2)
    build = BACKBONE_REGISTRY.get("build_frozen_backbone")
    build(cfg, ShapeSpec(channels=3))
    assert "MODEL.TIMM.DROP_PATH_RATE is 0.2, but MODEL.BACKBONE.FREEZE: all" in caplog.text
    caplog.clear()
    cfg.MODEL.BACKBONE.FREEZE = "none"
    build(cfg, ShapeSpec(channels=3))
    assert not caplog.text


@pytest.mark.parametrize("name", list(NECKS))
def test_channels_that_group_norm_cannot_divide(make_bottom_up, name):
    cfg = config("MODEL.NECK.NAME", name, "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 48)
    with pytest.raises(ValueError, match="MODEL.FPN.OUT_CHANNELS is 48, but MODEL.FPN.NORM GN has 32 groups"):
        build_neck(cfg, make_bottom_up())


def test_a_neck_of_your_own_is_found_by_its_name(registered_bottom_up):
    class Lateral(Backbone):
        """One 1x1 convolution per level."""

        def __init__(self, cfg, bottom_up):
            super().__init__()
            self.bottom_up, self.width = bottom_up, cfg.MODEL.FPN.OUT_CHANNELS
            self.shapes = bottom_up.output_shape()
            self.lateral = nn.ModuleDict(
                {name: nn.Conv2d(spec.channels, self.width, 1) for name, spec in self.shapes.items()}
            )

        def forward(self, images):
            return {f"p{name[3:]}": self.lateral[name](x) for name, x in self.bottom_up(images).items()}

        def output_shape(self):
            return {
                f"p{k[3:]}": ShapeSpec(channels=self.width, stride=s.stride) for k, s in self.shapes.items()
            }

    cfg = config("MODEL.NECK.NAME", "LateralOfTestBuild", "MODEL.FROZEN.BOTTOM_UP", registered_bottom_up)
    with pytest.raises(
        ValueError, match="LateralOfTestBuild.*registers itself in d2_frozen.neck.NECK_REGISTRY"
    ):
        BACKBONE_REGISTRY.get("build_frozen_backbone")(cfg, ShapeSpec(channels=3))
    Lateral.__name__ = "LateralOfTestBuild"
    NECK_REGISTRY.register(Lateral)
    neck = BACKBONE_REGISTRY.get("build_frozen_backbone")(cfg, ShapeSpec(channels=3))
    assert isinstance(neck.bottom_up, FrozenBackbone)
    assert {name: x.shape[1:] for name, x in neck(torch.zeros(1, 3, 64, 64)).items()} == {
        "p2": (8, 16, 16), "p3": (8, 8, 8), "p4": (8, 4, 4), "p5": (8, 2, 2),
    }  # fmt: skip
    assert {name.split(".")[0] for name, p in neck.named_parameters() if p.requires_grad} == {"lateral"}


RESNET = (
    *("MODEL.FROZEN.BOTTOM_UP", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
)


@pytest.mark.parametrize(
    ("freeze", "frozen"), [("none", []), ("stem", ["stem"]), ("res3", ["res2", "res3", "stem"])]
)
def test_freeze_decides_for_detectron2s_builders_too(freeze, frozen):
    """Their FREEZE_AT is 2 by default: stem and res2. Norms of what is frozen keep their statistics, others do not."""
    cfg = config(*RESNET, "MODEL.BACKBONE.FREEZE", freeze, "MODEL.RESNETS.NORM", "BN")
    cfg.freeze()
    resnet = BACKBONE_REGISTRY.get("build_frozen_bottom_up")(cfg, ShapeSpec(channels=3)).train()
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2 and cfg.is_frozen()
    assert sorted({n.split(".")[0] for n, p in resnet.named_parameters() if not p.requires_grad}) == frozen
    before = {key: value.clone() for key, value in resnet.state_dict().items()}
    resnet(torch.rand(2, 3, 64, 64))
    moved = {
        key.split(".")[0] for key, value in resnet.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"stem", "res2", "res3", "res4", "res5"} - set(frozen)
