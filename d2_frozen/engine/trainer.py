"""The training loop of all tasks: Detectron2's DefaultTrainer, for models with a frozen part.

What differs from DefaultTrainer: data and model draws are functions of (seed, iteration), so a resumed run equals an
uninterrupted one; checkpoints hold the trained part; signals and Ctrl-C save and leave; AdamW; AMP on CPU too.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from d2_frozen import tasks
from d2_frozen.act_checkpoint import use_act_checkpoint
from d2_frozen.backbone import exclude_frozen_from_ddp, frozen_parts
from d2_frozen.caching import FeatureCache
from d2_frozen.data import build_test_loader, build_train_loader
from d2_frozen.data.device import on_device
from d2_frozen.data.draws import start_values
from d2_frozen.data.prepare import class_names
from d2_frozen.data.transforms import build_augmentations
from d2_frozen.data.written import file_name_of
from d2_frozen.detection import FrozenRCNNWithTTA, evaluate_with_tta
from d2_frozen.engine.allocator import less_memory
from d2_frozen.engine.caching import CacheReport, check_cache_settings, serve_features
from d2_frozen.engine.checkpoint import CheckpointMismatchError, FrozenCheckpointer, save_after
from d2_frozen.engine.hooks import (
    KeepBestCheckpoint,
    KeepNewestCheckpoints,
    ProgressPrinter,
    SaveAndLeaveOnSignal,
    SavesWhenItCan,
    SeedEachIteration,
    WritesWhenItCan,
)
from d2_frozen.engine.optimizer import build_lr_scheduler, build_optimizer
from d2_frozen.engine.resuming import config_changes, require_fitting_optimizer, tell_of_other_classes
from d2_frozen.files import by_the_way, drop_half_line
from d2_frozen.summary import parts_table
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter

logger = logging.getLogger(__name__)


class FrozenTrainer(DefaultTrainer):
    """Train the heads of a model by config.

    Args:
        cfg: complete and frozen; ``SEED`` is not negative (``d2_frozen.train_net.setup`` draws one).
    """

    iter: int

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        if cfg.SEED < 0:
            raise ValueError(
                "SEED is negative: give one, or let d2_frozen.train_net.setup(args) draw and record it."
            )
        check_cache_settings(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if cfg.DATASETS.TEST:
            self.check_testing(cfg, model)
        optimizer = self.build_optimizer(cfg, model)
        if comm.is_main_process():
            logger.info("Parts of the model:\n%s", parts_table(model, optimizer))
        parallel = create_ddp_model(exclude_frozen_from_ddp(model), broadcast_buffers=False)
        self.feature_cache: FeatureCache | None = None
        # Detectron2 draws pictures of the training input from the computer's memory.
        leave = ("instances", "proposals") if cfg.VIS_PERIOD > 0 else ()
        self.stream = ResumableStream(
            self._batches, lambda loader: on_device(loader, cfg.MODEL.DEVICE, leave)
        )
        self._trainer = loop_kind(cfg)(parallel, self.stream, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = FrozenCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            save_full_model=cfg.MODEL.FROZEN.SAVE_FULL_MODEL,
            extra=lambda: {"seed": int(cfg.SEED), **facts_for_prediction(cfg)},
            trainer=weakref.proxy(self),
        )
        self.cfg, self.start_iter, self.max_iter = cfg, 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def _batches(self, start_iteration: int) -> Iterable[Any]:
        loader = self._train_loader(start_iteration)
        # Only now, as a checkpoint may bring the weights of the frozen part.
        require_equal_frozen_parts(self.model_without_ddp)
        service = serve_features(self.cfg, self.model_without_ddp, loader)
        self.feature_cache = service.cache if service is not None else None
        return loader

    def _train_loader(self, start_iteration: int) -> Iterable[Any]:
        parameters = inspect.signature(self.build_train_loader).parameters.values()
        if any(p.name == "start_iteration" or p.kind is p.VAR_KEYWORD for p in parameters):
            return self.build_train_loader(self.cfg, start_iteration=start_iteration)
        if start_iteration:  # overridden as in Detectron2, (cls, cfg)
            logger.warning(
                "The data begins anew, as in Detectron2: %s.build_train_loader has no argument start_iteration. With "
                "one, and d2_frozen.data.build_train_loader(cfg, start_iteration, mapper=...) in it, a resumed run "
                "goes on where it was.",
                type(self).__name__,
            )
        return self.build_train_loader(self.cfg)

    @property
    def model_without_ddp(self) -> nn.Module:
        """The model itself, where ``model`` may be DistributedDataParallel's."""
        return self.checkpointer.model

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from ``last_checkpoint`` of OUTPUT_DIR, data stream included, or start from MODEL.WEIGHTS.

        Raises:
            As :meth:`FrozenCheckpointer.resume_or_load`; a misfit of what is resumed names the settings that changed.
        """
        resuming = resume and self.checkpointer.has_checkpoint()
        try:
            super().resume_or_load(resume=resume)
        except CheckpointMismatchError as err:
            changes = config_changes(self.checkpointer.facts.get("config"), self.cfg) if resuming else ""
            if not changes:
                raise
            raise CheckpointMismatchError(f"{err}\nChanged since it was written: {changes}.") from err
        self.stream.start_iteration = self.start_iter
        if resuming and comm.is_main_process():
            changes = config_changes(self.checkpointer.facts.get("config"), self.cfg)
            if changes:
                logger.warning(
                    "Resuming with other settings than before (learning rates stay those of the checkpoint): %s.",
                    changes,
                )
            tell_of_other_classes(self.checkpointer.facts, self.cfg, self.cfg.DATASETS.TRAIN)

    def load_state_dict(self, state_dict: Any) -> None:
        """Detectron2's, after a look at whether the optimiser's part fits."""
        saved = state_dict.get("_trainer", {}).get("optimizer")
        if saved:
            require_fitting_optimizer(saved, self.optimizer, self.checkpointer.loading_from)
        super().load_state_dict(state_dict)

    def train(self) -> dict[str, Any] | None:
        """Run to SOLVER.MAX_ITER; the result of the last evaluation, None where TEST is empty."""
        super().train()
        return getattr(self, "_last_eval_results", None)

    def record_last_evaluation(self, results: dict[str, Any]) -> None:
        """What the end of a training does with its evaluation, for one that was complete but interrupted in that.

        Nothing to do where metrics.json has it.
        """
        numbers = flatten_results_dict(results or {})
        path = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
        if not numbers or not comm.is_main_process() or _has_evaluation(path, self.start_iter, numbers):
            return
        self.iter = self.start_iter
        with EventStorage(self.iter) as self.storage:
            self.storage.put_scalars(**numbers, smoothing_hint=False)
            for hook in self._hooks:
                if isinstance(hook, KeepBestCheckpoint | PeriodicWriter):
                    hook.before_train()
                    hook.after_train()

    def run_step(self) -> None:
        """One iteration. Where a GPU has too little memory for it, the log says what would need less."""
        try:
            super().run_step()
        except torch.cuda.OutOfMemoryError:
            logger.error(
                "Iteration %d needs more GPU memory than there is. It takes less with\n%s",
                self.iter,
                less_memory(self.cfg),
            )
            raise
        except Exception:
            if self.stream.failed:
                self._save_before_this_step()
            raise

    def _save_before_this_step(self) -> None:
        """For an error before anything has changed: what was trained is not lost with it.

        In whichever process: all have the same weights, and the others wait in the step for this one.
        """
        done = self.iter - 1
        if done < self.start_iter:
            return
        writes, self.checkpointer.save_to_disk = self.checkpointer.save_to_disk, True
        try:
            with by_the_way(f"What was trained up to iteration {done} is not saved"):
                save_after(self.checkpointer, self, done, f"model_{done:07d}")
                logger.error("The data failed; saved after iteration %d, --resume goes on from there.", done)
        finally:
            self.checkpointer.save_to_disk = writes

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's between ours: draws first, leaving on a signal before evaluations, TEST.AUG before writing."""
        hooks = super().build_hooks()
        evaluated: list[HookBase] = []
        if self.cfg.TEST.AUG.ENABLED:
            evaluated.append(EvalHook(0, self._test_with_augmentation))
        if self.cfg.SOLVER.BEST_CHECKPOINT:
            evaluated.append(KeepBestCheckpoint(self.checkpointer, self.cfg.SOLVER.BEST_CHECKPOINT))
        writers = [i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicWriter)]
        place = writers[0] if writers else len(hooks)
        hooks[place:place] = evaluated
        if self.cfg.SOLVER.CHECKPOINTS_KEPT:
            hooks.append(KeepNewestCheckpoints(self.cfg.OUTPUT_DIR, self.cfg.SOLVER.CHECKPOINTS_KEPT))
        hooks = [SavesWhenItCan(hook) if isinstance(hook, PeriodicCheckpointer) else hook for hook in hooks]
        leaving = SaveAndLeaveOnSignal()
        first = next((i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook)), len(hooks))
        later = [leaving.saving_during(one) if isinstance(one, EvalHook) else one for one in hooks[first:]]
        report = CacheReport(lambda: self.feature_cache)
        return [SeedEachIteration(self.cfg.SEED), report, *hooks[:first], leaving, *later]

    def build_writers(self) -> list[EventWriter]:
        """Terminal, ``metrics.json`` and TensorBoard."""
        folder = self.cfg.OUTPUT_DIR
        os.makedirs(folder, exist_ok=True)
        metrics = os.path.join(folder, "metrics.json")
        drop_half_line(metrics)
        return [
            ProgressPrinter(self.max_iter, self.cfg.SOLVER.IMS_PER_BATCH),
            WritesWhenItCan(JSONWriter(metrics)),
            WritesWhenItCan(TensorboardXWriter(folder)),
        ]

    @classmethod
    def check_testing(cls, cfg: CfgNode, model: nn.Module) -> None:
        """Settings of the evaluation, before a training that would end with their error.

        Raises:
            ValueError: names the key, or the dataset that COCO's protocol has no class names of.
        """
        build_augmentations(cfg, is_train=False)
        if getattr(cls.build_evaluator, "__func__", None) is FrozenTrainer.build_evaluator.__func__:  # type: ignore[attr-defined]
            for name in cfg.DATASETS.TEST:
                if class_names(name) is None:
                    raise ValueError(
                        f"dataset {name} of DATASETS.TEST does not name its classes, which its evaluation needs. Give "
                        f'them: MetadataCatalog.get("{name}").thing_classes = [...]; or set DATASETS.TEST to ().'
                    )
        if cfg.TEST.AUG.ENABLED:
            FrozenRCNNWithTTA(cfg, model)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with TEST.AUG; keys are those of ``test`` with the suffix ``_TTA``, files in ``inference_TTA``.

        Named as in Detectron2's projects.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, output_folder=folder) for name in cfg.DATASETS.TEST]
        return evaluate_with_tta(cfg, model, evaluators)

    def _test_with_augmentation(self) -> dict[str, Any]:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results = {**(getattr(self, "_last_eval_results", None) or {}), **results}
        return results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> Any:
        """Detectron2's, with start values that are a function of SEED alone, whoever drew before, in every process.

        Detectron2 seeds each process with SEED + rank (in default_setup, which a notebook leaves out), and DDP hands on
        rank 0's values of what it knows. A frozen part it does not know: without pretrained weights it would be another
        one in each process, and in each session that goes on with a run.
        """
        if cfg.SEED < 0 and comm.get_world_size() == 1:
            model = super().build_model(cfg)
        else:
            seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
            with start_values(seed):
                model = super().build_model(cfg)
        if cfg.MODEL.USE_ACT_CHECKPOINT:
            use_act_checkpoint(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`d2_frozen.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """See :func:`d2_frozen.engine.optimizer.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iteration: int = 0) -> Iterable[list[dict[str, Any]]]:
        """Batches from iteration ``start_iteration`` on.

        To override it for a mapper of your own, keep ``start_iteration`` and give both to
        :func:`d2_frozen.data.build_train_loader`; Detectron2's ``(cls, cfg)`` works too, but a resumed run then begins
        its data anew.
        """
        return build_train_loader(cfg, start_iteration=start_iteration)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """One image per batch, in dataset order."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """COCO's protocol; results go to ``OUTPUT_DIR/inference``, of several test sets to a folder in it each."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(set(cfg.DATASETS.TEST)) > 1:
            folder = os.path.join(folder, file_name_of(dataset_name))
        found = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        keypoints: dict[str, Any] = {}
        if cfg.MODEL.KEYPOINT_ON:  # an installed Detectron2 has heads for them
            found, keypoints = (*found, "keypoints"), {"kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS}
        return COCOEvaluator(dataset_name, tasks=found, distributed=True, output_dir=folder, **keypoints)


def _has_evaluation(path: str, iteration: int, numbers: dict[str, Any]) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            last = json.loads(list(file)[-1])
    except (OSError, IndexError, ValueError):
        return False
    return last.get("iteration") == iteration and not numbers.keys().isdisjoint(last)


def facts_for_prediction(cfg: CfgNode) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, so that the file alone predicts: config, and classes where known."""
    try:
        classes = tasks.task_of(cfg).classes(cfg)
    except (
        OSError,
        KeyError,
        ValueError,
    ) as err:  # the data went away; the weights must be saved nevertheless
        logger.warning("Class names are not in the checkpoint: %s: %s", type(err).__name__, err)
        classes = None
    named = {} if classes is None else {"classes": classes.names, "class_ids": classes.ids}
    return {"config": cfg.dump(), **named}


def require_equal_frozen_parts(model: nn.Module) -> None:
    """All processes call this; nothing happens in a single one.

    Raises:
        RuntimeError: a frozen part has other weights in another process, e.g. from another file of the same name.
    """
    if comm.get_world_size() == 1:
        return
    own = {prefix: part.fingerprint() for prefix, part in frozen_parts(model).items()}
    for rank, other in enumerate(comm.all_gather(own)):
        for prefix, fact in own.items():
            if fact != other.get(prefix):
                raise RuntimeError(
                    f"the frozen weights at '{prefix}' differ between processes: {fact} in this one (rank "
                    f"{comm.get_rank()}), {other.get(prefix)} in rank {rank}. Give every machine the same file in "
                    "MODEL.TIMM.PRETRAINED and MODEL.WEIGHTS."
                )


class ResumableStream:
    """What the training loop iterates over; built when first iterated, from the iteration it then starts at.

    Attributes:
        build: start iteration -> batches from there on.
        bring: these batches -> the same ones where the model is; it may take one ahead of its turn.
        start_iteration: where it begins.
        failed: it has raised, so that nothing of this iteration has happened.
    """

    def __init__(
        self,
        build: Callable[[int], Iterable[Any]],
        bring: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        self.build = build
        self.bring = bring
        self.start_iteration = 0
        self.failed = False

    def __iter__(self) -> Iterator[Any]:
        return self._watched(iter(self.bring(self.build(self.start_iteration))))

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except Exception:
            self.failed = True
            raise


class _CPUAutocastTrainer(SimpleTrainer):
    """One step in bfloat16 autocast on CPU; no loss scaling is needed there. Detectron2's AMPTrainer wants CUDA."""

    def run_step(self) -> None:
        forward = self.model.forward

        def in_bfloat16(batch: Any) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return forward(batch)

        self.model.forward = in_bfloat16  # type: ignore[method-assign]
        try:
            super().run_step()
        finally:
            del self.model.forward  # the class's own again


def loop_kind(cfg: CfgNode) -> type[SimpleTrainer]:
    """What runs a training step: by SOLVER.AMP and MODEL.DEVICE."""
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer
    # Not by the first parameter: with FROZEN.PRECISION below fp32 the frozen originals stay in the computer's memory.
    return AMPTrainer if torch.device(cfg.MODEL.DEVICE).type == "cuda" else _CPUAutocastTrainer
