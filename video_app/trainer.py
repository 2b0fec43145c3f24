"""Training and evaluation of video heads: d2_frozen's trainer with this app's clips and metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from d2_frozen.data import build_test_loader, build_train_loader
from d2_frozen.engine import FrozenTrainer
from d2_frozen.engine.checkpoint import save_after
from d2_frozen.files import by_the_way
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.evaluation import DatasetEvaluator
from video_app.clips.mapper import ClipMapper
from video_app.evaluation import TopKEvaluator
from video_app.models.sweep import SWEEP, FrozenVideoSweep, candidates
from video_app.sweep import SweepEvaluator, build_sweep_optimizer, report, sweep_inside


class VideoTrainer(FrozenTrainer):
    """Args: see :class:`d2_frozen.engine.FrozenTrainer`."""

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's, for SOLVER.REFERENCE_WORLD_SIZE; the rates of a sweep are rates like SOLVER.BASE_LR."""
        scaled = FrozenTrainer.auto_scale_workers(cfg, num_workers)
        rates = cfg.MODEL.VIDEO_HEAD.SWEEP.LR
        if scaled is cfg or not rates:
            return scaled
        scaled.defrost()
        scaled.MODEL.VIDEO_HEAD.SWEEP.LR = [
            float(rate) * num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE for rate in rates
        ]
        if cfg.is_frozen():
            scaled.freeze()
        return scaled

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iteration: int = 0) -> Iterable[list[dict[str, Any]]]:
        """Batches of clips from iteration ``start_iteration`` on, by the contract of ``d2_frozen.data.draws``."""
        mapper = ClipMapper.from_config(cfg, is_train=True)
        return build_train_loader(cfg, start_iteration=start_iteration, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """One video per batch, with all of its views, in dataset order."""
        return build_test_loader(cfg, dataset_name, mapper=ClipMapper.from_config(cfg, is_train=False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Top-1, top-5 and so on, of each head of a sweep; files go to ``OUTPUT_DIR/inference``."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        classes = cfg.MODEL.VIDEO_HEAD.NUM_CLASSES
        if cfg.MODEL.META_ARCHITECTURE == SWEEP:
            return SweepEvaluator(dataset_name, len(candidates(cfg)), folder, classes)
        return TopKEvaluator(dataset_name, output_dir=folder, num_classes=classes)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """As every task's; a sweep has one for each head."""
        if isinstance(model, FrozenVideoSweep):
            return build_sweep_optimizer(cfg, model)
        return super().build_optimizer(cfg, model)

    def build_hooks(self) -> list[HookBase]:
        """As every task's; that of a sweep writes ``model_final.pth`` again when its best head is found."""
        hooks = super().build_hooks()
        if self.cfg.MODEL.META_ARCHITECTURE == SWEEP and self.cfg.DATASETS.TEST:
            hooks.append(CallbackHook(after_train=_write_best_head))
        return hooks

    def record_last_evaluation(self, results: dict[str, Any]) -> None:
        """See :class:`FrozenTrainer`."""
        super().record_last_evaluation(results)
        if sweep_inside(self.model) is not None and self.cfg.DATASETS.TEST:
            _write_best_head(self)

    @classmethod
    def check_testing(cls, cfg: CfgNode, model: nn.Module) -> None:
        """See :class:`FrozenTrainer`."""
        ClipMapper.from_config(cfg, is_train=False)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """As Detectron2's. After a sweep also its table and its best head as files; see :mod:`video_app.sweep`."""
        results = super().test(cfg, model, evaluators)
        sweep = sweep_inside(model)
        return results if sweep is None else report(cfg, sweep, results)


def _write_best_head(trainer: Any) -> None:
    """The last checkpoint was written before the last evaluation; who loads it would predict by another head."""
    done = max(trainer.iter, trainer.start_iter)
    if done < trainer.max_iter:
        return
    with by_the_way("model_final.pth does not say which head is the best"):
        save_after(trainer.checkpointer, trainer, done - 1, "model_final")
