"""What does the feature cache save? Training steps from stored features against live ones, and bytes per sample.

    python -m d2_frozen.bench cache --config-file configs/quickstart/detection.yaml --cpu-time [KEY VALUE ...]

Both do the same work on the same draws: live reads images and runs the backbone on the batch; cached maps features into
memory. Samples are made in the same process (DATALOADER.NUM_WORKERS 0), so that all of their time is counted. Features
were written just before, so they come from the system's page cache rather than from the disk.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from d2_frozen import tasks
from d2_frozen.benchmarks.measuring import (
    Clock,
    Seconds,
    add_measuring_flags,
    alternate,
    machine_facts,
    phase_table,
    with_ratio,
    write_json,
)
from d2_frozen.benchmarks.timed_step import PHASES, MixedPrecision, Watch, timed_step
from d2_frozen.caching import SLOT
from d2_frozen.caching.store import gib
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.engine.caching import compute_features, frozen_backbone_of, serve_features
from d2_frozen.train_net import read_config
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

DEFAULT_CONFIG = "configs/quickstart/detection.yaml"


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    args = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args.config_file, args.opts, args.rounds, args.warmup, args.cpu_time, folder)
    print(report(result))
    write_json(result, args.json)
    return result


def compare(
    config_file: str, options: list[str], rounds: int, warmup: int, cpu_time: bool, folder: str
) -> dict[str, Any]:
    """Args: folder: an empty one, for the cache and for what preparing the data writes."""
    if not torch.cuda.is_available():
        keep_freed_memory()  # as train_net.py does
    now = Clock(cpu_time)
    live = _Subject(_config(config_file, options, folder, cached=False), now)
    cached = _Subject(_config(config_file, options, folder, cached=True), now)
    written = cached.fill(rounds + warmup)
    measured = alternate({"cached": cached.step, "live": live.step}, rounds, warmup)
    head = measured["live"]["step"] - measured["live"]["backbone"] - measured["live"]["data"]
    # Workers load data beside the step, so it is on neither side.
    to_head = (measured["cached"]["step"] - measured["cached"]["data"]) / head
    return {
        "machine": machine_facts(),
        "config": config_file,
        "options": options,
        "unit": "CPU seconds" if cpu_time else "seconds",
        "training step": with_ratio(measured),
        "cached step / head-only part of the live step": to_head,
        "hit rate": cached.hit_rate(),
        "bytes per sample": written,
    }


def report(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    head = f"{result['config']}  " + "  ".join(f"{key}: {value}" for key, value in result["machine"].items())
    table = phase_table(f"training step, {result['unit']}", result["training step"], list(PHASES))
    ratio = result["cached step / head-only part of the live step"]
    return (
        f"{head}\n\n{table}\n\ncached step / head-only part of the live step, without data: {ratio:.2f}\n"
        f"hit rate {result['hit rate']:.2f}, {gib(result['bytes per sample'])} per sample and view"
    )


class _Subject:
    """One model with its loader and optimiser; runs single timed steps."""

    def __init__(self, cfg: CfgNode, now: Clock) -> None:
        self.cfg, self.now = cfg, now
        self.trainer = tasks.task_of(cfg).trainer()
        seed_all_rng(cfg.SEED)
        self.model: nn.Module = self.trainer.build_model(cfg).train()
        self.optimizer = self.trainer.build_optimizer(cfg, self.model)
        self.batches: Iterator[Any] = iter(self.trainer.build_train_loader(cfg))
        self.cache: Any = None
        self.backbone = Watch(frozen_backbone_of(self.model), now)
        self.precision = MixedPrecision(cfg.SOLVER.AMP.ENABLED, torch.device(cfg.MODEL.DEVICE).type)

    def fill(self, batches: int) -> int:
        """Put the features of the first batches into the cache, and train from it; bytes per sample."""
        loader = self.trainer.build_train_loader(self.cfg)
        service = serve_features(self.cfg, self.model, loader)
        assert service is not None and service.cache is not None
        cache = service.cache
        for batch in itertools.islice(loader, batches):
            for sample in batch:
                if sample[SLOT].place is None:
                    compute_features(service, sample)
        cache.close()
        loader = self.trainer.build_train_loader(self.cfg)
        service = serve_features(self.cfg, self.model, loader)
        assert service is not None
        self.cache = service.cache
        self.batches = iter(loader)
        return cache.statistics.written_bytes // max(1, cache.statistics.written)

    def hit_rate(self) -> float:
        return self.cache.statistics.hit_rate()

    def step(self) -> Seconds:
        """Seconds of one step by phase."""
        return timed_step(
            self.model, self.optimizer, lambda: next(self.batches), self.backbone, self.now, self.precision
        )


def _config(config_file: str, options: list[str], folder: str, cached: bool) -> CfgNode:
    cfg = read_config(config_file, options)
    cfg.MODEL.FROZEN.CACHE.VIEWS = max(1, cfg.MODEL.FROZEN.CACHE.VIEWS)
    cfg.MODEL.FROZEN.CACHE.DIR = f"{folder}/cache" if cached else ""
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = max(cfg.SEED, 0)
    cfg.OUTPUT_DIR = folder
    tasks.task_of(cfg).prepare_datasets(cfg, train=True)
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default=DEFAULT_CONFIG, help=f"default: {DEFAULT_CONFIG}")
    add_measuring_flags(parser, "steps", rounds=10, warmup=2)
    return parser
