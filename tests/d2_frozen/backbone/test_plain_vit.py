"""Plain ViTs: one map on Detectron2's strides, at any image size, without class and register tokens."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from d2_frozen import tasks
from d2_frozen.backbone import FrozenBackbone, PlainViT, create_timm_backbone, freeze_backbone, save_weights
from d2_frozen.backbone.timm_backbone import build_timm_backbone
from detectron2.layers import ShapeSpec

SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2}
NAMES = {
    "vit_base_patch16_224.augreg_in21k": 16,
    "vit_small_patch14_dinov2.lvd142m": 16,
    "vit_small_patch14_reg4_dinov2.lvd142m": 16,
    "vit_small_patch16_dinov3.lvd1689m": 16,
    "vit_base_patch16_clip_224.openai": 16,
    "vit_base_patch16_224.mae": 16,
    "vit_small_patch8_224.dino": 8,
    "vit_base_patch32_224": 32,
    "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k": 16,
    "deit3_small_patch16_224": 16,
}


def small(name: str, seed: int = 0, **arguments) -> PlainViT:
    torch.manual_seed(seed)
    return create_timm_backbone(name, arguments={**SMALL, **arguments}).eval()


@pytest.mark.parametrize("name", NAMES)
def test_names_and_strides(name):
    stride = NAMES[name]
    with torch.device("meta"):
        backbone = create_timm_backbone(name, arguments=SMALL)
        maps = backbone(torch.empty(2, 3, 96, 160))
    assert timm.is_model_pretrained(name) or "." not in name
    assert {n: tuple(m.shape) for n, m in maps.items()} == {"plain": (2, 32, 96 // stride, 160 // stride)}
    shape = backbone.output_shape()["plain"]
    assert (shape.channels, shape.stride, backbone.size_divisibility) == (32, stride, stride)


def test_map_is_the_patch_tokens_behind_the_final_norm():
    name = "vit_small_patch14_reg4_dinov2"
    backbone = small(name, patch_size=16, img_size=64)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = backbone.network.forward_features(images)
        assert tokens.shape == (1, 1 + 4 + 16, 32)
        expected = tokens[:, 5:].transpose(1, 2).reshape(1, 32, 4, 4)
        assert torch.equal(backbone(images)["plain"], expected)


def test_patches_of_14_pixels_see_the_image_shrunk_by_14_16ths():
    name = "vit_small_patch14_dinov2"
    backbone = small(name, img_size=70)
    assert backbone.network.patch_embed.proj.weight.shape[-2:] == (14, 14), "weights stay those of the file"
    images = torch.randn(1, 3, 64, 96)
    shrunk = F.interpolate(images, (56, 84), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = backbone.network.forward_intermediates(
            shrunk, indices=1, norm=True, intermediates_only=True
        )[-1]
        assert torch.equal(backbone(images)["plain"], expected)
    assert expected.shape[-2:] == (4, 6)


def test_positions_are_interpolated():
    """At the size of pretraining the table is used as it is; elsewhere a constant table stays constant."""
    backbone = small("vit_tiny_patch16_224", img_size=64)
    torch.nn.init.normal_(backbone.network.pos_embed)
    images = torch.zeros(1, 3, 32, 96)
    with torch.no_grad():
        moved = backbone(images)["plain"]
        assert (moved - moved.mean((2, 3), keepdim=True)).abs().max() > 0.1, "cells know where they are"
        backbone.network.pos_embed[:] = 1.0
        still = backbone(images)["plain"]
    assert torch.allclose(still, still.mean((2, 3), keepdim=True), atol=1e-5)


def test_norm_behind_the_pooling_acts_on_each_cell():
    backbone = small("eva02_tiny_patch14_224", img_size=56)
    with torch.no_grad():
        cells = backbone(torch.randn(1, 3, 64, 64))["plain"]
    assert torch.allclose(cells.mean(1), torch.zeros(1, 4, 4), atol=1e-5)
    assert (
        "network.norm.weight" in backbone.state_dict()
        and "network.fc_norm.weight" not in backbone.state_dict()
    )


def test_a_side_that_does_not_fit_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="40x64 pixels.*multiples of 16"):
        small("vit_tiny_patch16_224")(torch.zeros(1, 3, 40, 64))


def test_features_of_a_pyramid_are_not_asked_of_a_plain_vit():
    with pytest.raises(ValueError, match="OUT_FEATURES.*plain ViT with one map.*MODEL.FPN.IN_FEATURES"):
        create_timm_backbone("vit_tiny_patch16_224", out_features=["res4"], arguments=SMALL)


def test_stages_are_quarters_of_the_blocks():
    backbone = small("vit_tiny_patch16_224", depth=6)
    stem, *quarters = backbone.parameters_by_stage()
    assert {n.split(".")[1] for n in stem} == {"cls_token", "pos_embed", "patch_embed"}
    blocks = [sorted({int(n.split(".")[2]) for n in part if ".blocks." in n}) for part in quarters]
    assert blocks == [[0, 1], [2], [3, 4], [5]]
    assert "network.norm.weight" in quarters[-1]
    assert sorted(n for p in [stem, *quarters] for n in p) == sorted(
        n for n, _ in backbone.named_parameters()
    )
    partly = freeze_backbone(backbone, "res3")
    trained = {n.split(".")[2] for n, p in partly.named_parameters() if p.requires_grad and ".blocks." in n}
    assert trained == {"3", "4", "5"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_small_patch16_rope_mixed_224", "rope"),
        ("vit_base_patch16_clip_224", "norm_pre"),
        ("vit_small_patch14_reg4_dinov2", "reg_token"),
    ],
)
def test_what_every_block_depends_on_belongs_to_the_stem(name, part):
    """timm's groups have learned rotary frequencies behind the last block; before 1.0.31, the two others with it or
    behind it."""
    backbone = small(name)
    stem, *blocks = backbone.parameters_by_layer()
    assert part in {n.split(".")[1] for n in stem}
    assert [{n.split(".")[2] for n in block} for block in blocks] == [{"0"}, {"1"}, {"2"}, {"3"}]
    partly = freeze_backbone(backbone, "stem")
    trained = {n.split(".")[1] for n, p in partly.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "norm"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen(precision):
    exact = small("vit_small_patch14_dinov2", img_size=56)
    frozen = FrozenBackbone(exact, precision).train()
    images = torch.randn(1, 3, 64, 64)
    out = frozen(images)["plain"]
    assert out.dtype == torch.float32 and not out.requires_grad
    assert torch.allclose(out, exact(images)["plain"], atol=0.15 if precision == "bf16" else 0)


def test_weights_of_another_image_size_from_a_file(tmp_path):
    """Position tables of a file are interpolated by timm to the size that the network is built for."""
    donor = small("vit_small_patch14_dinov2", seed=1, img_size=70)
    state = {**donor.network.state_dict(), "head.weight": torch.ones(3, 32)}
    save_weights(state, tmp_path / "vit.safetensors")
    arguments = {**SMALL, "img_size": 98}
    backbone = create_timm_backbone(
        "vit_small_patch14_dinov2", str(tmp_path / "vit.safetensors"), arguments=arguments
    )
    assert backbone.network.pos_embed.shape == (1, 1 + 7 * 7, 32)
    assert torch.equal(backbone.network.norm.weight, donor.network.norm.weight)
    del state["norm.weight"]
    save_weights(state, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="1 missing: norm.weight"):
        create_timm_backbone(
            "vit_small_patch14_dinov2", str(tmp_path / "vit.safetensors"), arguments=arguments
        )


def test_weights_made_with_other_pixels_are_told(tmp_path, caplog):
    """CLIP's mean and deviation in 0..1 times 255, for RGB; with them all is well. Detectron2's defaults are wrong in
    all three; of a name without tag only the order of channels is known."""
    name, file = "vit_base_patch16_clip_224.openai", str(tmp_path / "clip.safetensors")
    save_weights(small(name).state_dict(), file)

    def told(name: str, pretrained: str, form: str, mean: list, std: list) -> str:
        caplog.clear()
        cfg = tasks.read_config("", ["MODEL.TIMM.NAME", name, "INPUT.FORMAT", form])
        cfg.MODEL.TIMM.ARGS.update(SMALL)
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = pretrained, mean, std
        build_timm_backbone(cfg, ShapeSpec(channels=3))
        return caplog.text

    defaults = ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
    mean, std = [122.771, 116.746, 104.094], [68.501, 66.632, 70.323]
    assert "its weights" not in told(name, "", *defaults)  # random weights were made with nothing
    wanted = f"made with INPUT.FORMAT RGB, MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}, but the config has BGR, "
    assert f"{wanted}{defaults[1]}, {defaults[2]}. " in told(name, file, *defaults)
    assert "made with INPUT.FORMAT RGB, but" in told(name.split(".")[0], file, *defaults)
    assert "its weights" not in told(name, file, "RGB", mean, std)
