"""Which learning rate and weight decay does each trained parameter of the bottom-up network get?

In: a config, a model, and Detectron2's parameter groups.  Out: groups of the parameters that get something else.

Rate of layer k, of stem (0) and blocks 1..L:    BASE_LR * BACKBONE_MULTIPLIER * LAYER_DECAY ** (L + 1 - k)
as in BEiT, arXiv:2106.08254, ViTDet, arXiv:2203.16527, and the fine-tuning of SimMIM's Swin. What lies behind the last
block (a final norm) has the rate of layer L + 1. A Swin stage's merging counts with the stage's first block.

Decay: none on position tables, absolute positions, tokens, SwinV2's logit scales and position networks, as Swin and
timm have it; biases and norms that Detectron2 does not know follow WEIGHT_DECAY_BIAS and WEIGHT_DECAY_NORM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from d2_frozen.backbone.stages import bottom_up_of, parameters_by_layer
from detectron2.config import CfgNode

# Of Swin, SwinV2 and DINOv2; parts of names. timm lists all of them from 1.0.31 on.
_NEVER_DECAYED = frozenset({"relative_position_bias_table", "logit_scale", "cpb_mlp", "reg_token"})


def own_settings(cfg: CfgNode, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group per parameter whose rate or decay differs from what ``groups`` say.

    Args:
        groups: of all trained parameters with "lr"; some may be there again for their weight decay alone.
    Raises:
        ValueError: SOLVER.BACKBONE_MULTIPLIER or LAYER_DECAY is out of range, or there is nothing that it acts on.
    """
    solver = cfg.SOLVER
    _check(cfg)
    prefix, bottom_up = bottom_up_of(model)
    trained = {n: p for n, p in bottom_up.named_parameters() if p.requires_grad} if bottom_up else {}
    asked = [
        f"SOLVER.{key} is {solver[key]}"
        for key in ("BACKBONE_MULTIPLIER", "LAYER_DECAY")
        if solver[key] != 1.0
    ]
    if asked and not trained:
        raise ValueError(
            f"{' and '.join(asked)}, but MODEL.BACKBONE.FREEZE is {cfg.MODEL.BACKBONE.FREEZE!r}: nothing of the "
            f"bottom-up network ({prefix or 'this model has none'}) trains. Set it to 1.0, or FREEZE to 'none' or a "
            "stage."
        )
    settings: dict[nn.Parameter, dict[str, float]] = {}
    for parameter, decay in _decays(cfg, model, bottom_up if trained else None):
        settings.setdefault(parameter, {})["weight_decay"] = decay
    if asked:
        assert bottom_up is not None
        rate_of = {p: group["lr"] for group in groups if "lr" in group for p in group["params"]}
        factors = rate_factors(bottom_up, solver.LAYER_DECAY)
        for name, parameter in trained.items():
            factor = solver.BACKBONE_MULTIPLIER * factors.get(name, 1.0)
            settings.setdefault(parameter, {})["lr"] = rate_of[parameter] * factor
    return [{"params": [parameter], **values} for parameter, values in settings.items()]


def rate_factors(bottom_up: nn.Module, layer_decay: float) -> dict[str, float]:
    """LAYER_DECAY's factor of each parameter by name; those behind the last layer are not named.

    Raises:
        ValueError: the network does not say which layers it has.
    """
    if layer_decay == 1.0:
        return {}
    layers = parameters_by_layer(bottom_up)
    return {
        name: layer_decay ** (len(layers) - index) for index, names in enumerate(layers) for name in names
    }


def _decays(
    cfg: CfgNode, model: nn.Module, bottom_up: nn.Module | None
) -> Iterator[tuple[nn.Parameter, float]]:
    norm, bias = cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_BIAS
    for module in model.modules():
        # Detectron2's own channels-first norm is none of the classes that its rule for norms looks for.
        if type(module).__name__ == "LayerNorm" and not isinstance(module, nn.LayerNorm) and norm is not None:
            yield from ((p, norm) for p in module.parameters(recurse=False) if p.requires_grad)
    if bottom_up is None:
        return
    free = set(_without_decay(bottom_up))
    for name, parameter in bottom_up.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        if name in free:
            yield parameter, 0.0
        elif parameter.ndim == 1 and leaf != "bias":
            decay = bias if leaf.endswith("bias") else norm
            if decay is not None:
                yield parameter, decay


def _without_decay(bottom_up: nn.Module) -> Iterator[str]:
    """Names that timm takes out of the decay, and those that its older versions forget."""
    network = getattr(bottom_up, "network", None)
    listed = getattr(network, "no_weight_decay", None)
    if network is not None and listed is not None:
        yield from (f"network.{name}" for name in listed())
        for name, _ in network.named_parameters():
            if any(part in _NEVER_DECAYED for part in name.split(".")):
                yield f"network.{name}"


def _check(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if not 0.0 < solver.LAYER_DECAY <= 1.0:
        raise ValueError(
            f"SOLVER.LAYER_DECAY is {solver.LAYER_DECAY}; it must be above 0 and at most 1 (no decay)."
        )
    if solver.BACKBONE_MULTIPLIER <= 0.0:
        raise ValueError(
            f"SOLVER.BACKBONE_MULTIPLIER is {solver.BACKBONE_MULTIPLIER}; it must be positive. "
            "To keep the bottom-up network from training, set MODEL.BACKBONE.FREEZE: all."
        )
