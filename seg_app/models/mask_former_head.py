"""Mask2Former's head as a Detectron2 semantic head: pixel decoder and masked decoder, built from a config.

In: maps by name.  Out: classes and masks of the queries; :class:`FrozenSegmentor` turns them into losses or pixels.
Source: arXiv 2112.01527.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from seg_app.models.criterion import SetCriterion
from seg_app.models.masked_decoder import MaskedTransformerDecoder
from seg_app.models.matcher import HungarianMatcher
from seg_app.models.pixel_decoder import MSDeformAttnPixelDecoder

# Width inside the feed-forward networks of the deformable encoder; public checkpoints have it, no key does.
ENCODER_FEEDFORWARD = 1024


@SEM_SEG_HEADS_REGISTRY.register()
class Mask2FormerHead(nn.Module):
    """``pixel_decoder`` and ``predictor``; parameter names are those of the public checkpoints.

    Args:
        pixel_decoder: maps -> (features for the masks, maps for the queries).
        predictor: those -> predictions.
        num_classes: K.
        ignore_value: label of pixels that do not count.
    """

    _version = 2  # of the parameter names; in version 1 the pixel decoder's stood here without prefix

    @configurable
    def __init__(
        self, *, pixel_decoder: nn.Module, predictor: nn.Module, num_classes: int, ignore_value: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head, m = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        check_mask_former_config(cfg)
        pixel_decoder = MSDeformAttnPixelDecoder(
            {name: input_shape[name] for name in head.IN_FEATURES},
            transformer_dropout=m.DROPOUT,
            transformer_nheads=m.NHEADS,
            transformer_dim_feedforward=ENCODER_FEEDFORWARD,
            transformer_enc_layers=head.TRANSFORMER_ENC_LAYERS,
            conv_dim=head.CONVS_DIM,
            mask_dim=head.MASK_DIM,
            norm=head.NORM,
            transformer_in_features=head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            transformer_points=head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            common_stride=head.COMMON_STRIDE,
        )
        predictor = MaskedTransformerDecoder(
            head.CONVS_DIM,
            num_classes=head.NUM_CLASSES,
            hidden_dim=m.HIDDEN_DIM,
            num_queries=m.NUM_OBJECT_QUERIES,
            nheads=m.NHEADS,
            dim_feedforward=m.DIM_FEEDFORWARD,
            dec_layers=m.DEC_LAYERS - 1,
            pre_norm=m.PRE_NORM,
            mask_dim=head.MASK_DIM,
            enforce_input_project=m.ENFORCE_INPUT_PROJ,
        )
        return {
            "pixel_decoder": pixel_decoder,
            "predictor": predictor,
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
        }

    @staticmethod
    def criterion(cfg: CfgNode) -> SetCriterion:
        """The loss for this head's predictions."""
        m = cfg.MODEL.MASK_FORMER
        weights = {"loss_ce": m.CLASS_WEIGHT, "loss_mask": m.MASK_WEIGHT, "loss_dice": m.DICE_WEIGHT}
        if m.DEEP_SUPERVISION:
            for i in range(m.DEC_LAYERS - 1):
                weights.update(
                    {f"{name}_{i}": weights[name] for name in ("loss_ce", "loss_mask", "loss_dice")}
                )
        return SetCriterion(
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            HungarianMatcher(m.CLASS_WEIGHT, m.MASK_WEIGHT, m.DICE_WEIGHT, m.TRAIN_NUM_POINTS),
            weights,
            no_object_weight=m.NO_OBJECT_WEIGHT,
            num_points=m.TRAIN_NUM_POINTS,
            oversample_ratio=m.OVERSAMPLE_RATIO,
            importance_ratio=m.IMPORTANCE_SAMPLE_RATIO,
        )

    def forward(
        self, features: dict[str, Tensor], every_layer: bool = False, full_masks: bool = True
    ) -> dict[str, Any]:
        """(B, C, h, w) maps by name -> what :class:`MaskedTransformerDecoder` gives."""
        mask_features, maps = self.pixel_decoder(features)
        return self.predictor(maps, mask_features, every_layer, full_masks)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, *args: Any
    ) -> None:
        if local_metadata.get("version") in (None, 1):
            for key in [key for key in state_dict if key.startswith(prefix)]:
                rest = key[len(prefix) :]
                if rest.split(".")[0] not in ("predictor", "pixel_decoder"):
                    state_dict[f"{prefix}pixel_decoder.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def check_mask_former_config(cfg: CfgNode) -> None:
    """Refuse what Mask2Former's config can name and this head does not have.

    Raises:
        ValueError: with the key and what is possible.
    """
    head, m = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    only = {
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": (head.PIXEL_DECODER_NAME, "MSDeformAttnPixelDecoder"),
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": (
            m.TRANSFORMER_DECODER_NAME,
            "MultiScaleMaskedTransformerDecoder",
        ),
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": (m.TRANSFORMER_IN_FEATURE, "multi_scale_pixel_decoder"),
        "MODEL.MASK_FORMER.ENC_LAYERS": (m.ENC_LAYERS, 0),
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": (m.TEST.PANOPTIC_ON, False),
    }
    for key, (value, possible) in only.items():
        if value != possible:
            raise ValueError(
                f"{key} is {value!r}; only {possible!r} works here, the others need Mask2Former itself."
            )
    if m.DEC_LAYERS < 1 or head.TRANSFORMER_ENC_LAYERS < 0:
        raise ValueError(
            f"MODEL.MASK_FORMER.DEC_LAYERS is {m.DEC_LAYERS} and MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS "
            f"{head.TRANSFORMER_ENC_LAYERS}; they must be at least 1 and 0."
        )
