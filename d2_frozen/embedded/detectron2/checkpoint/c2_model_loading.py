"""Whose weight is this? Names in a file to names in a model, when they are not the same.

Two steps: names of Detectron 1 (Caffe2, MSRA) become ours by rule; then each tensor of the model takes the
entry whose name is the longest ending of its own: "backbone.bottom_up.res2.0.conv1.weight" takes
"res2.0.conv1.weight".
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from tabulate import tabulate

logger = logging.getLogger(__name__)

# The last part of a Caffe2 name.
_LEAVES = {
    "w": "weight",
    "b": "bias",
    "s": "weight",  # scale of a normalisation
    "gamma": "weight",
    "beta": "bias",
    "rm": "running_mean",
    "running_mean": "running_mean",
    "riv": "running_var",
    "running_var": "running_var",
}
_CAFFE2 = re.compile(rf"(?P<layer>.+?)(?P<norm>_bn|_gn)?_(?P<leaf>{'|'.join(_LEAVES)})")

_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
# Layers: the first pattern that fits the whole name between prefix and leaf wins.
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"(?:res_)?conv1", "stem.conv1"),
    *((rf"res(\d)_(\d+)_branch{branch}", rf"res\1.\2.{ours}") for branch, ours in _BRANCHES.items()),
    # The coarsest lateral convolution has no top-down input, hence no "lateral" in its name.
    (r"fpn_inner_res(\d)_\d+_sum(?:_lateral)?", r"fpn_lateral\1"),
    (r"fpn_res(\d)_\d+_sum", r"fpn_output\1"),
    (r"conv_rpn(?:_fpn\d)?", "proposal_generator.rpn_head.conv"),
    (r"rpn_bbox_pred(?:_fpn\d)?", "proposal_generator.rpn_head.anchor_deltas"),
    (r"rpn_cls_logits(?:_fpn\d)?", "proposal_generator.rpn_head.objectness_logits"),
    (r"fc6", "box_head.fc1"),
    (r"fc7", "box_head.fc2"),
    (r"head_conv(\d)", r"box_head.conv\1"),
    (r"bbox_pred", "bbox_pred"),
    (r"cls_score", "cls_score"),
    (r"_(?:\[mask\]|mask)_fcn(\d)", r"mask_head.mask_fcn\1"),
    (r"conv5_mask", "mask_head.deconv"),
    (r"mask_fcn_logits", "mask_head.predictor"),
    (r"pred", "linear"),  # ImageNet classifier
)


def convert_c2_detectron_names(
    weights: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Rename Detectron 1's weights, and make the background the last class, without box and mask, as here.

    Returns:
        (weights under our names, our name -> name in the file).
    """
    converted, origin = {}, {}
    for name, tensor in weights.items():
        ours = convert_c2_name(name)
        layer = ours.rpartition(".")[0]
        if layer == "bbox_pred":
            tensor = tensor[4:]  # without the four deltas of the background
        elif layer == "cls_score":
            tensor = torch.cat([tensor[1:], tensor[:1]])
        elif layer == "mask_head.predictor" and len(tensor) > 1:
            tensor = tensor[1:]  # without its mask; a class-agnostic head has a single one, for all classes
        converted[ours], origin[ours] = tensor, name
    return converted, origin


def convert_c2_name(name: str) -> str:
    """ "res2_0_branch2a_bn_s" -> "res2.0.conv1.norm.weight"; a name with dots is ours already."""
    parts = None if "." in name else _CAFFE2.fullmatch(name)
    if parts is None:
        return name
    layer = parts["layer"]
    for pattern, ours in _LAYERS:
        if re.fullmatch(pattern, layer):
            layer = re.sub(pattern, ours, layer)
            break
    else:
        layer = layer.replace("_", ".")
    return layer + (".norm." if parts["norm"] else ".") + _LEAVES[parts["leaf"]]


def align_and_update_state_dicts(
    model_state_dict: Mapping[str, torch.Tensor],
    ckpt_state_dict: Mapping[str, torch.Tensor],
    c2_conversion: bool = True,
) -> dict[str, torch.Tensor]:
    """Weights of a file under the names that the model has for them.

    Args:
        model_state_dict: what is wanted.
        ckpt_state_dict: what there is.
        c2_conversion: the file has Detectron 1's names.
    Returns:
        Model name -> tensor for what matches in name and shape, then the rest of the file under its own
        names.
    Raises:
        ValueError: one entry is the best match of several tensors in the model.
    """
    if c2_conversion:
        available, origin = convert_c2_detectron_names(ckpt_state_dict)
    else:
        available, origin = dict(ckpt_state_dict), {name: name for name in ckpt_state_dict}

    aligned: dict[str, torch.Tensor] = {}
    taker: dict[str, str] = {}
    for name in sorted(model_state_dict):
        found = next((end for end in _endings(name) if end in available), None)
        if found is None:
            continue
        wanted, given = tuple(model_state_dict[name].shape), tuple(available[found].shape)
        if wanted != given:
            logger.warning(
                "'%s' is %s in the checkpoint (as '%s') but %s in the model; it is not loaded.",
                name, given, origin[found], wanted,
            )  # fmt: skip
            continue
        if found in taker:
            raise ValueError(
                f"'{origin[found]}' of the checkpoint matches two tensors of the model, '{taker[found]}' and "
                f"'{name}'. Rename it in the file, or load without matching_heuristics."
            )
        taker[found] = name
        aligned[name] = available[found]

    _log_matches(taker, origin)
    for found, tensor in available.items():
        if found not in taker:
            aligned.setdefault(found, tensor)
    return aligned


def _endings(name: str) -> Iterable[str]:
    """ "a.b.c", "b.c", "c"."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _longest_common_prefix_str(names: Sequence[str]) -> str:
    """The characters that all ``names`` begin with."""
    return os.path.commonprefix(list(names))


def _abbreviated(names: Sequence[str]) -> str:
    """ "conv1_{w,b}" for "conv1_w" and "conv1_b"."""
    if len(names) == 1:
        return names[0]
    start = _longest_common_prefix_str(names)
    return f"{start}{{{','.join(name[len(start) :] for name in names)}}}"


def _log_matches(taker: Mapping[str, str], origin: Mapping[str, str]) -> None:
    """One line per module of the model that got weights under another name."""
    modules: dict[str, list[str]] = defaultdict(list)
    files: dict[str, list[str]] = defaultdict(list)
    for found, name in taker.items():
        if origin[found] == name:
            continue
        module, leaf = name.rpartition(".")[::2]
        modules[module].append(leaf)
        files[module].append(origin[found])
    if modules:
        rows = [
            (module, ", ".join(leaves), _abbreviated(files[module])) for module, leaves in modules.items()
        ]
        logger.info("Weights matched by the ends of their names:\n%s", tabulate(
            rows, headers=["module", "tensors", "names in the checkpoint"], tablefmt="pipe"))  # fmt: skip
