"""SwinV2-G: its size, its norms, and that it is SwinV2 otherwise. Built without memory for its weights."""

from __future__ import annotations

import pytest
import timm
import torch

from d2_frozen import add_frozen_config
from d2_frozen.backbone import build_timm_backbone, create_timm_backbone
from d2_frozen.backbone.swin_v2_giant import GIANT_NAME as GIANT
from d2_frozen.backbone.swin_v2_giant import SwinV2WithMainNorms
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

SMALL = {"embed_dim": 32, "depths": (1, 1, 7, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "img_size": 64}


def block_parameters(channels: int, heads: int) -> int:
    """q and v biases only; logit scale; 2 -> 512 -> heads for positions; four times wider inside; two norms."""
    attention = channels * 3 * channels + 2 * channels + channels * channels + channels
    positions = heads + (2 * 512 + 512) + 512 * heads
    mlp = 2 * 4 * channels * channels + 4 * channels + channels
    return attention + positions + mlp + 2 * 2 * channels


def giant_parameters() -> dict[str, int]:
    channels, depths = (512, 1024, 2048, 4096), (2, 2, 42, 4)
    return {
        "patches": 4 * 4 * 3 * 512 + 512 + 2 * 512,
        "blocks": sum(d * block_parameters(c, c // 32) for c, d in zip(channels, depths)),
        "merging": sum(4 * c * 2 * c + 2 * 2 * c for c in channels[:3]),
        "extra norms": 7 * 2 * 2048,
    }


def test_giant_has_2_998_billion_parameters():
    """2.998 B is the pyramid's count, with or without the final norm; with a classifier it would be 3.002 B."""
    with torch.device("meta"):
        whole = timm.create_model(GIANT)
        backbone = create_timm_backbone(GIANT)
    expected = sum(giant_parameters().values())
    assert sum(p.numel() for p in backbone.parameters()) == expected == 2_997_835_488
    norm_and_classifier = 2 * 4096 + 4096 * 1000 + 1000
    assert sum(p.numel() for p in whole.parameters()) == expected + norm_and_classifier == 3_001_940_680
    assert {k: (s.channels, s.stride) for k, s in backbone.output_shape().items()} == {
        "res2": (512, 4), "res3": (1024, 8), "res4": (2048, 16), "res5": (4096, 32),
    }  # fmt: skip


def test_giant_norms_window_and_heads():
    with torch.device("meta"):
        stages = create_timm_backbone(GIANT).network.layers
    assert [[i for i, b in enumerate(stage.blocks) if hasattr(b, "norm3")] for stage in stages] == [
        [], [], [5, 11, 17, 23, 29, 35, 41], [],
    ]  # fmt: skip
    assert [stage.blocks[0].attn.num_heads for stage in stages] == [16, 32, 64, 128]
    assert {b.window_size for stage in stages for b in stage.blocks} == {(12, 12)}
    assert [stage.blocks[1].shift_size for stage in stages] == [(6, 6)] * 4


def test_without_further_norms_it_is_timms_swin_v2():
    torch.manual_seed(0)
    ours = SwinV2WithMainNorms(main_norm_period=0, **SMALL)
    theirs = timm.models.swin_transformer_v2.SwinTransformerV2(**SMALL)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_main_branch_is_normalised_behind_the_sixth_block():
    stage = SwinV2WithMainNorms(**SMALL).layers[2].eval()
    x = torch.randn(1, 8, 8, 64)
    out = stage.downsample(x)
    for block in stage.blocks[:6]:
        out = block(out)
    assert torch.allclose(out.mean(-1), torch.zeros(1, 4, 4), atol=1e-5)
    assert torch.allclose(out.var(-1, correction=0), torch.ones(1, 4, 4), atol=1e-2)
    assert out.shape == (1, 4, 4, 128)


def test_other_sizes_by_config(tmp_path):
    cfg = add_frozen_config(get_cfg())
    path = tmp_path / "small.yaml"
    path.write_text(
        f"MODEL: {{TIMM: {{NAME: {GIANT}, ARGS: {{embed_dim: 32, depths: [1, 1, 7, 1], "
        "num_heads: [1, 2, 4, 8], window_size: 4, main_norm_period: 3}}}\nVERSION: 2\n"
    )
    cfg.merge_from_file(str(path))
    network = build_timm_backbone(cfg, ShapeSpec(channels=3)).network
    assert [hasattr(b, "norm3") for b in network.layers[2].blocks] == [False, False, True] * 2 + [False]
    cfg.MODEL.TIMM.ARGS.num_classes = 5
    with pytest.raises(ValueError, match="MODEL.TIMM.ARGS may not hold num_classes"):
        build_timm_backbone(cfg, ShapeSpec(channels=3))
