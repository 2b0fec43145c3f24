"""Which windows a Swin network uses, and the small SwinV2 that ships with this project.

In: the name of a timm model.  Out: the arguments that keep its windows as they were in pretraining, at any
image size.
Method: Lin et al., arXiv:2211.02043, section 3.3, enlarges the image and leaves the window alone. As in the
detectors of the Swin papers (arXiv:2103.14030, 2111.09883) every stage has window w, odd blocks are shifted
by w // 2, and maps that are no multiple of w are padded before they are shifted, also where a map is smaller than
one window. Where pretraining had a smaller window, as its map was smaller, SwinV2's positions are measured by that one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, model_entrypoint, register_model
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

PICO_NAME = "swinv2_pico_window8_256"
_SWIN_MODULES = (
    __name__,
    "d2_frozen.backbone.swin_v2_giant",
    "timm.models.swin_transformer",
    "timm.models.swin_transformer_v2",
)
PICO_WEIGHTS = Path(__file__).resolve().parent / "pretrained" / "swinv2_pico_fdsl.safetensors"

default_cfgs = generate_default_cfgs(
    {
        f"{PICO_NAME}.fdsl": {
            "file": str(PICO_WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 256, 256),
            "pool_size": (8, 8),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
            "license": "apache-2.0",
        }
    }
)


@register_model
def swinv2_pico_window8_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SwinV2 with 2.7 M parameters: channels 32, 64, 128, 256; blocks 2, 2, 4, 2; window 8."""
    shape = dict(embed_dim=32, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=8, img_size=256)
    return build_model_with_cfg(
        SwinTransformerV2,
        PICO_NAME,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**shape, **kwargs},
    )


def unchanged_window_arguments(name: str) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that keep a network's pretraining window at any image size.

    Left alone, timm shrinks windows to the map and drops the shift where a map is not larger than one window,
    decided at the size the network is built for; and its ``set_input_size`` without ``window_size`` grows
    windows with the image.

    Returns:
        Nothing for networks other than Swin and SwinV2.
    """
    if model_entrypoint(name).__module__ not in _SWIN_MODULES:
        return {}
    return {"always_partition": True, "strict_img_size": False}


class PadsBeforeShift:
    """Mixin for a block of timm's Swin networks: opposite borders of a padded map stay apart.

    timm shifts a map in a circle, then pads it; its mask then separates the padding, not the rows that came around,
    and the first rows attend to the last. At 1024 pixels a window of 12 or 7 pads every stage.
    """

    window_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        height, width = x.shape[1:3]
        below, right = -height % self.window_size[0], -width % self.window_size[1]
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return super()._attn(x)[:, :height, :width]  # type: ignore[misc]


class SwinBlock(PadsBeforeShift, SwinTransformerBlock):
    """Swin block for maps of any size."""


class SwinV2Block(PadsBeforeShift, SwinTransformerV2Block):
    """SwinV2 block for maps of any size."""


def pad_before_shift(network: nn.Module) -> None:
    """Give the blocks of a Swin network the padding of the papers' detectors, in place; no weight changes.

    The small network of this project keeps timm's order, with which its weights were made.
    """
    if not isinstance(network, SwinTransformer | SwinTransformerV2):
        return
    if (getattr(network, "pretrained_cfg", None) or {}).get("architecture") == PICO_NAME:
        return
    kinds = {SwinTransformerBlock: SwinBlock, SwinTransformerV2Block: SwinV2Block}
    for module in network.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]


def keep_position_units(network: nn.Module) -> None:
    """Let SwinV2 measure positions as in pretraining, in place; no weight changes.

    At 192 pixels with window 12 the last map has 6 x 6 cells, which is then its window, and the next cell is 1/5 of the
    unit away. Left alone, timm calls it 1/11 in the window of 12 that the stage has here, and each bias is that of a
    nearer cell. The released networks with another window have it so (``pretrained_window_sizes`` 12, 12, 12, 6).
    """
    if not isinstance(network, SwinTransformerV2):
        return
    for block in network.modules():
        if not isinstance(block, SwinTransformerV2Block):
            continue
        attention = block.attn
        window = tuple(min(w, side) for w, side in zip(attention.window_size, block.input_resolution))
        if window != attention.window_size and not any(attention.pretrained_window_size):
            attention.pretrained_window_size = window
            attention.init_non_persistent_buffers()


def windows_of_positions(network: nn.Module) -> list[int]:
    """In cells, those by which SwinV2 measures positions where they are not the windows that it has."""
    windows = (getattr(module, "pretrained_window_size", (0,)) for module in network.modules())
    return sorted({max(window) for window in windows} - {0})
