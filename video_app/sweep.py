"""Training and evaluating the heads of a probe sweep: an optimiser and metrics for each, the best as a run of its own.

Out, after each evaluation: OUTPUT_DIR/sweep.json (every head, its settings and metrics), OUTPUT_DIR/inference/head_NN/,
and OUTPUT_DIR/sweep/NN/{config.yaml, model_final.pth} of the best head, or of all (MODEL.VIDEO_HEAD.SWEEP.SAVE).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from d2_frozen.engine import FrozenCheckpointer, build_optimizer, look_into_checkpoint
from d2_frozen.engine.trainer import facts_for_prediction
from d2_frozen.files import by_the_way, write_text
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from video_app.evaluation import TopKEvaluator
from video_app.models.sweep import FrozenVideoSweep

logger = logging.getLogger("d2_frozen.video_app.sweep")


class HeadOptimizers(torch.optim.Optimizer):
    """One optimiser for each head behind the interface of one, clipping and all: a head steps as it does alone."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        # The very groups of the optimisers: who sets a rate here sets it there.
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})

    def step(self, closure: Any = None) -> None:
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"heads": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: of another number of heads.
        """
        heads = state_dict.get("heads", [])
        if len(heads) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint has the optimiser state of {len(heads)} heads, this sweep has {len(self.optimizers)}; "
                "resume with the lists of MODEL.VIDEO_HEAD.SWEEP that it was started with."
            )
        for optimizer, state in zip(self.optimizers, heads):
            optimizer.load_state_dict(state)
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]


def build_sweep_optimizer(cfg: CfgNode, model: FrozenVideoSweep) -> HeadOptimizers:
    """For each head the optimiser of a run of its own."""
    return HeadOptimizers(
        [
            build_optimizer(candidate.config(cfg), model.alone(index))
            for index, candidate in enumerate(model.candidates)
        ]
    )


class SweepEvaluator(DatasetEvaluator):
    """A :class:`TopKEvaluator` for each head; results are ``{"head_NN": {"top1", ...}}``.

    Args:
        count: of heads.
        output_dir: each head's files go to ``output_dir/head_NN``.
        num_classes: as of :class:`TopKEvaluator`.
    """

    def __init__(self, dataset_name: str, count: int, output_dir: str, num_classes: int = 0) -> None:
        folders = [os.path.join(output_dir, f"head_{index:02d}") for index in range(count)]
        self._of_heads = [
            TopKEvaluator(dataset_name, output_dir=folder, num_classes=num_classes) for folder in folders
        ]

    def reset(self) -> None:
        for evaluator in self._of_heads:
            evaluator.reset()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        for index, evaluator in enumerate(self._of_heads):
            evaluator.process(inputs, [{"scores": output["heads"][index]} for output in outputs])

    def evaluate(self) -> dict[str, dict[str, float]]:
        log = logging.getLogger("d2_frozen.video_app.evaluation")
        level = log.level
        log.setLevel(logging.ERROR)  # a table of all classes for each head would bury the one of the sweep
        try:
            results = [evaluator.evaluate() for evaluator in self._of_heads]
        finally:
            log.setLevel(level)
        return {f"head_{index:02d}": found["video"] for index, found in enumerate(results) if found}


def report(cfg: CfgNode, model: FrozenVideoSweep, results: dict[str, Any]) -> dict[str, Any]:
    """Find the best head, log and write the table, write the best head or all of them.

    The best has the highest top-1 on the first set of DATASETS.TEST, the first of equals. So its figure is a maximum
    over the heads on that set, as in V-JEPA 2; the other sets tell how it does elsewhere, and the log says so.

    Args:
        results: of :class:`SweepEvaluator`, as the trainer's ``test`` gives them; empty on other processes.
    Returns:
        The same with "video", the best head's metrics, in front.
    """
    if not cfg.DATASETS.TEST:
        if cfg.MODEL.VIDEO_HEAD.SWEEP.SAVE == "all" and comm.is_main_process():
            for index in range(len(model.candidates)):
                save_head(cfg, model, index)
        logger.warning("DATASETS.TEST is empty, so there is no best head.")
        return results
    several = len(cfg.DATASETS.TEST) > 1
    per_set = results if several else {name: results for name in cfg.DATASETS.TEST}
    first = per_set.get(cfg.DATASETS.TEST[0]) or {}
    top1 = [float(first.get(_key(k), {}).get("top1", -1.0)) for k in range(len(model.candidates))]
    usable = [-1.0 if gone else value for value, gone in zip(top1, model.diverged.tolist())]
    best = max(range(len(usable)), key=lambda k: usable[k])
    model.best.fill_(comm.all_gather(best)[0])  # only the first process has results
    if not comm.is_main_process() or not first:
        return results
    rows = [_row(model, k, first) for k in range(len(model.candidates))]
    logger.info(
        "Sweep on %s, the best is head %d:\n%s",
        cfg.DATASETS.TEST[0],
        best,
        tabulate(
            [
                [("* " if row["head"] == best else "") + str(row["head"]), *list(row.values())[1:]]
                for row in rows
            ],
            headers=list(rows[0]),
            colalign=("right",),
        ),
    )
    logger.info("%s", _what_the_best_is_worth(cfg.DATASETS.TEST, per_set, best, len(rows)))
    with by_the_way(
        "sweep.json or heads in sweep/ are not written (an evaluation of model_final.pth writes them)"
    ):
        _write(cfg, model, rows, best)
    found = {name: {"video": of_set[_key(best)], **of_set} for name, of_set in per_set.items()}
    return found if several else found[cfg.DATASETS.TEST[0]]


def _write(cfg: CfgNode, model: FrozenVideoSweep, rows: list[dict[str, Any]], best: int) -> None:
    saved = cfg.MODEL.VIDEO_HEAD.SWEEP.SAVE
    before = _document_before(cfg)
    for index in range(len(rows)) if saved == "all" else [best]:
        save_head(cfg, model, index)
    document = {"dataset": cfg.DATASETS.TEST[0], "best": best, "saved": saved, "heads": rows}
    write_text(os.path.join(cfg.OUTPUT_DIR, "sweep.json"), json.dumps(document, indent=1))
    if saved == before.get("saved") == "best" and before["best"] != best:
        # From the middle of training, it would look like a result.
        shutil.rmtree(_folder_of_head(cfg, before["best"]), ignore_errors=True)


def save_head(cfg: CfgNode, model: FrozenVideoSweep, index: int) -> Path:
    """Write OUTPUT_DIR/sweep/NN/{config.yaml, model_final.pth}, as a run of this head alone would leave them."""
    alone = model.candidates[index].config(cfg)
    alone.defrost()
    alone.OUTPUT_DIR = _folder_of_head(cfg, index)
    alone.freeze()
    folder = Path(alone.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", alone.dump())
    # An evaluation need not have the training data, which names the classes.
    facts = {**_classes_before(folder, alone.MODEL.VIDEO_HEAD.NUM_CLASSES), **facts_for_prediction(alone)}
    saver = FrozenCheckpointer(
        model.alone(index),
        str(folder),
        save_full_model=cfg.MODEL.FROZEN.SAVE_FULL_MODEL,
        extra={"seed": int(cfg.SEED), **facts},
    )
    saver.save("model_final")
    return folder


def _classes_before(folder: Path, count: int) -> dict[str, Any]:
    """Names of classes in the file of a head that is written again."""
    try:
        before = look_into_checkpoint(str(folder / "model_final.pth"))
    except (OSError, ValueError):
        return {}
    if len(before.get("classes", ())) != count:  # of other data
        return {}
    return {key: before[key] for key in ("classes", "class_ids")}


def _document_before(cfg: CfgNode) -> dict[str, Any]:
    """sweep.json as the last evaluation left it."""
    try:
        return dict(json.loads(Path(cfg.OUTPUT_DIR, "sweep.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _folder_of_head(cfg: CfgNode, index: int) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "sweep", f"{index:02d}")


def sweep_inside(model: nn.Module) -> FrozenVideoSweep | None:
    """The sweep model, also from inside DistributedDataParallel; None for any other model."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, FrozenVideoSweep) else None


def _row(model: FrozenVideoSweep, index: int, metrics: dict[str, Any]) -> dict[str, Any]:
    found = {} if model.diverged[index] else metrics.get(_key(index), {})
    return {
        "head": index,
        **model.candidates[index]._asdict(),
        "top1": found.get("top1"),
        "top5": found.get("top5"),
        "mean_class_acc": found.get("mean_class_acc"),
        "state": "diverged" if model.diverged[index] else "",
    }


def _what_the_best_is_worth(names: Sequence[str], per_set: dict[str, Any], best: int, heads: int) -> str:
    """A figure that chose the head flatters it; those of other sets do not."""
    if len(names) == 1:
        return (
            f"{names[0]} chose the best of {heads} heads, so its figure there flatters it. For one that does not, give "
            f"a second set: DATASETS.TEST ('{names[0]}', 'OTHER') chooses on the first and measures on the other."
        )
    others = [
        f"{name}: top-1 {of_head['top1']:.2f}, top-5 {of_head['top5']:.2f}"
        for name in names[1:]
        if (of_head := per_set.get(name, {}).get(_key(best)))
    ]
    return f"Head {best}, chosen on {names[0]}, on sets that had no say in it: {'; '.join(others)}"


def _key(index: int) -> str:
    return f"head_{index:02d}"
