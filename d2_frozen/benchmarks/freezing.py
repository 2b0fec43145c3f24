"""What does freezing save? One model of a config, frozen against full fine-tuning, by phase, and peak memory."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate

from d2_frozen import tasks
from d2_frozen.benchmarks.measuring import (
    Clock,
    Seconds,
    alternate,
    machine_facts,
    memory_in_child,
    phase_table,
    with_ratio,
)
from d2_frozen.benchmarks.timed_step import PHASES, MixedPrecision, Watch, timed_step
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.engine.hooks import peak_memory_mib
from d2_frozen.train_net import read_config
from detectron2.config import CfgNode

DEFAULT_CONFIG = "configs/quickstart/detection.yaml"
_SUBJECTS = {"frozen": "all", "full": "none"}  # name -> MODEL.BACKBONE.FREEZE


def compare(
    config_file: str, options: list[str], rounds: int, warmup: int, cpu_time: bool = False
) -> dict[str, Any]:
    """Both models in one run, in turns; their memory in a process of its own each.

    Raises:
        ValueError: a model that cannot be fine-tuned, or nothing to evaluate.
    """
    _check(read_config(config_file, options))
    if not torch.cuda.is_available():
        keep_freed_memory()  # as train_net.py does
    result: dict[str, Any] = {"machine": machine_facts(), "config": config_file, "options": options}
    result["unit"] = "CPU seconds" if cpu_time else "seconds"
    now = Clock(cpu_time)
    with tempfile.TemporaryDirectory() as folder:
        subjects = {
            name: _Subject(_config(config_file, options, freeze, folder), now)
            for name, freeze in _SUBJECTS.items()
        }
        # Evaluation first: while both have the same weights they find the same objects, and do the same work.
        for title, runs in (
            ("evaluation image", {name: s.test_image for name, s in subjects.items()}),
            ("training step", {name: s.train_step for name, s in subjects.items()}),
        ):
            result[title] = with_ratio(alternate(runs, rounds, warmup))
    result["peak memory MiB"] = _memory_in_children(config_file, options)
    return result


def report(result: dict[str, Any]) -> str:
    """The result as tables a person reads."""
    blocks = [f"{result['config']}  " + "  ".join(f"{k}: {v}" for k, v in result["machine"].items())]
    for title in ("training step", "evaluation image"):
        phases = [phase for phase in PHASES if phase in result[title]["frozen"]]
        blocks.append(phase_table(f"{title}, {result['unit']}", result[title], phases))
    memory = result["peak memory MiB"]
    rows = [[name, _cell(name, value)] for name, value in memory.items()]
    blocks.append(tabulate(rows, headers=["training step", "peak memory, MiB"]))
    return "\n\n".join(blocks)


def _cell(name: str, mib: float | None) -> str:
    return "failed" if mib is None else f"{mib:.2f}" if "/" in name else f"{mib:.0f}"


def print_memory(config_file: str, options: list[str], freeze: str, steps: int) -> None:
    """Train some steps and print {"peak": MiB}; the body of the processes that measure memory."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        subject = _Subject(_config(config_file, options, freeze, folder), Clock())
        for _ in range(steps):
            subject.train_step()
    print(json.dumps({"peak": peak_memory_mib()}))


class _Subject:
    """One model with its loader and optimiser; runs single timed steps."""

    def __init__(self, cfg: CfgNode, now: Clock) -> None:
        self.now = now
        trainer = tasks.task_of(cfg).trainer()
        torch.manual_seed(cfg.SEED)
        self.model = trainer.build_model(cfg)
        self.optimizer = trainer.build_optimizer(cfg, self.model)
        self.batches = iter(trainer.build_train_loader(cfg))
        self.test_batches = _cycle(lambda: trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]))
        self.backbone = Watch(getattr(self.model.backbone, "bottom_up", self.model.backbone), now)
        self.precision = MixedPrecision(cfg.SOLVER.AMP.ENABLED, torch.device(cfg.MODEL.DEVICE).type)

    def train_step(self) -> Seconds:
        """Seconds of one step by phase."""
        self.model.train()
        return timed_step(
            self.model, self.optimizer, lambda: next(self.batches), self.backbone, self.now, self.precision
        )

    def test_image(self) -> Seconds:
        """Seconds per image at evaluation by phase."""
        self.model.eval()
        self.backbone.reset()
        start = self.now()
        batch = next(self.test_batches)
        loaded = self.now()
        with torch.no_grad():
            self.model(batch)
        end = self.now()
        return {
            "data": loaded - start,
            "backbone": self.backbone.seconds,
            "neck+heads": end - loaded - self.backbone.seconds,
            "step": end - start,
        }


def _memory_in_children(config_file: str, options: list[str]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, freeze in _SUBJECTS.items():
        command = [sys.executable, "-m", "d2_frozen.bench", "--config-file", config_file]
        found[name] = memory_in_child([*command, "--memory-of", freeze, "--rounds", "3", *options])
    if found["full"] and found["frozen"]:
        found["frozen / full"] = found["frozen"] / found["full"]
    return found


def _check(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE == "FrozenVideoSweep":
        raise ValueError(
            "a sweep trains its heads on one frozen backbone, so there is no full fine-tuning to compare with. Measure "
            "one head, behind the flags: MODEL.META_ARCHITECTURE FrozenVideoClassifier MODEL.VIDEO_HEAD.NAME "
            "GlobalVideoHead."
        )
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: there is no image to evaluate.")


def _config(config_file: str, options: list[str], freeze: str, folder: str) -> CfgNode:
    """Args: folder: for what preparing the data writes."""
    cfg = read_config(config_file, options)
    cfg.MODEL.BACKBONE.FREEZE = freeze
    cfg.SEED = max(cfg.SEED, 0)
    cfg.OUTPUT_DIR = folder
    cfg.MODEL.FROZEN.CACHE.DIR = ""  # which full fine-tuning cannot use
    tasks.task_of(cfg).prepare_datasets(cfg, train=True)
    return cfg


def _cycle(build: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield from build()
