"""Train or evaluate by config, with Detectron2's flags. ``MODEL.META_ARCHITECTURE`` chooses the task (tasks.py).

python train_net.py --config-file configs/quickstart/detection.yaml
python train_net.py --config-file output/config.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from d2_frozen import tasks
from d2_frozen.cpus import fit_threads
from d2_frozen.files import by_the_way
from d2_frozen.processes import run_processes
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("d2_frozen.train_net")


def setup(args: argparse.Namespace, claims: contextlib.ExitStack | None = None) -> CfgNode:
    """Flags to a complete, frozen config: datasets registered and checked, class count and seed filled in.

    Args:
        claims: of a training; while it is open, no other one can begin in OUTPUT_DIR.
    Raises:
        InUseError: another one has begun there.
        KeyError, AssertionError: unknown key in a file / in KEY VALUE arguments.
        ValueError: bad data (one error listing the problems), or settings that cannot be or contradict each other.
        OSError: OUTPUT_DIR cannot be written to, or a file is missing.
    """
    from d2_frozen.engine.checkpoint import require_same_checkpoint, saved_seed
    from d2_frozen.engine.settings import check_settings, claimed_output_dir

    cfg = read_config(args.config_file, args.opts)
    check_settings(cfg, train=not args.eval_only)
    if claims is not None and not args.eval_only and comm.is_main_process():
        claims.enter_context(claimed_output_dir(cfg.OUTPUT_DIR))
    if args.resume:
        require_same_checkpoint(cfg.OUTPUT_DIR)
    if not args.eval_only and cfg.SEED < 0:
        seed = saved_seed(cfg.OUTPUT_DIR) if args.resume else None
        cfg.SEED = comm.shared_random_seed() % 2**31 if seed is None else seed
    # Detectron2's default_setup wants the final config; what is found in the data must be logged before.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_frozen")
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda" and device.index is not None:
        # Or the memory in the log would be that of GPU 0, and some of it taken there.
        torch.cuda.set_device(device)
    tasks.task_of(cfg).prepare_datasets(cfg, train=not args.eval_only)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def read_config(config_file: str, options: list[str]) -> CfgNode:
    """File and KEY VALUE options over the defaults; MODEL.DEVICE becomes cpu on a machine without CUDA."""
    cfg = tasks.read_config(config_file, options)
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as err:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; choose cuda, cuda:1 (a GPU by number), or cpu."
        ) from err
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """One process of the run: train and evaluate, or evaluate only.

    Returns:
        dataset name -> metrics (or the metrics themselves for a single dataset), as Detectron2 has it; None where
        nothing was evaluated.
    """
    with contextlib.ExitStack() as claims:
        return _run(args, setup(args, claims))


def _run(args: argparse.Namespace, cfg: CfgNode) -> dict[str, Any] | None:
    from d2_frozen.engine.allocator import keep_freed_memory

    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
        fit_threads()
    if args.eval_only:
        model = evaluation_model(cfg, resume=args.resume)
        measured = evaluate(cfg, model)
        finish(cfg, model, measured, trained=False)
        verify(cfg, measured)
        return measured
    trainer = tasks.task_of(cfg).trainer()(cfg)
    trainer.resume_or_load(resume=args.resume)
    if trainer.start_iter >= trainer.max_iter:
        found = evaluate_complete(trainer)
        finish(cfg, trainer.model, found)
        verify(cfg, found)
        return found
    results: dict[str, Any] | None = trainer.train()
    finish(cfg, trainer.model, results)
    return results


def evaluate_complete(trainer: Any) -> dict[str, Any]:
    """Metrics of a training that was complete when it was resumed; noted where its last evaluation was interrupted."""
    logger.info("Training is already complete at iteration %d.", trainer.start_iter)
    found = evaluate(trainer.cfg, trainer.model)
    trainer.record_last_evaluation(found)
    return found


def verify(cfg: CfgNode, results: dict[str, Any] | None) -> None:
    """Detectron2's TEST.EXPECTED_RESULTS: ends the process with 1 where they differ. A training does it itself."""
    if len(cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
        verify_results(cfg, results)


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Metrics of the model on DATASETS.TEST, with TEST.AUG too where that is on."""
    trainer = tasks.task_of(cfg).trainer()
    results = trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED and cfg.DATASETS.TEST:
        results.update(trainer.test_with_TTA(cfg, model))
    return results


def evaluation_model(cfg: CfgNode, resume: bool = False) -> nn.Module:
    """The model with MODEL.WEIGHTS (or the last checkpoint of OUTPUT_DIR), every tensor of which must fit."""
    from d2_frozen.engine import FrozenCheckpointer
    from d2_frozen.engine.resuming import tell_of_other_classes

    model = tasks.task_of(cfg).trainer().build_model(_without_needless_weights(cfg, resume))
    checkpointer = FrozenCheckpointer(model, save_dir=cfg.OUTPUT_DIR, strict=True)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        logger.warning(
            "MODEL.WEIGHTS is empty%s: the heads that are evaluated are untrained.",
            f", and {cfg.OUTPUT_DIR} has no checkpoint" if resume else "",
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if comm.is_main_process():
        tell_of_other_classes(checkpointer.facts, cfg, cfg.DATASETS.TEST)
    return model


def _without_needless_weights(cfg: CfgNode, resume: bool) -> CfgNode:
    """The config without MODEL.TIMM.PRETRAINED, which need not be there, where the checkpoint has the backbone too."""
    from d2_frozen.engine import has_backbone, last_checkpoint, look_into_checkpoint

    if not cfg.MODEL.TIMM.PRETRAINED:
        return cfg
    try:
        path = (resume and last_checkpoint(cfg.OUTPUT_DIR)) or cfg.MODEL.WEIGHTS
        needless = bool(path) and has_backbone(look_into_checkpoint(path))
    except (OSError, ValueError):  # who loads it says what is wrong
        needless = False
    if not needless:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = ""
    cfg.freeze()
    return cfg


def finish(cfg: CfgNode, model: nn.Module, results: dict[str, Any] | None, trained: bool = True) -> None:
    """Say what came out and where it lies: table of metrics, pictures, files.

    Args:
        trained: False after an evaluation, which writes neither weights nor metrics: what lies there is of another run.
    """
    if not comm.is_main_process():
        return
    lines = []
    if results:
        lines.append(results_table(cfg, results))
    for name in dict.fromkeys(cfg.DATASETS.TEST):
        with by_the_way(f"Pictures of predictions on {name} are not written"):
            sheet = tasks.task_of(cfg).write_pictures(cfg, model, name)
            if sheet:
                lines.append(f"pictures:   {sheet}")
    for label, file in (
        ("metrics", "metrics.json"),
        ("weights", "model_final.pth"),
        *([("best", "model_best.pth")] if cfg.SOLVER.BEST_CHECKPOINT else []),
        ("config", "config.yaml"),
    ):
        path = os.path.join(cfg.OUTPUT_DIR, file)
        if os.path.exists(path) and (trained or label == "config"):
            lines.append(f"{label + ':':11s} {path}")
    logger.info("Done.\n%s", "\n".join(lines))


def results_table(cfg: CfgNode, results: dict[str, Any]) -> str:
    """Rows: dataset and task; columns: AP, AP50, ..., or mIoU, ..."""
    # A dataset that is named twice has its results once.
    per_dataset = results if len(set(cfg.DATASETS.TEST)) > 1 else {cfg.DATASETS.TEST[0]: results}
    rows, columns = [], []
    for dataset, of_task in per_dataset.items():
        for task, metrics in of_task.items():
            main_metrics = {key: value for key, value in metrics.items() if "-" not in key}
            columns += [key for key in main_metrics if key not in columns]
            rows.append({"dataset": dataset, "task": task, **main_metrics})
    table = [[row.get(key, "") for key in ("dataset", "task", *columns)] for row in rows]
    return tabulate(table, headers=["dataset", "task", *columns], floatfmt=".2f")


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's parser, flags unchanged."""
    return default_argument_parser()


def console_main() -> None:
    """Entry point of ``train_net.py``, ``python -m d2_frozen.train_net`` and the console script."""
    run_processes(main, argument_parser().parse_args())


def app_main(app: str) -> None:
    """Entry point of ``python -m seg_app`` and the like: as ``train_net.py``, but for configs of this app alone."""
    args = argument_parser().parse_args()
    cfg = tasks.read_config(args.config_file, args.opts)
    if tasks.APPS.get(cfg.MODEL.META_ARCHITECTURE) != app:
        own = ", ".join(name for name, of in tasks.APPS.items() if of == app)
        sys.exit(
            f"python -m {app}: {args.config_file or 'the default config'} is a config of {tasks.task_of(cfg).name}: "
            f"its MODEL.META_ARCHITECTURE is none of {own}. train_net.py runs any task."
        )
    run_processes(main, args)


if __name__ == "__main__":
    console_main()
