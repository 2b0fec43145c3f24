"""The usual setup: command line, logging and environment, writers, DefaultTrainer, DefaultPredictor.

A project that needs something else overrides one ``build_*`` method, or writes its own loop from the same
pieces.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import detectron2.data.transforms as T
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.atomic import write_atomically
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from . import hooks
from .train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase

__all__ = [
    "DefaultPredictor",
    "DefaultTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
]

# Iterations between two rows of metrics.
_WRITE_PERIOD = 20


def create_ddp_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any) -> nn.Module:
    """``model`` in DistributedDataParallel when there are several processes, else as it is.

    Args:
        fp16_compression: exchange gradients in float16.
        kwargs: go to DistributedDataParallel; ``device_ids`` defaults to this process's GPU.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = any(p.is_cuda for p in model.parameters())
    kwargs.setdefault("device_ids", [comm.get_local_rank()] if on_gpu else None)
    parallel = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        parallel.register_comm_hook(state=None, hook=fp16_compress_hook)
    return parallel


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's flags.

    Args:
        epilog: text after the flags; by default examples of how to run it.
    """
    script = sys.argv[0]
    examples = f"""
Examples:

One machine:
    $ {script} --num-gpus 8 --config-file cfg.yaml

Settings after the flags win over the file:
    $ {script} --config-file cfg.yaml MODEL.WEIGHTS /path/to/weights.pth SOLVER.BASE_LR 0.001

Two machines:
    (machine 0)$ {script} --machine-rank 0 --num-machines 2 --dist-url tcp://HOST:PORT [flags]
    (machine 1)$ {script} --machine-rank 1 --num-machines 2 --dist-url tcp://HOST:PORT [flags]
"""
    parser = argparse.ArgumentParser(
        epilog=epilog or examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="yaml file of the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    launching = parser.add_argument_group("processes")
    launching.add_argument(
        "--num-gpus", type=int, default=1, help="GPUs per machine (processes, without GPUs)"
    )
    launching.add_argument("--num-machines", type=int, default=1, help="number of machines")
    launching.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    launching.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{_port_of_user()}",
        help="where the processes meet; 'auto' takes a free port (one machine); see torch.distributed",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        default=None,
        help="settings as KEY VALUE pairs, after all flags",
    )
    return parser


def _port_of_user() -> int:
    # One port per user (in the dynamic range, 49152 on), so that two users of a machine do not meet by
    # accident.
    user = os.getuid() if hasattr(os, "getuid") else 1
    return 2**15 + 2**14 + hash(user) % 2**14


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What every run does first: loggers, a record of environment, command line and config, seeds.

    Writes ``log.txt`` (per process) and ``config.yaml``, the complete config, into ``cfg.OUTPUT_DIR``.

    Args:
        cfg: complete; frozen or not.
        args: from :func:`default_argument_parser`; ``config_file`` and ``eval_only`` are looked at, if
            present.
    """
    output_dir = cfg.OUTPUT_DIR
    rank = comm.get_rank()
    if comm.is_main_process() and output_dir:
        PathManager.mkdirs(output_dir)
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    log = setup_logger(output_dir, distributed_rank=rank)
    log.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    log.info("Environment info:\n%s", collect_env_info())
    log.info("Command line arguments: %s", args)
    _set_float32_precision(cfg.FLOAT32_PRECISION)
    config_file = getattr(args, "config_file", "")
    if config_file:
        with PathManager.open(config_file, "rb") as handle:
            text = handle.read().decode(errors="replace")
        log.info("Contents of args.config_file=%s:\n%s", config_file, text)
    if comm.is_main_process() and output_dir:
        path = os.path.join(output_dir, "config.yaml")
        text = cfg.dump()
        log.info("Running with full config:\n%s", text)
        if "://" in path:
            with PathManager.open(path, "w") as handle:
                handle.write(text)
        else:
            write_atomically(path, lambda stream: stream.write(text.encode()))
        log.info("Full config saved to %s", path)
    seed_all_rng(cfg.SEED + rank if cfg.SEED >= 0 else None)
    # Searching for the fastest convolutions pays only when the same sizes come often; in evaluation they do
    # not.
    if not getattr(args, "eval_only", False):
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _set_float32_precision(wanted: str) -> None:
    """Of products and convolutions on GPUs; a CPU's stay what they are."""
    if wanted not in ("", "highest", "high", "medium"):
        raise ValueError(
            f"FLOAT32_PRECISION is {wanted!r}; choose highest, high or medium, or '' to leave it."
        )
    if wanted and torch.cuda.is_available():
        torch.set_float32_matmul_precision(wanted)
        torch.backends.cudnn.allow_tf32 = wanted != "highest"
        logging.getLogger(__name__).info("Products and convolutions of float32: %s precision.", wanted)


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """The terminal, ``metrics.json`` and TensorBoard events in ``output_dir``.

    Args:
        max_iter: length of the run, for the ETA.
    """
    PathManager.mkdirs(output_dir)
    rows = JSONWriter(os.path.join(output_dir, "metrics.json"))
    return [CommonMetricPrinter(max_iter), rows, TensorboardXWriter(output_dir)]


class DefaultPredictor:
    """A trained model for single images: loads ``cfg.MODEL.WEIGHTS``, resizes by ``cfg.INPUT``, runs on
    ``cfg.MODEL.DEVICE``.

    Attributes:
        metadata: of the first dataset in ``cfg.DATASETS.TEST``, if any; for drawing the predictions.

    Example:
        predictor = DefaultPredictor(cfg)
        instances = predictor(cv2.imread("street.jpg"))["instances"]
    """

    def __init__(self, cfg: CfgNode) -> None:
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; DefaultPredictor takes RGB or BGR models."
            )
        self.cfg = cfg.clone()
        datasets = list(self.cfg.DATASETS.TEST)
        if datasets:
            self.metadata = MetadataCatalog.get(datasets[0])
        self.model = build_model(self.cfg).eval()
        DetectionCheckpointer(self.model).load(self.cfg.MODEL.WEIGHTS)
        shortest = cfg.INPUT.MIN_SIZE_TEST
        self.aug = T.ResizeShortestEdge([shortest, shortest], cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """Predict one image.

        Args:
            original_image: (H, W, 3) uint8 in **BGR** order, as OpenCV reads it, whatever INPUT.FORMAT is.
        Returns:
            The model's output for this image, boxes and masks in its original size.
        """
        if original_image is None or original_image.ndim != 3 or original_image.shape[2] != 3:
            seen = None if original_image is None else original_image.shape
            raise ValueError(
                f"DefaultPredictor takes an (H, W, 3) BGR image, got {seen}. Could the file be read?"
            )
        height, width = original_image.shape[:2]
        image = original_image if self.input_format == "BGR" else original_image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1), dtype=np.float32))
        inputs = {"image": pixels.to(self.cfg.MODEL.DEVICE), "height": height, "width": width}
        return self.model([inputs])[0]


class DefaultTrainer(TrainerBase):
    """Training of a detector by config: build all parts, resume or load, train with hooks, evaluate.

    Example:
        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()

    Override ``build_evaluator`` (there is none by default), or any other ``build_*``.

    Attributes:
        checkpointer: saves and loads model, optimizer, scheduler and iteration together.
        scheduler, cfg: as built, as given.
        model, data_loader, optimizer: of the inner loop ``_trainer`` (Simple- or AMPTrainer).
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # nobody has called default_setup
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        loop = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer: SimpleTrainer = loop(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    # The parts that the loop owns.
    model = property(lambda self: self._trainer.model, lambda self, new: setattr(self._trainer, "model", new))
    data_loader = property(
        lambda self: self._trainer.data_loader, lambda self, new: setattr(self._trainer, "data_loader", new)
    )
    optimizer = property(
        lambda self: self._trainer.optimizer, lambda self, new: setattr(self._trainer, "optimizer", new)
    )

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue after the last checkpoint of ``cfg.OUTPUT_DIR`` if ``resume`` and there is one; else load
        ``cfg.MODEL.WEIGHTS`` into the model and start at 0.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            # The checkpoint holds the iteration that was finished.
            self.start_iter = self.iter + 1

    def register_hooks(self, hooks: Sequence[HookBase | None]) -> None:
        super().register_hooks(hooks)
        # The inner loop announces the backward pass; the hooks are registered here.
        loop = getattr(self, "_trainer", None)
        if loop is not None and not any(isinstance(hook, _Relay) for hook in loop._hooks):
            loop.register_hooks([_Relay(self)])

    def build_hooks(self) -> list[HookBase | None]:
        """In this order: timing, learning rate, precise BN (if set), checkpoints, evaluation, writers.

        Checkpoints come before the evaluation, which may fail; writers last, so that they see all results.
        """
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # precise BN has its own loader, and that is used seldom
        with_precise_bn = cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)
        chosen: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if with_precise_bn:
            loader, batches = self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER
            chosen.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, batches))
        if comm.is_main_process():
            chosen.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        trainer = weakref.proxy(self)

        def evaluate() -> Mapping[str, Any]:
            trainer._last_eval_results = trainer.test(trainer.cfg, trainer.model)
            return trainer._last_eval_results

        chosen.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
        if comm.is_main_process():
            chosen.append(hooks.PeriodicWriter(self.build_writers(), period=_WRITE_PERIOD))
        return chosen

    def build_writers(self) -> list[EventWriter]:
        """:func:`default_writers` of OUTPUT_DIR."""
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """Run the remaining iterations.

        Returns:
            The last evaluation's results; None if there was none. With TEST.EXPECTED_RESULTS they are
            verified.
        """
        super().train(self.start_iter, self.max_iter)
        results = getattr(self, "_last_eval_results", None)
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            if not results:
                raise RuntimeError(
                    "TEST.EXPECTED_RESULTS is set, but nothing was evaluated: is DATASETS.TEST empty?"
                )
            verify_results(self.cfg, results)
        return results

    def after_train(self) -> None:
        wait = getattr(self._trainer, "wait_for_metrics", None)
        if wait is not None:
            wait()
        super().after_train()

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """``detectron2.modeling.build_model``; logs the model."""
        model = build_model(cfg)
        logging.getLogger(__name__).info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """``detectron2.solver.build_optimizer``."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """``detectron2.solver.build_lr_scheduler``."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """``detectron2.data.build_detection_train_loader``."""
        return build_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        """``detectron2.data.build_detection_test_loader``."""
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str
    ) -> DatasetEvaluator | Sequence[DatasetEvaluator]:
        """For subclasses: the evaluator of one dataset.

        Raises:
            NotImplementedError: always, here; ``test`` then skips the dataset with a warning.
        """
        raise NotImplementedError(
            f"{cls.__name__} has no build_evaluator: define it, e.g. "
            "`return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)`, or give `evaluators` to test()."
        )

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> Mapping[str, Any]:
        """Evaluate on each dataset of ``cfg.DATASETS.TEST``.

        Args:
            evaluators: one per dataset; by default ``build_evaluator``'s.
        Returns:
            {task: metrics} with one dataset, {dataset name: {task: metrics}} with several.
        """
        names = list(cfg.DATASETS.TEST)
        given = [evaluators] if isinstance(evaluators, DatasetEvaluator) else evaluators
        if given is not None and len(given) != len(names):
            raise ValueError(
                f"{len(given)} evaluators for the {len(names)} datasets of DATASETS.TEST: {names}"
            )
        results: OrderedDict[str, Any] = OrderedDict()
        for position, name in enumerate(names):
            loader = cls.build_test_loader(cfg, name)
            evaluator = cls._evaluator(cfg, name) if given is None else given[position]
            results[name] = {} if evaluator is None else cls._test_one(name, model, loader, evaluator)
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def _evaluator(cls, cfg: CfgNode, name: str) -> DatasetEvaluator | Sequence[DatasetEvaluator] | None:
        try:
            return cls.build_evaluator(cfg, name)
        except NotImplementedError as err:
            logging.getLogger(__name__).warning("%s is not evaluated. %s", name, err)
            return None

    @staticmethod
    def _test_one(name: str, model: nn.Module, loader: Iterable[Any], evaluator: Any) -> Mapping[str, Any]:
        results = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            logging.getLogger(__name__).info("Evaluation results for %s in csv format:", name)
            print_csv_format(results)
        return results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """The config for another number of processes, by the linear scaling rule.

        Does nothing if ``SOLVER.REFERENCE_WORLD_SIZE`` is 0 or equals ``num_workers``. Otherwise, with r the
        ratio of the two, batch size and learning rate are multiplied by r, and iterations, steps, warm-up,
        evaluation and checkpoint periods divided by it, so that a run sees the same number of images.
        Goyal et al., arXiv:1706.02677, section 2.1.

        Args:
            num_workers: processes of this run.
        Returns:
            A frozen copy if ``cfg`` is frozen, with the reference set to ``num_workers``; or ``cfg`` itself.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference in (0, num_workers):
            return cfg
        if cfg.SOLVER.IMS_PER_BATCH % reference:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a multiple of "
                f"SOLVER.REFERENCE_WORLD_SIZE ({reference})."
            )
        ratio = num_workers / reference
        frozen = cfg.is_frozen()
        cfg = cfg.clone()
        cfg.defrost()
        solver, test = cfg.SOLVER, cfg.TEST
        solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * ratio)
        solver.BASE_LR = solver.BASE_LR * ratio
        for node, key in (
            (solver, "MAX_ITER"),
            (solver, "WARMUP_ITERS"),
            (solver, "CHECKPOINT_PERIOD"),
            (test, "EVAL_PERIOD"),
        ):
            node[key] = round(node[key] / ratio)
        solver.STEPS = tuple(round(step / ratio) for step in solver.STEPS)
        solver.REFERENCE_WORLD_SIZE = num_workers
        logging.getLogger(__name__).info(
            "Config scaled from %d to %d processes: batch %d, learning rate %g, %d iterations, warm-up %d.",
            reference,
            num_workers,
            solver.IMS_PER_BATCH,
            solver.BASE_LR,
            solver.MAX_ITER,
            solver.WARMUP_ITERS,
        )
        if frozen:
            cfg.freeze()
        return cfg


class _Relay(HookBase):
    """Tells the outer trainer's hooks about the inner loop's backward pass."""

    def __init__(self, outer: DefaultTrainer) -> None:
        self._outer = weakref.proxy(outer)

    def after_backward(self) -> None:
        self._outer.after_backward()
