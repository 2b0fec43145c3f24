"""Versions of the config keys: what were they called in older files?

Version 2 is the current one. A file of version 0 or 1 is read by giving its keys their present names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

CURRENT_VERSION = 2
logger = logging.getLogger(__name__)

_Node = MutableMapping[str, Any]
_NodeFactory = Callable[[], _Node]

# Version -> {section of the keys in that version: {name there: full name in the next version}}.
_RENAMED: dict[int, dict[str, dict[str, str]]] = {
    0: {"MODEL.RPN_HEAD": {"NAME": "MODEL.RPN.HEAD_NAME"}},
    1: {
        "MODEL": {"WEIGHT": "MODEL.WEIGHTS"},
        "MODEL.ROI_HEADS": {
            "NMS": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
            "SCORE_THRESH": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        },
        "MODEL.RETINANET": {
            "INFERENCE_NMS_THRESHOLD": "MODEL.RETINANET.NMS_THRESH_TEST",
            "INFERENCE_SCORE_THRESHOLD": "MODEL.RETINANET.SCORE_THRESH_TEST",
            "INFERENCE_TOPK_CANDIDATES": "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
        },
        "MODEL.PANOPTIC_FPN": {
            "RPN_LOSS_SCALE": "MODEL.RPN.LOSS_WEIGHT",
            "SEMANTIC_LOSS_SCALE": "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
            "INSTANCE_LOSS_SCALE": "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
            "COMBINE_ON": "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
            "COMBINE_STUFF_AREA_LIMIT": "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
            "COMBINE_OVERLAP_THRESHOLD": "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
            "COMBINE_INSTANCES_CONFIDENCE_THRESHOLD": "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
        },
        "TEST": {
            "DETECTIONS_PER_IMG": "TEST.DETECTIONS_PER_IMAGE",
            **{f"AUG_{name}": f"TEST.AUG.{name}" for name in ("ON", "MIN_SIZES", "MAX_SIZE", "FLIP")},
        },
    },
}
_RENAMED[1]["TEST"]["AUG_ON"] = "TEST.AUG.ENABLED"
# Version 1 had the anchors once for RPN and once for RetinaNet; what the model is decides which ones count.
_ANCHORS = {"ANCHOR_SIZES": "SIZES", "ANCHOR_ASPECT_RATIOS": "ASPECT_RATIOS"}
_ANCHOR_OWNERS = ("MODEL.RPN", "MODEL.RETINANET")
_GENERATOR = "MODEL.ANCHOR_GENERATOR"
_UNUSED_STRIDES = "MODEL.RETINANET.ANCHOR_STRIDES"
# A file without VERSION that has one of these is of version 1.
_TELLING = ("MODEL.WEIGHT", "TEST.AUG_ON")


def _renamed(version: int) -> Iterator[tuple[str, str]]:
    for section, names in _RENAMED[version].items():
        for name, new in names.items():
            yield f"{section}.{name}", new


def name_in_current_version(key: str) -> str | None:
    """The present name of a key that an older version had, e.g. for an error message; else None."""
    for version in _RENAMED:
        for old, new in _renamed(version):
            if key == old:
                return new
    owner, _, name = key.rpartition(".")
    return f"{_GENERATOR}.{_ANCHORS[name]}" if owner in _ANCHOR_OWNERS and name in _ANCHORS else None


def guess_version(loaded: Mapping[str, Any], default: int, where: str) -> int:
    """VERSION of what was read from a file; guessed from its keys where it does not say.

    Raises:
        TypeError: VERSION is no integer.
        AssertionError: it is newer than ``default``, or below 0.
    """
    if "VERSION" in loaded:
        version = loaded["VERSION"]
    else:
        version = 1 if any(_get(loaded, key) is not None for key in _TELLING) else default
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"{where}: VERSION is an integer up to {default}, not {version!r}.")
    if not 0 <= version <= default:
        raise AssertionError(f"{where}: VERSION is {version}, but only 0 to {default} are known.")
    return version


def upgrade_file(loaded: _Node, version: int, architecture: str, where: str) -> None:
    """Give the keys of an older file, in place, the names of version 2.

    Args:
        loaded: what the file sets; any part of a config.
        version: of the file.
        architecture: MODEL.META_ARCHITECTURE where the file does not set it.
        where: the file, for messages.
    Raises:
        KeyError: a key has its present name, which is not one of the file's version.
    """
    for step in range(version, CURRENT_VERSION):
        anchors = [f"{_GENERATOR}.{name}" for name in _ANCHORS.values()] if step == 1 else []
        for new in (*dict(_renamed(step)).values(), *anchors):
            if _has(loaded, new):
                raise KeyError(
                    f"{where} is of config version {version}, which has no {new}. If that is the right name, "
                    f"say VERSION: {CURRENT_VERSION} and use the present names of all keys."
                )
    logger.warning(
        "%s is a config of version %d; its keys are read as those of version %d.",
        where, version, CURRENT_VERSION,
    )  # fmt: skip
    _upgrade(loaded, version, CURRENT_VERSION, architecture, type(loaded))


def upgrade_config(cfg: Any, to_version: int | None = None) -> Any:
    """A copy of ``cfg`` with the keys of a newer version, by default the current one.

    Raises:
        ValueError: no such version.
    """
    target = CURRENT_VERSION if to_version is None else to_version
    if not cfg.VERSION <= target <= CURRENT_VERSION:
        raise ValueError(f"cannot upgrade from version {cfg.VERSION} to {target}.")
    upgraded = cfg.clone()
    upgraded.defrost()
    _upgrade(upgraded, cfg.VERSION, target, cfg.MODEL.META_ARCHITECTURE, type(cfg))
    upgraded.VERSION = target
    return upgraded


def downgrade_config(cfg: Any, to_version: int) -> Any:
    """A copy of ``cfg`` with the keys of an older version; :func:`upgrade_config` leads back.

    Raises:
        AssertionError: the version is not older, or is none.
    """
    if not 0 <= to_version <= cfg.VERSION:
        raise AssertionError(f"cannot downgrade from version {cfg.VERSION} to {to_version}.")
    old = cfg.clone()
    old.defrost()
    for version in range(cfg.VERSION - 1, to_version - 1, -1):
        for before, now in _renamed(version):
            _move(old, now, before, type(cfg))
        if version == 1:
            for before, now in _ANCHORS.items():
                value = _take(old, f"{_GENERATOR}.{now}")
                for owner in _ANCHOR_OWNERS:
                    _put(old, f"{owner}.{before}", value, type(cfg))
            _put(old, _UNUSED_STRIDES, [], type(cfg))
    old.VERSION = to_version
    return old


def _upgrade(node: _Node, version: int, target: int, architecture: str, factory: _NodeFactory) -> None:
    for step in range(version, target):
        for before, now in _renamed(step):
            _move(node, before, now, factory)
        if step == 1:
            _unite_anchors(node, architecture, factory)


def _unite_anchors(node: _Node, architecture: str, factory: _NodeFactory) -> None:
    is_retinanet = (_get(node, "MODEL.META_ARCHITECTURE") or architecture) == "RetinaNet"
    used = _ANCHOR_OWNERS[is_retinanet]
    for before, now in _ANCHORS.items():
        for owner in _ANCHOR_OWNERS:
            key = f"{owner}.{before}"
            if not _has(node, key):
                continue
            value = _take(node, key)
            if owner == used:
                _put(node, f"{_GENERATOR}.{now}", value, factory)
    if _has(node, _UNUSED_STRIDES):
        _take(node, _UNUSED_STRIDES)


# ------------------------------------------------------------------------- entries of a tree by full name


def _parent(node: Any, key: str) -> tuple[Any, str]:
    """The node that holds ``key`` (None where there is none), and the last part of the name."""
    *path, name = key.split(".")
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return (node if isinstance(node, Mapping) else None), name


def _has(node: Mapping[str, Any], key: str) -> bool:
    holder, name = _parent(node, key)
    return holder is not None and name in holder


def _get(node: Mapping[str, Any], key: str) -> Any:
    holder, name = _parent(node, key)
    return None if holder is None else holder.get(name)


def _take(node: _Node, key: str) -> Any:
    """Remove an entry, and the section above it if that is empty now; returns the value."""
    holder, name = _parent(node, key)
    value = holder.pop(name)
    section = key.rpartition(".")[0]
    if section and not holder:
        _take(node, section)
    return value


def _put(node: _Node, key: str, value: Any, factory: _NodeFactory) -> None:
    *path, name = key.split(".")
    for part in path:
        node = node.setdefault(part, factory())
    node[name] = value


def _move(node: _Node, source: str, target: str, factory: _NodeFactory) -> None:
    if _has(node, source):
        _put(node, target, _take(node, source), factory)
