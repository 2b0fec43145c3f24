"""Which tensor of a public checkpoint is which of the network's, and is that all of it?

In: names and shapes of a file, and a network.  Out: file name -> network name, and a report that says what was
recognised, loaded, dropped and recomputed, and what does not fit.

Formats, told apart by their names alone:
    Microsoft       Swin and SwinV2 releases: merging sits at the end of stage i ("layers.i.downsample"), timm has it
                    at the start of stage i + 1
    SimMIM          the same behind "encoder.", beside "decoder." and "mask_token"
    EsViT           the same under "teacher" (and "student"), perhaps behind "module." or "backbone.", with two heads
    detection       Mask2Former, Swin-Detection: behind "backbone.", with output norms "norm0".."norm3"
    timm            the network's own names, perhaps behind a prefix
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

_SHOWN = 6
# Computed from the window and the image; files hold them, networks make their own.
_COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")
# What pretraining puts beside or into the backbone.
_PRETRAINING = ("head.", "head_dense.", "decoder.", "mask_token")
_OUTPUT_NORM = re.compile(r"norm[0-3]\.")
_BIAS_TABLE = "relative_position_bias_table"


@dataclass
class ImportReport:
    """What became of each tensor of a file."""

    source: str
    format: str
    network: str
    loaded: int = 0
    #: Tensors that are no part of the backbone, counted by the first word of their names.
    dropped: dict[str, int] = field(default_factory=dict)
    #: Tensors that the network computes for itself.
    recomputed: tuple[str, ...] = ()
    #: Position tables that were made for another window, and what was done about it.
    windows: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Nothing is missing, left over, or of another shape."""
        return not (self.missing or self.unexpected or self.misshaped)

    def summary(self) -> str:
        """For the log."""
        parts = [f"{self.source}: {self.format}, {self.loaded} tensors loaded into {self.network}"]
        if self.dropped:
            parts.append("not of the backbone: " + ", ".join(f"{k} ({n})" for k, n in self.dropped.items()))
        if self.recomputed:
            parts.append(f"{len(self.recomputed)} position tensors recomputed")
        parts += [f"{n} position tables {what}" for what, n in Counter(self.windows.values()).items()]
        return "; ".join(parts)

    def refusal(self) -> str:
        """For the error, where it does not fit."""
        kinds = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.misshaped),
        )
        found = [
            f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for what, names in kinds
            if names
        ]
        return (
            f"{self.source} ({self.format}) does not fit {self.network}: {self.loaded} tensors do. "
            f"{'; '.join(found)}. Check that MODEL.TIMM.NAME is the network that the file was saved from."
        )


def plan_import(
    shapes: Mapping[str, tuple[int, ...]],
    network: nn.Module,
    source: str,
    ignore: tuple[str, ...] = (),
    wrapper: str = "",
) -> tuple[dict[str, str], ImportReport]:
    """Names of a file that are to be loaded, each with the network's name for it; and the report.

    Args:
        shapes: of the tensors in the file.
        ignore: prefixes of the network's names that may be missing or left over, e.g. the classifier.
        wrapper: the word under which the file keeps its tensors; tells EsViT.
    """
    wanted = network.state_dict()
    prefix = _prefix_of(shapes, wanted)
    layout = _Layout(shapes, prefix, network, wrapper)
    report = ImportReport(source, layout.name, type(network).__name__)
    present = {layout.network_name(name): name for name in shapes if name.startswith(prefix)}
    dropped = Counter(name.split(".")[0] for name in shapes if not name.startswith(prefix))
    ignore = (*ignore, *(word for word in _PRETRAINING if not any(n.startswith(word) for n in wanted)))
    computed = {name for name, _ in network.named_buffers()} - set(wanted)

    targets: dict[str, str] = {}
    unexpected, misshaped, recomputed = [], [], []
    for name, file_name in present.items():
        if name in computed or name.endswith(_COMPUTED):
            recomputed.append(name)
            layout.note_coordinates(name, shapes[file_name], network, report)
        elif layout.is_output_norm(name):
            dropped[f"output norm {name.split('.')[0]}"] += 1
        elif name in wanted and not name.startswith(ignore):
            have, want = shapes[file_name], tuple(wanted[name].shape)
            if have == want or _other_window(name, have, want, report):
                targets[file_name] = name
            else:
                misshaped.append(f"{name} is {have} in the file, {want} in the network")
        elif name.startswith(ignore):
            dropped[name.split(".")[0]] += 1
        else:
            unexpected.append(name)
    needed = {name for name in wanted if not (ignore and name.startswith(ignore))}
    report.loaded = len(targets)
    report.dropped = dict(dropped)
    report.recomputed = tuple(recomputed)
    report.unexpected, report.misshaped = tuple(sorted(unexpected)), tuple(sorted(misshaped))
    report.missing = tuple(sorted(needed - set(present)))
    return targets, report


def fill(network: nn.Module, tensors: Iterable[tuple[str, Tensor]], targets: Mapping[str, str]) -> None:
    """Copy tensors into a network, one at a time; a tensor on the meta device is replaced by one on the CPU.

    Args:
        tensors: by the file's names; those not in ``targets`` are passed over.
        targets: as :func:`plan_import` gives them.
    """
    own = network.state_dict(keep_vars=True)
    with torch.no_grad():
        for file_name, value in tensors:
            name = targets.get(file_name)
            if name is None:
                continue
            if value.shape != own[name].shape:
                value = _resized_table(value, network.get_submodule(name.rpartition(".")[0]))
            if own[name].is_meta:
                _replace(network, name, own[name], value)
            else:
                own[name].copy_(value)


def finish_meta_network(network: nn.Module) -> None:
    """Compute the tensors that no file holds, in a network that was built on the meta device and then filled.

    Raises:
        ValueError: a module of timm that cannot compute its tensors again.
    """
    for name, module in network.named_modules():
        here = [key for key, value in module.named_buffers(recurse=False) if value.is_meta]
        for key in here:
            setattr(module, key, torch.empty_like(module.get_buffer(key), device="cpu"))
        if not here:
            continue
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is None:
            raise ValueError(
                f"{type(network).__name__} cannot be loaded from shards: {name} ({type(module).__name__}) does not "
                "say how its buffers are computed. Join the shards into one file, or install a newer timm."
            )
        compute()


class _Layout:
    """Where the names of a file differ from the network's."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], prefix: str, network: nn.Module, wrapper: str
    ) -> None:
        self.prefix = prefix
        inner = {name[len(prefix) :] for name in shapes if name.startswith(prefix)}
        self.swin = isinstance(network, SwinTransformer | SwinTransformerV2)
        self.merging_at_end = self.swin and any(n.startswith("layers.0.downsample.") for n in inner)
        self.output_norms = self.swin and any(_OUTPUT_NORM.match(n) for n in inner)
        second = any(n.endswith("attn.logit_scale") for n in inner)
        of_swin = "SwinV2" if second else "Swin"
        beside = {name.split(".")[0] for name in shapes if not name.startswith(prefix)}
        if not self.swin:
            self.name = "timm names" + (f" behind '{prefix}'" if prefix else "")
        elif wrapper in ("teacher", "student"):
            self.name = f"EsViT {of_swin}, the {wrapper}"
        elif "decoder" in beside or "mask_token" in inner:
            self.name = f"SimMIM {of_swin} pretraining"
        elif self.output_norms:
            self.name = f"{of_swin} backbone of a detector (Swin-Detection, Mask2Former)"
        elif self.merging_at_end:
            self.name = f"Microsoft {of_swin} release"
        else:
            self.name = f"timm {of_swin}" + (f" behind '{prefix}'" if prefix else "")

    def network_name(self, name: str) -> str:
        name = name[len(self.prefix) :]
        if self.merging_at_end:
            return re.sub(r"^layers\.(\d+)\.downsample\.", _next_stage, name)
        return name

    def is_output_norm(self, name: str) -> bool:
        """Detectors normalise each map for their necks; maps here leave the network as they are."""
        return self.output_norms and _OUTPUT_NORM.match(name) is not None

    def note_coordinates(
        self, name: str, shape: tuple[int, ...], network: nn.Module, report: ImportReport
    ) -> None:
        """SwinV2 files tell their window by the table of coordinates; the network computes its own."""
        if not name.endswith("relative_coords_table") or len(shape) != 4:
            return
        module = network.get_submodule(name.rpartition(".")[0]) if _has(network, name) else None
        window = getattr(module, "window_size", None)
        if window and shape[1:3] != (2 * window[0] - 1, 2 * window[1] - 1):
            report.windows[name] = f"recomputed (window {(shape[1] + 1) // 2} to {window[0]})"


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match.group(1)) + 1}.downsample."


def _has(network: nn.Module, name: str) -> bool:
    return name.rpartition(".")[0] in dict(network.named_modules())


def _prefix_of(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor]) -> str:
    """The words in front of the network's own names, where most of them are found."""
    first = next(iter(wanted))
    candidates = ["", *(name[: -len(first)] for name in shapes if name.endswith(f".{first}"))]
    # Of two equal networks (a teacher and a student flattened into one file) the teacher is the released one.
    return max(candidates, key=lambda p: (sum(p + n in shapes for n in wanted), "teacher" in p or "ema" in p))


def _other_window(name: str, have: tuple[int, ...], want: tuple[int, ...], report: ImportReport) -> bool:
    """Is this a position table of Swin that only its window keeps from fitting?"""
    if not name.endswith(_BIAS_TABLE) or len(have) != 2 or have[1:] != want[1:]:
        return False
    windows = [(round(rows**0.5) + 1) // 2 for rows in (have[0], want[0])]
    if [(2 * w - 1) ** 2 for w in windows] != [have[0], want[0]]:
        return False
    report.windows[name] = f"resized (window {windows[0]} to {windows[1]}, bicubic)"
    return True


def _resized_table(table: Tensor, attention: Any) -> Tensor:
    shape = tuple(getattr(attention, _BIAS_TABLE).shape)
    return resize_rel_pos_bias_table_simple(table, attention.window_size, shape)


def _replace(network: nn.Module, name: str, old: Tensor, value: Tensor) -> None:
    module, _, key = name.rpartition(".")
    # Mapped tensors would keep reading from the file; a copy of one tensor at a time costs little.
    new = torch.empty_like(old, device="cpu").copy_(value)
    if isinstance(old, nn.Parameter):
        setattr(network.get_submodule(module), key, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(network.get_submodule(module), key, new)
