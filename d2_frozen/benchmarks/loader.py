"""Does the data path keep up? The loader alone, the training step alone, and both together, by number of workers.

    python -m d2_frozen.bench loader --config-file FILE [--workers 1 2] [--batches 8] [--json FILE] [KEY VALUE ...]

Images (of video: clips) per second. ``loader alone`` gives batches, on the device of the model, to nobody; ``step
alone`` is the training step, optimiser included, on one batch that stays on the device; ``whole loop`` is both, as
training has it. whole / min(loader, step) is 1 where the slower one of the two is all that one waits for. On a GPU
there is also the whole loop ``without prefetch``: batches that are neither pinned nor copied ahead.

For a config of any task; the data of its training is read, without the feature cache. Learning rates are 0, so that all
steps do the same work.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate

from d2_frozen import tasks
from d2_frozen.benchmarks.arguments import parse_with_lists
from d2_frozen.benchmarks.measuring import Clock, Seconds, alternate, machine_facts, write_json
from d2_frozen.data.device import on_device
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.engine.trainer import loop_kind
from d2_frozen.train_net import read_config
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

DEFAULT_CONFIG = "configs/quickstart/detection.yaml"
# Batches that torch's loader prepares ahead for each worker, and what is on its way to the device.
_AHEAD, _ON_THE_WAY = 2, 1
# Steps until loading and training have found their pace.
_LEAD = 2
LOADER, STEP, WHOLE, PLAIN = "loader alone", "step alone", "whole loop", "without prefetch"
RATIO = "whole / min"

Batches = Iterator[list[dict[str, Any]]]


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    args = parse_with_lists(_parser(), arguments, workers=int)
    if not torch.cuda.is_available():
        keep_freed_memory()  # as train_net.py does
    with tempfile.TemporaryDirectory() as folder:
        cfg = _config(args.config_file, args.opts, folder)
        result = compare(cfg, args.workers, args.batches, args.rounds, args.warmup)
    result = {"machine": machine_facts(), "config": args.config_file, "options": args.opts, **result}
    print(report(result))
    write_json(result, args.json)
    return result


def compare(cfg: CfgNode, workers: list[int], batches: int, rounds: int, warmup: int) -> dict[str, Any]:
    """Samples per second by number of workers.

    Args:
        batches: measured in a round, at least; as many for each worker.
    """
    seed_all_rng(cfg.SEED)
    step = _Step(cfg)
    fixed = next(_batches(cfg, 0, prefetch=True))
    return {
        "unit": "clips" if "video" in fixed[0] else "images",
        "batch": len(fixed),
        "input": " x ".join(str(n) for n in fixed[0]["video" if "video" in fixed[0] else "image"].shape),
        "loops": {
            str(count): _measure(cfg, step, fixed, count, batches, rounds, warmup) for count in workers
        },
    }


def report(result: dict[str, Any]) -> str:
    """The result as a table a person reads."""
    facts = "  ".join(f"{name}: {value}" for name, value in result["machine"].items())
    head = f"{result['config']}  {' '.join(result['options'])}\n{facts}\n"
    head += f"{result['batch']} {result['unit']} a step, the first of {result['input']}\n\n"
    return head + table(result["loops"], result["unit"])


def table(loops: dict[str, dict[str, float]], unit: str) -> str:
    """Of what ``compare`` found: a row for each number of workers."""
    columns = list(next(iter(loops.values())))
    rows = [[workers, *(f"{found[name]:.2f}" for name in columns)] for workers, found in loops.items()]
    return tabulate(rows, headers=[f"workers ({unit}/s)", *columns], disable_numparse=True)


def _measure(
    cfg: CfgNode, step: _Step, fixed: list[Any], workers: int, batches: int, rounds: int, warmup: int
) -> dict[str, float]:
    now = Clock()
    loader = _batches(cfg, workers, prefetch=True)
    # Workers give their batches in turn.
    whole_turns = -(-batches // max(1, workers)) * max(1, workers)

    def run(source: Batches, use: Callable[[Any], None], lead: int) -> Seconds:
        count = batches if source is repeated else whole_turns
        # What was prepared while another subject ran would be free.
        for _ in range(_AHEAD * workers + _ON_THE_WAY if source is not repeated else 0):
            next(source)
        for batch in itertools.islice(source, lead):
            use(batch)
        start = now()
        for batch in itertools.islice(source, count):
            use(batch)
        return {"sample": (now() - start) / (count * len(fixed))}

    repeated = itertools.repeat(fixed)
    subjects = {
        LOADER: lambda: run(loader, lambda batch: None, 0),
        STEP: lambda: run(repeated, step, _LEAD),
        WHOLE: lambda: run(loader, step, _LEAD),
    }
    if step.on_gpu:
        plain = _batches(cfg, workers, prefetch=False)
        subjects[PLAIN] = lambda: run(plain, step, _LEAD)
    found = {name: 1 / seconds["sample"] for name, seconds in alternate(subjects, rounds, warmup).items()}
    return {**found, RATIO: found[WHOLE] / min(found[LOADER], found[STEP])}


class _Step:
    """A model with its optimiser; a call is one training step on a batch, as the trainer does it."""

    def __init__(self, cfg: CfgNode) -> None:
        trainer = tasks.task_of(cfg).trainer()
        model = trainer.build_model(cfg).train()
        optimizer = trainer.build_optimizer(cfg, model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        self._batch: Any = None
        self._loop = loop_kind(cfg)(model, _Handed(self), optimizer)

    def __call__(self, batch: list[Any]) -> None:
        self._batch = batch
        with EventStorage():
            self._loop.run_step()


class _Handed:
    """An endless loader that gives the batch which the step was called with."""

    def __init__(self, step: _Step) -> None:
        self._step = step

    def __iter__(self) -> Batches:
        while True:
            yield self._step._batch


def _batches(cfg: CfgNode, workers: int, prefetch: bool) -> Batches:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = tasks.task_of(cfg).trainer().build_train_loader(cfg)
    if prefetch:
        return iter(on_device(loader, cfg.MODEL.DEVICE))
    loader.pin_memory = False
    return iter(loader)


def _config(config_file: str, options: list[str], folder: str) -> CfgNode:
    cfg = read_config(config_file, options)
    cfg.MODEL.FROZEN.CACHE.DIR, cfg.MODEL.FROZEN.CACHE.VIEWS = "", 0
    cfg.SEED = max(cfg.SEED, 0)
    cfg.OUTPUT_DIR = folder
    tasks.task_of(cfg).prepare_datasets(cfg, train=True)
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default=DEFAULT_CONFIG, help="default: %(default)s")
    parser.add_argument("--workers", nargs="+", default=[1, 2], help="of the loader (default: 1 2)")
    parser.add_argument("--batches", type=int, default=8, help="measured in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each")
    parser.add_argument("--warmup", type=int, default=1, help="runs of each before measuring")
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser
