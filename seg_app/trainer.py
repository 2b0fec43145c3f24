"""Training and evaluation of semantic segmentation: d2_frozen's trainer with this app's data and metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from d2_frozen.data import build_test_loader, build_train_loader
from d2_frozen.data.written import file_name_of
from d2_frozen.detection.test_time_augmentation import evaluate_augmented
from d2_frozen.engine import FrozenTrainer
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from seg_app.data import SegmentationMapper
from seg_app.data.prepare import classes_of
from seg_app.evaluation import LabelMapEvaluator, LabelModel, MultiScaleModel, sliding_window_of


class SegmentationTrainer(FrozenTrainer):
    """Args: see :class:`d2_frozen.engine.FrozenTrainer`."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iteration: int = 0) -> Iterable[list[dict[str, Any]]]:
        """Batches from iteration ``start_iteration`` on, by the contract of ``d2_frozen.data.draws``."""
        mapper = SegmentationMapper.from_config(cfg, is_train=True)
        return build_train_loader(cfg, start_iteration=start_iteration, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """One image per batch, in dataset order; labels are read by the evaluator."""
        return build_test_loader(
            cfg, dataset_name, mapper=SegmentationMapper.from_config(cfg, is_train=False)
        )

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """mIoU and so on; files go to ``OUTPUT_DIR/inference``, of several test sets to a folder in it each."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(set(cfg.DATASETS.TEST)) > 1:
            folder = os.path.join(folder, file_name_of(dataset_name))
        return LabelMapEvaluator(dataset_name, output_dir=folder, write_predictions=cfg.TEST.SAVE_PREDICTIONS)

    @classmethod
    def check_testing(cls, cfg: CfgNode, model: nn.Module) -> None:
        """See :class:`FrozenTrainer`."""
        if getattr(cls.build_evaluator, "__func__", None) is SegmentationTrainer.build_evaluator.__func__:  # type: ignore[attr-defined]
            for name in cfg.DATASETS.TEST:
                if classes_of(name) is None:
                    raise ValueError(
                        f"dataset {name} of DATASETS.TEST does not name its classes, which its evaluation needs. Give "
                        "`classes` in its DATASETS.REGISTER entry, as in that of the training data; put classes.txt "
                        "(one name per line) or classes.json beside its label maps; or set DATASETS.TEST to ()."
                    )
        if not getattr(model, "semantic_on", True):
            raise ValueError(
                "MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False, but it is what is evaluated; set it to True, or "
                "DATASETS.TEST to ()."
            )
        if cfg.TEST.AUG.ENABLED:
            MultiScaleModel.from_config(cfg, model)
        else:
            sliding_window_of(cfg, model)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """At one size; TEST.SLIDING_WINDOW holds. Evaluators of your own are given all scores, others only labels."""
        tested = sliding_window_of(cfg, model)
        return super().test(cfg, tested if evaluators is not None else LabelModel(tested), evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with TEST.AUG: several sizes, mirrored too; keys and files as :class:`FrozenTrainer` has them."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, output_folder=folder) for name in cfg.DATASETS.TEST]
        mapper = SegmentationMapper(False, augmentations=[], image_format=cfg.INPUT.FORMAT)
        tested = LabelModel(MultiScaleModel.from_config(cfg, model))
        return evaluate_augmented(cfg, tested, mapper, evaluators)
