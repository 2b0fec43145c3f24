"""Which network is at the bottom of a model, and which of its parameters belong to the stem, to res2, to a block?"""

from __future__ import annotations

from torch import nn


def parameters_by_stage(backbone: nn.Module) -> list[list[str]]:
    """Parameter names of each part, in the order of the forward pass: stem first, then the stages.

    Raises:
        ValueError: the backbone shows no such parts.
    """
    own = getattr(backbone, "parameters_by_stage", None)
    if own is not None:
        return own()
    stages = [name for name, _ in backbone.named_children() if name.startswith("res") and name[3:].isdigit()]
    if not (hasattr(backbone, "stem") and stages):
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE as a number needs a backbone with stages; {type(backbone).__name__} has "
            "no children stem, res2, ... Use 'all' or 'none', or give it a method parameters_by_stage()."
        )
    parts = ["stem", *sorted(stages, key=lambda name: int(name[3:]))]
    names = [name for name, _ in backbone.named_parameters()]
    return [[name for name in names if name.startswith(f"{part}.")] for part in parts]


def parameters_by_layer(backbone: nn.Module) -> list[list[str]]:
    """Parameter names of the stem, then of each block, in the order of the forward pass; of each stage where the
    backbone does not tell blocks.

    What lies behind the last block (a final norm) is in no list.

    Raises:
        ValueError: the backbone shows no such parts.
    """
    own = getattr(backbone, "parameters_by_layer", None)
    return own() if own is not None else parameters_by_stage(backbone)


def bottom_up_of(model: nn.Module) -> tuple[str, nn.Module | None]:
    """(name, network) of the innermost ``bottom_up`` under ``model.backbone``, without the wrapper that freezes it.

    ``("", None)`` for a model without backbone.
    """
    name, network = "backbone", getattr(model, "backbone", None)
    if not isinstance(network, nn.Module):
        return "", None
    while isinstance(inside := getattr(network, "bottom_up", None), nn.Module):
        name, network = f"{name}.bottom_up", inside
    inner = getattr(network, "inner", None)
    return name, inner if isinstance(inner, nn.Module) else network
