"""These heads under the names of the public Mask2Former: for code and configs that were written for it.

``import seg_app.models.public_names`` makes ``import mask2former.…`` find the modules below, and registers
META_ARCHITECTURE "MaskFormer" and SEM_SEG_HEAD "MaskFormerHead". Only the names that other projects commonly use are
there; signatures are the public ones. It refuses to hide an installed Mask2Former.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from seg_app.models import criterion as own_criterion
from seg_app.models.config import add_mask_former_config
from seg_app.models.deformable import deformable_attention
from seg_app.models.deformable import module as own_attention
from seg_app.models.inference import top_instances
from seg_app.models.mask_former_head import Mask2FormerHead
from seg_app.models.masked_decoder import MaskedTransformerDecoder
from seg_app.models.matcher import HungarianMatcher as OwnMatcher
from seg_app.models.pixel_decoder import MSDeformAttnPixelDecoder as OwnPixelDecoder
from seg_app.models.position import SCALE, TEMPERATURE, sine_of_coordinates
from seg_app.models.score_maps import ClassesOfQueries, Given
from seg_app.models.segmentor import FrozenSegmentor

# Values that the public add_maskformer2_config sets where ours are those of its ADE20K configs, and its other keys.
_PUBLIC_DEFAULTS: dict[str, dict[str, Any]] = {
    "INPUT": dict(
        DATASET_MAPPER_NAME="mask_former_semantic",
        COLOR_AUG_SSD=False,
        SIZE_DIVISIBILITY=-1,
        IMAGE_SIZE=1024,
        MIN_SCALE=0.1,
        MAX_SCALE=2.0,
    ),
    "INPUT.CROP": dict(SINGLE_CATEGORY_MAX_AREA=1.0),
    "SOLVER": dict(WEIGHT_DECAY_EMBED=0.0, OPTIMIZER="ADAMW", BACKBONE_MULTIPLIER=0.1),
    "MODEL.SEM_SEG_HEAD": dict(PIXEL_DECODER_NAME="BasePixelDecoder", TRANSFORMER_ENC_LAYERS=0),
    "MODEL.MASK_FORMER": dict(
        CLASS_WEIGHT=1.0,
        DICE_WEIGHT=1.0,
        MASK_WEIGHT=20.0,
        DROPOUT=0.1,
        DEC_LAYERS=6,
        TRANSFORMER_IN_FEATURE="res5",
    ),
    "MODEL.SWIN": dict(
        PRETRAIN_IMG_SIZE=224,
        PATCH_SIZE=4,
        EMBED_DIM=96,
        DEPTHS=[2, 2, 6, 2],
        NUM_HEADS=[3, 6, 12, 24],
        WINDOW_SIZE=7,
        MLP_RATIO=4.0,
        QKV_BIAS=True,
        QK_SCALE=None,
        DROP_RATE=0.0,
        ATTN_DROP_RATE=0.0,
        DROP_PATH_RATE=0.3,
        APE=False,
        PATCH_NORM=True,
        OUT_FEATURES=["res2", "res3", "res4", "res5"],
        USE_CHECKPOINT=False,
    ),
}


def add_maskformer2_config(cfg: CfgNode) -> None:
    """All keys of Mask2Former with its library defaults, in place; Detectron2's own keys keep their values."""
    before = cfg.MODEL.SEM_SEG_HEAD.clone()
    add_mask_former_config(cfg)
    for key, value in before.items():
        cfg.MODEL.SEM_SEG_HEAD[key] = value
    for path, values in _PUBLIC_DEFAULTS.items():
        node = cfg
        for name in path.split("."):
            if name not in node:
                node[name] = CfgNode()
            node = node[name]
        for key, value in values.items():
            node[key] = value


class MSDeformAttn(own_attention.MSDeformAttn):
    """With shapes as a tensor, and starts of the levels, which follow from the shapes."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        shapes = _pairs(input_spatial_shapes)
        return super().forward(query, reference_points, input_flatten, shapes, input_padding_mask)


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return deformable_attention(value, _pairs(value_spatial_shapes), sampling_locations, attention_weights)


class MSDeformAttnPixelDecoder(OwnPixelDecoder):
    def forward_features(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Features for the masks, the coarsest map, all maps for the queries."""
        mask_features, maps = self(features)
        return mask_features, maps[0], maps


class MultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    def __init__(self, in_channels: int, mask_classification: bool = True, **kwargs: Any) -> None:
        if not mask_classification:
            raise ValueError("the masked decoder without class predictions needs Mask2Former itself.")
        super().__init__(in_channels, **kwargs)

    def forward(  # type: ignore[override]
        self, x: Sequence[Tensor], mask_features: Tensor, mask: None = None
    ) -> dict[str, Any]:
        return super().forward(x, mask_features)


class PositionEmbeddingSine(nn.Module):
    """(B, C, h, w) -> (B, 2 * num_pos_feats, h, w); True in the mask (B, h, w) is padding."""

    temperature, scale, normalize = TEMPERATURE, SCALE, True

    def __init__(self, num_pos_feats: int = 64, normalize: bool = False) -> None:
        super().__init__()
        if not normalize:
            raise ValueError("positions in cells, not relative to the map, need Mask2Former itself.")
        self.num_pos_feats = num_pos_feats

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = torch.zeros(x.shape[0], *x.shape[2:], device=x.device, dtype=torch.bool)
        rows, columns = (~mask).float().cumsum(1), (~mask).float().cumsum(2)
        return sine_of_coordinates(rows, columns, rows[:, -1:], columns[:, :, -1:], 2 * self.num_pos_feats)


class HungarianMatcher(OwnMatcher):
    def __init__(
        self, cost_class: float = 1, cost_mask: float = 1, cost_dice: float = 1, num_points: int = 0
    ) -> None:
        assert cost_class or cost_mask or cost_dice, "all weights of the matching are 0"
        super().__init__(cost_class, cost_mask, cost_dice, num_points)


class SetCriterion(own_criterion.SetCriterion):
    def __init__(
        self,
        num_classes: int,
        matcher: OwnMatcher,
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
    ) -> None:
        super().__init__(
            num_classes,
            matcher,
            weight_dict,
            losses=losses,
            no_object_weight=eos_coef,
            num_points=num_points,
            oversample_ratio=oversample_ratio,
            importance_ratio=importance_sample_ratio,
        )


class MaskFormer(FrozenSegmentor):
    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Without this project's keys, nothing is frozen but what the backbone's builder freezes."""
        if "FREEZE" not in cfg.MODEL.BACKBONE:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.BACKBONE.FREEZE = "none"
        return super().from_config(cfg)

    def semantic_inference(self, mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
        return ClassesOfQueries(mask_cls, Given(mask_pred)).all()

    def instance_inference(self, mask_cls: Tensor, mask_pred: Tensor) -> Any:
        return top_instances(mask_cls, mask_pred, self.max_instances)


class MaskFormerHead(Mask2FormerHead):
    pass


def _pairs(shapes: Tensor | Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    rows = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    return tuple((int(h), int(w)) for h, w in rows)


_MODULES: dict[str, dict[str, Any]] = {
    "": {"add_maskformer2_config": add_maskformer2_config, "MaskFormer": MaskFormer},
    "config": {"add_maskformer2_config": add_maskformer2_config},
    "maskformer_model": {"MaskFormer": MaskFormer},
    "modeling": {},
    "modeling.criterion": {
        "SetCriterion": SetCriterion,
        "dice_loss": own_criterion.dice_loss,
        "sigmoid_ce_loss": own_criterion.mask_cross_entropy,
    },
    "modeling.matcher": {"HungarianMatcher": HungarianMatcher},
    "modeling.meta_arch": {},
    "modeling.meta_arch.mask_former_head": {"MaskFormerHead": MaskFormerHead},
    "modeling.pixel_decoder": {},
    "modeling.pixel_decoder.msdeformattn": {"MSDeformAttnPixelDecoder": MSDeformAttnPixelDecoder},
    "modeling.pixel_decoder.ops": {},
    "modeling.pixel_decoder.ops.functions": {},
    "modeling.pixel_decoder.ops.functions.ms_deform_attn_func": {
        "ms_deform_attn_core_pytorch": ms_deform_attn_core_pytorch
    },
    "modeling.pixel_decoder.ops.modules": {"MSDeformAttn": MSDeformAttn},
    "modeling.transformer_decoder": {},
    "modeling.transformer_decoder.mask2former_transformer_decoder": {
        "MultiScaleMaskedTransformerDecoder": MultiScaleMaskedTransformerDecoder
    },
    "modeling.transformer_decoder.position_encoding": {"PositionEmbeddingSine": PositionEmbeddingSine},
}


def _install() -> None:
    if "mask2former" in sys.modules or importlib.util.find_spec("mask2former") is not None:
        raise ImportError(
            "seg_app.models.public_names stands in for Mask2Former, but Mask2Former itself is installed. Use its own "
            "classes, or take it off sys.path."
        )
    META_ARCH_REGISTRY.register(MaskFormer)
    SEM_SEG_HEADS_REGISTRY.register(MaskFormerHead)
    for path, names in _MODULES.items():
        full = f"mask2former.{path}" if path else "mask2former"
        module = types.ModuleType(full, f"Names of Mask2Former, from {__name__}.")
        module.__path__ = []  # a package: submodules may follow
        module.__dict__.update(names)
        sys.modules[full] = module
        parent, _, name = full.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)


_install()
