"""Which parameters belong to the stem, to res2, ... of a backbone."""

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
