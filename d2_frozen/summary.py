"""What a model is made of: parts, parameters, trainable or frozen, dtype. Printed at the start of every run.

For any config, without memory for its weights and without its data (class counts of -1 become those of COCO, ADE20K
and Kinetics-400):

    python -m d2_frozen.summary --config-file configs/coco/table2/bifpn_htc_frozen.yaml [KEY VALUE ...]
    python -m d2_frozen.summary --table configs/coco        # one row per yaml: the table of docs/parameter_counts.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from torch.overrides import TorchFunctionMode

from d2_frozen import tasks
from d2_frozen.backbone import FrozenBackbone
from detectron2.config import CfgNode

# COCO's, ADE20K's and Kinetics-400's, where the data is to tell.
_CLASSES_IF_UNKNOWN = {"ROI_HEADS": 80, "SEM_SEG_HEAD": 150, "VIDEO_HEAD": 400}


def parts_table(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """One row per part, and the sum; with an optimiser also the learning rates and weight decays of each part.

    A model may define ``parts() -> [(name, module)]``; else its direct children are the parts, a ``backbone`` with a
    ``bottom_up`` inside being two.
    """
    rows = []
    total = trainable = 0
    for name, part in _parts(model):
        count = sum(p.numel() for p in part.parameters())
        training = sum(p.numel() for p in part.parameters() if p.requires_grad)
        total, trainable = total + count, trainable + training
        row = [name, _class_name(part), f"{count:,}", _state(count, training), _dtype(part)]
        rows.append(row + (_settings(part, optimizer) if optimizer else []))
    rows.append(["all", "", f"{total:,}", f"{trainable:,} trainable", "", *([""] * 2 if optimizer else [])])
    headers = ["part", "class", "parameters", "state", "dtype"]
    headers += ["learning rate", "weight decay"] if optimizer else []
    return tabulate(rows, headers=headers, colalign=("left",) * 2 + ("right",))


def _settings(part: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Ranges of learning rate and weight decay over a part's parameters."""
    inside = set(part.parameters())
    groups = [g for g in optimizer.param_groups if any(p in inside for p in g["params"])]
    return [_range({float(g[key]) for g in groups}) for key in ("lr", "weight_decay")]


def _range(values: set[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    own_parts = getattr(model, "parts", None)
    if callable(own_parts):
        yield from own_parts()
        return
    for name, child in model.named_children():
        yield from backbone_parts(name, child, f"{name} (neck)")


def backbone_parts(name: str, backbone: nn.Module, neck: str = "neck") -> Iterator[tuple[str, nn.Module]]:
    """A network as one part; where it has another as ``bottom_up`` that one (and so on inside it), then the rest."""
    bottom_up = getattr(backbone, "bottom_up", None)
    if not isinstance(bottom_up, nn.Module):
        yield name, backbone
        return
    yield from backbone_parts(f"{name}.bottom_up", bottom_up, "pyramid")
    yield neck, RestOf(backbone, "bottom_up")


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


class Counts(NamedTuple):
    """Numbers of parameters."""

    trainable: int
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> Counts:
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return cls(sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))


def build_weightless(cfg: CfgNode) -> nn.Module:
    """The model of a config on torch's meta device: every shape and no value, so that 3 B parameters fit anywhere.

    MODEL.WEIGHTS and MODEL.TIMM.PRETRAINED are not read; a class count of -1 becomes that of COCO, ADE20K or
    Kinetics-400.
    """
    from detectron2.modeling import build_model

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = "meta", ""
    fill_standard_classes(cfg)
    with torch.device("meta"), _WithoutInitialValues():
        return build_model(cfg)


def fill_standard_classes(cfg: CfgNode) -> None:
    """Class counts of -1 become those of COCO, ADE20K and Kinetics-400, in place."""
    for heads, count in _CLASSES_IF_UNKNOWN.items():
        if heads in cfg.MODEL and cfg.MODEL[heads].NUM_CLASSES < 0:
            cfg.MODEL[heads].NUM_CLASSES = count


class _WithoutInitialValues(TorchFunctionMode):
    """Leaves out what fills tensors in place: on the meta device it changes nothing, and takes most of the time."""

    _FILLING = frozenset({"normal_", "uniform_", "clamp_", "erfinv_", "mul_", "add_", "fill_", "zero_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._FILLING:
            target = args[0] if args else kwargs["tensor"]  # torch.nn.init passes its tensor by name
            if target.is_meta:
                return target
        return func(*args, **(kwargs or {}))


def is_part(path: Path) -> bool:
    """Is a yaml only there to be the _BASE_ of others?"""
    return path.parent.name == "base" or path.name.startswith("Base-")


def model_of(cfg: CfgNode) -> str:
    """What the parameters of a config's model depend on: equal texts, equal counts."""
    # A video head learns a position for each frame of a clip.
    return str(cfg.MODEL) + str(cfg.get("VIDEO", ""))


def counts_table(folder: str | Path) -> str:
    """Markdown: path of every yaml below ``folder`` that is a model of its own, its trainable and all parameters.

    Raises:
        FileNotFoundError: there is none.
    """
    known: dict[str, Counts] = {}
    rows = []
    paths = [path for path in sorted(Path(folder).rglob("*.yaml")) if not is_part(path)]
    if not paths:
        raise FileNotFoundError(f"no config of a model (*.yaml) in {folder}.")
    for path in paths:
        cfg = tasks.read_config(path)
        model = model_of(cfg)
        if model not in known:
            known[model] = Counts.of(build_weightless(cfg))
        rows.append([f"`{path.as_posix()}`", *(f"{count:,}" for count in known[model])])
    return tabulate(
        rows, headers=["config", "trainable", "all"], tablefmt="github", colalign=("left", "right", "right")
    )


def main(arguments: list[str] | None = None) -> None:
    """Raises: SystemExit: with a message, where flags or the config are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.summary", description="Parameters of a config."
    )
    parser.add_argument("--config-file", default="", help="print the parts of this one")
    parser.add_argument(
        "--table", default="", metavar="FOLDER", help="print one row per yaml below this folder"
    )
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="over those of --config-file")
    args = parser.parse_args(arguments)
    if bool(args.config_file) == bool(args.table):
        parser.error("give one of --config-file and --table")
    if args.table and args.options:
        parser.error(f"{args.options[0]}: KEY VALUE options are for --config-file; --table has none")
    try:
        if args.table:
            print(counts_table(args.table))
        else:
            print(parts_table(build_weightless(tasks.read_config(args.config_file, args.options))))
    except KeyError as err:  # str() of it would be in quotes
        sys.exit(f"error: {err.args[0]}")
    except (ValueError, OSError, AssertionError) as err:
        sys.exit(f"error: {err}")


if __name__ == "__main__":
    # Not this copy of the module, whose RestOf is another class than the one that models use.
    from d2_frozen import summary

    summary.main()
