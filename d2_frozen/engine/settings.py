"""Can a run with this config work at all? What is wrong is told before data is read and a model is built.

Values that only one part uses are checked by that part; here are those that would fail late, or in a library that does
not know the name of the key.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile

from d2_frozen.claims import CLAIM_FILE, claimed
from d2_frozen.tasks import leaves
from detectron2.config import CfgNode
from detectron2.utils import comm


def check_settings(cfg: CfgNode, train: bool) -> None:
    """Look at the keys of a complete config, and whether OUTPUT_DIR can be written to (it is made).

    Args:
        train: False for evaluation only.
    Raises:
        ValueError: names the key, its value, and what it may be.
        OSError: OUTPUT_DIR cannot be made or written to.
    """
    _check_whole_numbers(cfg, train)
    if train:
        _check_steps(cfg)
        _check_best_checkpoint(cfg)
    key = "DATASETS.TRAIN" if train else "DATASETS.TEST"
    if not (cfg.DATASETS.TRAIN if train else cfg.DATASETS.TEST):
        what = "train on" if train else "evaluate on: --eval-only does nothing else"
        raise ValueError(
            f"{key} is empty: there is nothing to {what}. Name a dataset, e.g. {key} \"('parts',)\"."
        )
    if comm.is_main_process():
        check_output_dir(cfg.OUTPUT_DIR)


def check_output_dir(folder: str) -> None:
    """Make OUTPUT_DIR and write a file in it.

    Raises:
        ValueError: it is empty.
        OSError: of the same class as the system's own error.
    """
    if not folder:
        raise ValueError(
            "OUTPUT_DIR is empty. Give a folder for checkpoints, metrics and logs, e.g. ./output"
        )
    if "://" in folder:
        return  # for Detectron2's PathManager
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
            file.flush()
    except OSError as err:
        raise type(err)(
            err.errno,
            f"OUTPUT_DIR cannot be written to: {err.strerror}. Give another folder",
            os.path.abspath(folder),
        ) from err
    for path in (os.path.join(folder, name) for name in ("log.txt", "metrics.json")):
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise PermissionError(
                errno.EACCES,
                "OUTPUT_DIR has a file of another user, as containers leave them, that cannot be added to. Change its "
                "owner, or give another folder",
                os.path.abspath(path),
            )


def claimed_output_dir(folder: str) -> contextlib.AbstractContextManager[None]:
    """Hold OUTPUT_DIR for one training; another one there raises InUseError (claims.py)."""
    if "://" in folder:
        return contextlib.nullcontext()
    advice = (
        "Two trainings would overwrite each other's files. Wait for that one or stop it, or give another OUTPUT_DIR; "
        "--eval-only is possible meanwhile."
    )
    return claimed(os.path.join(folder, CLAIM_FILE), advice=advice)


def _check_whole_numbers(cfg: CfgNode, train: bool) -> None:
    seeds = 2**32 - comm.get_world_size()  # each process adds its rank
    limits: dict[str, tuple[int, int | None, str]] = {
        "SEED": (-(2**63), seeds, "negative to draw one"),
        "DATALOADER.NUM_WORKERS": (0, None, "0 to read in the main process"),
    }
    if train:
        limits |= {
            "SOLVER.MAX_ITER": (1, None, "to evaluate only, use --eval-only"),
            "SOLVER.IMS_PER_BATCH": (1, None, "images per iteration, over all processes"),
            "SOLVER.CHECKPOINT_PERIOD": (1, None, "more than SOLVER.MAX_ITER for none but the last"),
        }
    values = dict(leaves(cfg))
    for key, (least, most, meaning) in limits.items():
        value = values[key]
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"at most {most}"
            raise ValueError(f"{key} is {value}; it must be {bounds} ({meaning}).")


def _check_best_checkpoint(cfg: CfgNode) -> None:
    metric, period = cfg.SOLVER.BEST_CHECKPOINT, cfg.TEST.EVAL_PERIOD
    if metric and not (cfg.DATASETS.TEST and 0 < period < cfg.SOLVER.MAX_ITER):
        raise ValueError(
            f"SOLVER.BEST_CHECKPOINT is {metric!r}, but nothing is evaluated before the end: set TEST.EVAL_PERIOD (it "
            f"is {period}) to less than SOLVER.MAX_ITER ({cfg.SOLVER.MAX_ITER}), and name a dataset in DATASETS.TEST."
        )


def _check_steps(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and list(solver.STEPS) != sorted(set(solver.STEPS)):
        raise ValueError(
            f"SOLVER.STEPS is {tuple(solver.STEPS)}; iterations at which the learning rate falls must increase."
        )
    # Steps behind the end are left out, as in Detectron2.
    within = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and within and len(within) >= solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.STEPS is {tuple(solver.STEPS)}: as many steps as SOLVER.MAX_ITER {solver.MAX_ITER} has "
            'iterations. Give fewer, or none: SOLVER.STEPS "()".'
        )
