"""Learning rates and weight decay of a bottom-up network that trains, by closed form."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from d2_frozen import add_frozen_config
from d2_frozen.engine import build_optimizer
from d2_frozen.summary import parts_table
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import build_resnet_backbone

RATE, DECAY = 1e-3, 0.05
SWIN = {"embed_dim": 16, "depths": [1, 2, 3, 1], "num_heads": [1, 2, 4, 8]}
VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 32}


def config(name: str, *pairs, **arguments):
    cfg = add_frozen_config(get_cfg())
    cfg.MODEL.TIMM.NAME = name
    for key, value in arguments.items():
        cfg.MODEL.TIMM.ARGS[key] = value
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.NECK.NAME = "FPN"
    defaults = ("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", RATE, "SOLVER.WEIGHT_DECAY", DECAY)
    cfg.merge_from_list([*defaults, "SOLVER.WEIGHT_DECAY_BIAS", 0.0, "MODEL.BACKBONE.FREEZE", "none", *pairs])
    return cfg


def model_of(cfg) -> nn.Module:
    model = nn.Module()
    model.backbone = BACKBONE_REGISTRY.get("build_frozen_backbone")(cfg, ShapeSpec(channels=3))
    model.head = nn.Linear(8, 2)
    return model


def settings(cfg, model) -> dict[str, tuple[float, float]]:
    """Name -> (learning rate, weight decay), from the optimiser."""
    name_of = {p: n for n, p in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    found = {name_of[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups), "each parameter once"
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    return found


def swin_layer(name: str) -> int | None:
    """Stem 0, then blocks 1..7 over the stages; merging with the first block of its stage. None above the network."""
    if not name.startswith("backbone.bottom_up."):
        return None
    match = re.search(r"layers\.(\d)\.(?:blocks\.(\d)|downsample)", name)
    return 1 + sum(SWIN["depths"][: int(match[1])]) + int(match[2] or 0) if match else 0


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_layer_decay_of_swin(name):
    cfg = config(name, "SOLVER.LAYER_DECAY", 0.8, "SOLVER.BACKBONE_MULTIPLIER", 0.5, **SWIN)
    for parameter, (rate, _) in settings(cfg, model_of(cfg)).items():
        layer = swin_layer(parameter)
        expected = RATE if layer is None else RATE * 0.5 * 0.8 ** (7 + 1 - layer)
        assert rate == pytest.approx(expected), parameter


def test_layer_decay_of_a_plain_vit():
    """ViTDet: patches and positions layer 0, blocks 1..3, the final norm as the neck."""
    cfg = config("vit_tiny_patch16_224", "SOLVER.LAYER_DECAY", 0.7, **VIT)
    for parameter, (rate, _) in settings(cfg, model_of(cfg)).items():
        block = re.search(r"network\.blocks\.(\d)", parameter)
        if block:
            expected = RATE * 0.7 ** (3 - int(block[1]))
        elif re.search(r"network\.(patch_embed|pos_embed|cls_token)", parameter):
            expected = RATE * 0.7**4
        else:
            expected = RATE
        assert rate == pytest.approx(expected), parameter


def test_multiplier_alone_is_one_rate_for_the_network():
    cfg = config("resnet18", "SOLVER.BACKBONE_MULTIPLIER", 0.1)
    for parameter, (rate, _) in settings(cfg, model_of(cfg)).items():
        inside = parameter.startswith("backbone.bottom_up.")
        assert rate == pytest.approx(RATE * (0.1 if inside else 1.0)), parameter


def test_layer_decay_of_detectron2s_resnet_goes_by_stages():
    cfg = config("resnet18", "SOLVER.LAYER_DECAY", 0.5, "MODEL.FROZEN.BOTTOM_UP", "build_resnet_backbone")
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]])
    cfg.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN"])
    assert build_resnet_backbone is BACKBONE_REGISTRY.get("build_resnet_backbone")
    parts = {"stem": 5, "res2": 4, "res3": 3, "res4": 2, "res5": 1}
    for parameter, (rate, _) in settings(cfg, model_of(cfg)).items():
        part = parameter.split(".")[2] if ".bottom_up." in parameter else ""
        assert rate == pytest.approx(RATE * 0.5 ** parts.get(part, 0)), parameter


def test_partly_frozen_networks_keep_their_layer_numbers():
    cfg = config("swin_tiny_patch4_window7_224", "SOLVER.LAYER_DECAY", 0.8, **SWIN)
    cfg.MODEL.BACKBONE.FREEZE = "res3"
    found = settings(cfg, model_of(cfg))
    inside = {n: rate for n, (rate, _) in found.items() if ".bottom_up." in n}
    assert {swin_layer(n) for n in inside} == {4, 5, 6, 7}
    assert all(rate == pytest.approx(RATE * 0.8 ** (8 - swin_layer(n))) for n, rate in inside.items())


@pytest.mark.parametrize(
    ("name", "arguments", "free"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, r"relative_position_bias_table|norm|bias$"),
        ("swinv2_tiny_window8_256", SWIN, r"logit_scale|cpb_mlp|norm|bias$"),
        ("vit_small_patch14_reg4_dinov2", VIT, r"pos_embed|cls_token|reg_token|norm|gamma|bias$"),
        ("convnext_atto", {}, r"norm|stem\.1|downsample\.0|gamma|bias$"),
    ],
)
def test_what_has_no_weight_decay(name, arguments, free):
    cfg = config(name, **arguments)
    found = settings(cfg, model_of(cfg))
    inside = {n: decay for n, (_, decay) in found.items() if ".network." in n}
    wrong = [n for n, decay in inside.items() if decay != (0.0 if re.search(free, n) else DECAY)]
    assert not wrong
    assert {rate for rate, _ in found.values()} == {RATE}


def test_detectron2s_layer_norm_counts_as_norm():
    cfg = config("vit_tiny_patch16_224", "MODEL.FPN.NORM", "LN", "MODEL.BACKBONE.FREEZE", "all", **VIT)
    model = model_of(cfg)
    model.norm = get_norm("LN", 4)
    assert settings(cfg, model)["norm.weight"] == (RATE, 0.0)


@pytest.mark.parametrize("key", ["LAYER_DECAY", "BACKBONE_MULTIPLIER"])
def test_rates_of_a_frozen_network_are_an_error(key):
    cfg = config("resnet18", f"SOLVER.{key}", 0.5, "MODEL.BACKBONE.FREEZE", "all")
    with pytest.raises(ValueError, match=rf"SOLVER.{key} is 0.5, but MODEL.BACKBONE.FREEZE is 'all'"):
        build_optimizer(cfg, model_of(cfg))


@pytest.mark.parametrize(
    ("key", "value"), [("LAYER_DECAY", 0.0), ("LAYER_DECAY", 1.5), ("BACKBONE_MULTIPLIER", 0.0)]
)
def test_values_out_of_range(key, value):
    cfg = config("resnet18", f"SOLVER.{key}", value)
    with pytest.raises(ValueError, match=f"SOLVER.{key} is {value}"):
        build_optimizer(cfg, model_of(cfg))


def test_parts_table_shows_rates_and_decay():
    cfg = config("swin_tiny_patch4_window7_224", "SOLVER.LAYER_DECAY", 0.5, **SWIN)
    model = model_of(cfg)
    table = parts_table(model, build_optimizer(cfg, model)).splitlines()
    assert "learning rate" in table[0] and "weight decay" in table[0]
    (row,) = [line for line in table if line.startswith("backbone.bottom_up ")]
    assert f"{RATE / 2**8:.3g} .. {RATE / 2:.3g}" in row and "0 .. 0.05" in row
    assert "learning rate" not in parts_table(model)


def test_one_step_moves_by_the_rate():
    """AdamW's first step is the learning rate itself, against the sign of the gradient."""
    cfg = config(
        "swin_tiny_patch4_window7_224", "SOLVER.LAYER_DECAY", 0.5, "SOLVER.WEIGHT_DECAY", 0.0, **SWIN
    )
    model = model_of(cfg)
    optimizer = build_optimizer(cfg, model)
    weight = model.backbone.bottom_up.network.patch_embed.proj.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(before - weight, torch.full_like(weight, RATE * 0.5**8), atol=1e-7)


def test_learned_queries_have_their_own_decay_and_the_heads_rate() -> None:
    rates = ("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.WEIGHT_DECAY_EMBED", 0.01)
    cfg = config("swin_tiny_patch4_window7_224", *rates, **SWIN)
    model = model_of(cfg)
    model.queries = nn.Embedding(3, 8)
    found = settings(cfg, model)
    assert found["queries.weight"] == (RATE, 0.01)
    assert found["head.weight"] == (RATE, DECAY)
    assert found["backbone.bottom_up.network.layers.0.blocks.0.mlp.fc1.weight"] == (
        pytest.approx(RATE / 10),
        DECAY,
    )
