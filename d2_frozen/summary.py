"""What a model is made of: parts, parameters, trainable or frozen, dtype. Printed at the start of every run."""

from __future__ import annotations

from collections.abc import Iterator

from tabulate import tabulate
from torch import nn

from d2_frozen.backbone import FrozenBackbone


def parts_table(model: nn.Module) -> str:
    """One row per part, and the sum.

    A model may define ``parts() -> [(name, module)]``; else its direct children are the parts, a ``backbone`` with a
    ``bottom_up`` inside being two.
    """
    rows = []
    total = trainable = 0
    for name, part in _parts(model):
        count = sum(p.numel() for p in part.parameters())
        training = sum(p.numel() for p in part.parameters() if p.requires_grad)
        total, trainable = total + count, trainable + training
        rows.append([name, _class_name(part), f"{count:,}", _state(count, training), _dtype(part)])
    rows.append(["all", "", f"{total:,}", f"{trainable:,} trainable", ""])
    return tabulate(
        rows, headers=["part", "class", "parameters", "state", "dtype"], colalign=("left",) * 2 + ("right",)
    )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    own_parts = getattr(model, "parts", None)
    if callable(own_parts):
        yield from own_parts()
        return
    for name, child in model.named_children():
        bottom_up = getattr(child, "bottom_up", None)
        if isinstance(bottom_up, nn.Module):
            yield f"{name}.bottom_up", bottom_up
            yield f"{name} (neck)", RestOf(child, "bottom_up")
        else:
            yield name, child


class RestOf(nn.Module):
    """View of a module without some of its children, for counting; it is never run.

    Args:
        whole: the module.
        left_out: names of direct children.
    """

    def __init__(self, whole: nn.Module, *left_out: str) -> None:
        super().__init__()
        self.whole_class = type(whole)
        for name, child in whole.named_children():
            if name not in left_out:
                self.add_module(name, child)
        for name, parameter in whole.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def _class_name(part: nn.Module) -> str:
    if isinstance(part, FrozenBackbone):
        return type(part.inner).__name__
    return part.whole_class.__name__ if isinstance(part, RestOf) else type(part).__name__


def _state(count: int, training: int) -> str:
    if count == 0:
        return "-"
    if training == 0:
        return "frozen"
    return "trainable" if training == count else f"{training:,} trainable, rest frozen"


def _dtype(part: nn.Module) -> str:
    if isinstance(part, FrozenBackbone):
        return part.precision
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in part.parameters()})) or "-"
