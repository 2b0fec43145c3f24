"""SwinV2-G: timm's SwinV2 with further norms on the main branch, under a name of our own.

In: ``timm.create_model("swinv2_giant_window12_192")``.  Out: a network whose stages timm, and so this project,
treats as any other SwinV2.
Method: SwinV2, arXiv:2111.09883: channels 512, blocks 2, 2, 42, 4, heads of 32 channels, and a LayerNorm on the
main branch every 6 blocks. Pretraining: 192 pixels, window 12.
No weights of it were published. timm's ``swinv2_cr_giant`` is another network: blocks 2, 2, 42, 2.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, SwinTransformerV2Stage
from torch import Tensor, nn

from d2_frozen.backbone.swin_v2 import PadsBeforeShift

GIANT_NAME = "swinv2_giant_window12_192"
default_cfgs = generate_default_cfgs(
    {
        GIANT_NAME: {
            "num_classes": 1000,
            "input_size": (3, 192, 192),
            "pool_size": (6, 6),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        }
    }
)


class SwinV2WithMainNorms(SwinTransformerV2):
    """SwinV2 with a LayerNorm (``norm3``) behind every ``main_norm_period``-th block of a stage.

    Blocks are counted inside each stage, so that G's 42 blocks hold seven and its short stages none; the paper does
    not say where counting starts.

    Args:
        main_norm_period: in blocks; 0 for none, which is timm's SwinV2.
        arguments: as :class:`timm.models.swin_transformer_v2.SwinTransformerV2` takes them.
    """

    def __init__(self, *, main_norm_period: int = 6, **arguments: Any) -> None:
        super().__init__(**arguments)
        if main_norm_period < 0:
            raise ValueError(f"main_norm_period is {main_norm_period}; it must be 0 (no such norm) or more.")
        for stage in self.layers:
            assert isinstance(stage, SwinTransformerV2Stage)
            for number, block in enumerate(stage.blocks, start=1):
                if main_norm_period and number % main_norm_period == 0:
                    BlockWithMainNorm.extend(block)


class BlockWithMainNorm(PadsBeforeShift, SwinTransformerV2Block):
    """A SwinV2 block whose output, not only its two branches, is normalised."""

    norm3: nn.LayerNorm

    @classmethod
    def extend(cls, block: Any) -> None:
        """Make this of a SwinV2 block, in place: timm's stages build their blocks themselves."""
        block.__class__ = cls
        weight = block.norm2.weight
        block.norm3 = nn.LayerNorm(block.dim, eps=block.norm2.eps, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        return self.norm3(super().forward(x))


@register_model
def swinv2_giant_window12_192(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SwinV2-G: 2.998 B parameters without classifier."""
    shape = {
        "img_size": 192,
        "window_size": 12,
        "embed_dim": 512,
        "depths": (2, 2, 42, 4),
        "num_heads": (16, 32, 64, 128),
    }
    return build_model_with_cfg(
        SwinV2WithMainNorms,
        GIANT_NAME,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**shape, **kwargs},
    )
