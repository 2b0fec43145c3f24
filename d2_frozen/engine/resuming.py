"""Does a checkpoint belong to this run? What differs is told: settings, classes, and what the optimiser remembers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml

from d2_frozen import tasks
from d2_frozen.data.checks import difference
from d2_frozen.engine.checkpoint import CheckpointMismatchError
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

_SHOWN = 12


def config_changes(stored: Any, cfg: CfgNode) -> str:
    """What differs between a checkpoint's config (yaml) and that of this run, in words; "" for nothing or no config."""
    if not isinstance(stored, str):
        return ""
    try:
        content = yaml.safe_load(stored)
    except yaml.YAMLError:
        return ""
    if not isinstance(content, Mapping):
        return ""
    before, now = dict(tasks.leaves(content)), dict(tasks.leaves(yaml.safe_load(cfg.dump())))
    # A key that only one of them has is of another version of this project.
    keys = [
        key
        for key in before
        if key not in tasks.NOT_PART_OF_RESULT and before[key] != now.get(key, before[key])
    ]
    shown = [f"{key} was {before[key]!r:.100}, is {now[key]!r:.100}" for key in keys[:_SHOWN]]
    return "; ".join(shown) + (f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def tell_of_other_classes(facts: Mapping[str, Any], cfg: CfgNode, names: Sequence[str]) -> None:
    """Warn where the classes that a checkpoint names are not those of the datasets ``names``."""
    trained = facts.get("classes")
    if not trained or not names:
        return
    asked = cfg.clone()
    asked.defrost()
    asked.DATASETS.TRAIN = tuple(names)
    try:
        found = tasks.task_of(cfg).classes(asked)
    except (OSError, KeyError, ValueError):  # the checks of the data have said what there is to say
        return
    if found is None or list(found.names) == list(trained):
        return
    logger.warning(
        "The head was trained on classes that %s does not have, or has in another order: %s. Classes are known by "
        "their number: results are wrong, unless these are other names of the same classes.",
        names[0],
        difference(list(trained), list(found.names), "the head", names[0]),
    )


def require_fitting_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer, file: str) -> None:
    """
    Args:
        state: of the optimiser in the checkpoint ``file``; one without ``param_groups`` is not looked at.
    Raises:
        CheckpointMismatchError: it is another optimiser's, or of other parameters.
    """
    saved, own = state.get("param_groups"), optimizer.state_dict().get("param_groups")
    if saved is None or own is None:
        return  # a sweep's has one optimiser per head, and looks for itself
    # What tells SGD from AdamW; torch adds other keys from version to version, and fills them in.
    kinds = [{"momentum", "betas"} & set(group) for group in (saved[0], own[0])]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if kinds[0] != kinds[1]:
        seen = "it is another optimiser's (SOLVER.OPTIMIZER)"
    elif sizes[0] != sizes[1]:
        seen = (
            f"it has parameters in groups of {sizes[0]}, this run in groups of {sizes[1]}: other parts train, or with "
            "other weight decays or rates (SOLVER.WEIGHT_DECAY_*, BIAS_LR_FACTOR, LAYER_DECAY)"
        )
    else:
        return
    raise CheckpointMismatchError(
        f"{file}: what the optimiser remembers does not fit this run: {seen}. Resume with the settings that the run "
        f"began with, or start a new one from its weights: MODEL.WEIGHTS {file}, another OUTPUT_DIR, and no --resume."
    )
