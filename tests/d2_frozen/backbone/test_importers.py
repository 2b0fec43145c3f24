"""Checkpoints with the names of public releases: recognised, loaded to the last bit, or refused by name.

The names are those that the training code of microsoft/Swin-Transformer, microsoft/SimMIM, microsoft/esvit,
facebookresearch/Mask2Former and SwinTransformer/Swin-Transformer-Object-Detection gives its tensors.
"""

from __future__ import annotations

import argparse
import logging
import re

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table_simple
from yacs.config import CfgNode

from d2_frozen.backbone import create_timm_backbone, load_weights, read_weights
from d2_frozen.backbone.importers import plan_import

SMALL = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
NAMES = {"Swin": "swin_tiny_patch4_window7_224", "SwinV2": "swinv2_tiny_window8_256"}


def small(kind: str, seed: int, file: str = ""):
    torch.manual_seed(seed)
    backbone = create_timm_backbone(NAMES[kind], file, arguments=SMALL).eval()
    if not file:  # SwinV2 starts with branches that are zero
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def microsoft_state(backbone, window: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a network under the names that Microsoft's code has for them, buffers and classifier included."""
    state = {}
    for name, value in backbone.network.state_dict().items():
        state[re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)] = (
            value
        )
    for name, module in backbone.network.named_modules():
        if name.endswith(".attn"):
            w = window or module.window_size[0]
            state[f"{name}.relative_position_index"] = torch.zeros(w * w, w * w, dtype=torch.long)
            if hasattr(module, "logit_scale"):
                state[f"{name}.relative_coords_table"] = torch.zeros(1, 2 * w - 1, 2 * w - 1, 2)
    for stage in range(3):
        state[f"layers.{stage}.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    channels = 8 * SMALL["embed_dim"]
    state["norm.weight"], state["norm.bias"] = torch.ones(channels), torch.zeros(channels)
    state["head.weight"], state["head.bias"] = torch.ones(10, channels), torch.zeros(10)
    return state


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def without(state: dict, *starts: str) -> dict:
    return {name: value for name, value in state.items() if not name.startswith(starts)}


def as_microsoft(state):
    # Training checkpoints of that code also hold its settings, as an object.
    return {"model": state, "config": CfgNode({"MODEL": {"NAME": "x"}}), "epoch": 3, "max_accuracy": 81.3}


def as_simmim(state):
    encoder = without(state, "head.")
    encoder["mask_token"] = torch.zeros(1, 1, SMALL["embed_dim"])
    decoder = {"decoder.0.weight": torch.zeros(3072, 128, 1, 1), "decoder.0.bias": torch.zeros(3072)}
    return as_microsoft({**prefixed("encoder.", encoder), **decoder})


def as_esvit(state):
    heads = {"head.mlp.0.weight": torch.ones(8, 128), "head.last_layer.weight_g": torch.ones(9, 1)}
    heads |= {f"head_dense.{name[5:]}": value for name, value in heads.items()}
    teacher = {**without(state, "head."), **heads}
    student = {name: value + 1 if value.is_floating_point() else value for name, value in teacher.items()}
    options = argparse.Namespace(arch="swin_tiny", epochs=300)
    return {"student": prefixed("module.", student), "teacher": teacher, "epoch": 1, "args": options}


def as_detector(state):
    norms = {f"norm{i}.{w}": torch.ones(16 * 2**i) for i in range(4) for w in ("weight", "bias")}
    backbone = prefixed("backbone.", {**without(state, "head.", "norm."), **norms})
    return {"state_dict": {**backbone, "rpn_head.rpn_conv.weight": torch.ones(2)}, "meta": {"epoch": 36}}


def as_mask2former(state):
    content = as_detector(state)["state_dict"]
    content["sem_seg_head.pixel_decoder.weight"] = torch.ones(2)
    return {"model": content, "__author__": "third_party"}


def as_teacher_of_wrapper(state):
    inner = prefixed("module.backbone.", without(state, "head."))
    return {"teacher": {**inner, "module.head.mlp.0.weight": torch.ones(2, 2)}}


LAYOUTS = {
    "Microsoft {} release": as_microsoft,
    "SimMIM {} pretraining": as_simmim,
    "EsViT {}, the teacher": as_esvit,
    "{} backbone of a detector": as_detector,
    "{} backbone of a detector (Swin-Detection, Mask2Former)": as_mask2former,
    "EsViT {}, the": as_teacher_of_wrapper,
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("label", LAYOUTS)
def test_public_layouts_give_equal_outputs_bit_for_bit(kind, label, tmp_path, caplog):
    original = small(kind, seed=0)
    torch.save(LAYOUTS[label](microsoft_state(original)), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="d2_frozen"):
        loaded = small(kind, seed=1, file=str(tmp_path / "w.pth"))
    assert label.format(kind) in caplog.text
    assert f"{len(original.state_dict())} tensors loaded" in caplog.text
    images = torch.randn(1, 3, 72, 100)
    with torch.no_grad():
        expected, maps = original(images), loaded(images)
    assert all(torch.equal(maps[name], expected[name]) for name in expected)


def test_timm_own_names_are_recognised():
    state = small("Swin", 0).network.state_dict()
    network = timm.create_model(NAMES["Swin"], num_classes=0, **SMALL)
    report = load_weights(network, prefixed("module.", state), "file", ignore=("norm.",))
    assert report.format == "timm Swin behind 'module.'" and report.loaded == len(state) and report.fits


def test_report_says_what_became_of_each_tensor():
    backbone = small("SwinV2", 0)
    content = as_simmim(microsoft_state(backbone))["model"]
    shapes = {name: tuple(value.shape) for name, value in content.items()}
    network = timm.create_model(NAMES["SwinV2"], num_classes=0, **SMALL)
    targets, report = plan_import(shapes, network, "file.pth", ignore=("norm.", "head."))
    assert report.dropped == {"decoder": 2, "norm": 2, "mask_token": 1}
    # 8 blocks: an index and a coordinate table each, and 3 masks.
    assert len(report.recomputed) == 2 * 8 + 3
    assert len(targets) + len(report.recomputed) + sum(report.dropped.values()) == len(shapes)
    assert targets["encoder.layers.0.downsample.reduction.weight"] == "layers.1.downsample.reduction.weight"
    assert "not of the backbone: decoder (2)" in report.summary()


def test_swin_tables_of_another_window_are_resized_and_reported(caplog):
    """SimMIM pretrains Swin with window 6 and fine-tunes with 7."""
    backbone = small("Swin", 0)
    state = microsoft_state(backbone, window=6)
    key = "layers.2.blocks.1.attn.relative_position_bias_table"
    for name in [n for n in state if n.endswith("relative_position_bias_table")]:
        state[name] = torch.randn(11 * 11, state[name].shape[1])
    network = timm.create_model(NAMES["Swin"], num_classes=0, **SMALL)
    with caplog.at_level(logging.INFO, logger="d2_frozen"):
        report = load_weights(network, state, "file", ignore=("norm.", "head."))
    assert report.windows[key] == "resized (window 6 to 7, bicubic)" and len(report.windows) == 8
    assert "8 position tables resized (window 6 to 7, bicubic)" in caplog.text
    expected = resize_rel_pos_bias_table_simple(state[key], (7, 7), (13 * 13, 4))
    assert torch.equal(network.get_parameter(key), expected)


def test_swin_v2_positions_of_another_window_are_recomputed_and_reported():
    backbone = small("SwinV2", 0)
    network = timm.create_model(NAMES["SwinV2"], num_classes=0, **SMALL)
    report = load_weights(network, microsoft_state(backbone, window=12), "file", ignore=("norm.", "head."))
    assert set(report.windows.values()) == {"recomputed (window 12 to 8)"} and len(report.windows) == 8


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_missing_left_over_or_of_another_shape_is_an_error_with_names(kind, tmp_path):
    state = microsoft_state(small(kind, 0))
    del state["layers.0.downsample.reduction.weight"]
    state["layers.1.blocks.0.adapter.weight"] = torch.ones(2)
    state["layers.3.blocks.0.mlp.fc1.bias"] = torch.ones(3)
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(ValueError) as error:
        small(kind, 1, str(tmp_path / "w.pth"))
    for fact in (
        f"Microsoft {kind} release",
        "1 missing: layers.1.downsample.reduction.weight",
        "1 unexpected: layers.1.blocks.0.adapter.weight",
        "layers.3.blocks.0.mlp.fc1.bias is (3,) in the file, (512,) in the network",
        "MODEL.TIMM.NAME",
    ):
        assert fact in str(error.value)


def test_a_file_of_the_other_swin_is_refused(tmp_path):
    torch.save({"model": microsoft_state(small("SwinV2", 0))}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"Microsoft SwinV2 release\) does not fit SwinTransformer:.*missing"
    ):
        small("Swin", 1, str(tmp_path / "w.pth"))


def test_releases_of_other_networks_go_through_timms_conversion():
    """DINOv2's release calls layer scale as timm does, but holds a mask token and positions of 518 pixels."""
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    donor = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=70, **shape)
    state = {**donor.state_dict(), "mask_token": torch.zeros(1, 16)}
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=98, **shape)
    report = load_weights(network, state, "dinov2.pth")
    assert report.format == "converted by timm" and network.pos_embed.shape == (1, 1 + 49, 16)
    assert torch.equal(network.blocks[0].ls1.gamma, donor.blocks[0].ls1.gamma)


def test_code_in_a_file_is_refused_settings_are_passed_over(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(x=1)}, tmp_path / "good.pth")
    assert list(read_weights(str(tmp_path / "good.pth"))) == ["a"]
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.ArgumentParser}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="weights_only"):
        read_weights(str(tmp_path / "bad.pth"))
