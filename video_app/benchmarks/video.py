"""Video: how fast are clips read, seen by the frozen backbone and learned from, and what does all of it give?

    python -m d2_frozen.bench video [--config-file FILE] [--opens 1000] [--json FILE] [KEY VALUE ...]

In clips per second, medians of rounds:
- decode + sample, by each installed reader, and how much its process grows over --opens files;
- the backbone's forward pass of a training batch, and a step of the head on maps that are there already;
- with 1 and 2 loader workers: the loader alone, the step alone, and the whole loop, as ``bench loader`` has them.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from d2_frozen import tasks
from d2_frozen.benchmarks import loader
from d2_frozen.benchmarks.arguments import parse_with_lists
from d2_frozen.benchmarks.measuring import Clock, Seconds, alternate, machine_facts, write_json
from d2_frozen.benchmarks.timed_step import MixedPrecision
from d2_frozen.data import training_records
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.train_net import read_config
from detectron2.config import CfgNode
from video_app.benchmarks.reading import memory_growth_mib, reading_task
from video_app.clips.mapper import ClipMapper
from video_app.clips.reader import installed_readers
from video_app.trainer import VideoTrainer

DEFAULT_CONFIG = "configs/quickstart/video.yaml"


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    args = parse_with_lists(_parser(), arguments, workers=int)
    with tempfile.TemporaryDirectory() as folder:
        cfg = _config(args.config_file, args.opts, folder)
        if cfg.MODEL.DEVICE == "cpu":
            keep_freed_memory()  # as train_net.py does
        result: dict[str, Any] = {
            "machine": machine_facts(),
            "config": args.config_file,
            "options": args.opts,
            "clip": f"{cfg.VIDEO.NUM_FRAMES} frames of {cfg.VIDEO.CROP_SIZE} px, "
            f"{cfg.SOLVER.IMS_PER_BATCH} clips a batch",
            "reading": compare_readers(cfg, args.clips, args.rounds, args.warmup, args.opens),
            "model": measure_model(cfg, args.rounds, args.warmup),
            "loop": loader.compare(cfg, args.workers, args.batches, args.rounds, args.warmup)["loops"],
        }
    print(report(result))
    write_json(result, args.json)
    return result


def compare_readers(
    cfg: CfgNode, clips: int, rounds: int, warmup: int, opens: int
) -> dict[str, dict[str, float]]:
    """{reader: {"clips/s", "MiB"}}: speed, and growth over ``opens`` files.

    Args:
        clips: files per round, the first of the training set.
    """
    records = training_records(cfg)[:clips]
    cfg = cfg.clone()
    cfg.VIDEO.RECYCLE_AFTER = 10**9
    mappers = {reader: ClipMapper.from_config(cfg, is_train=True) for reader in installed_readers()}
    try:
        runs = {reader: reading_task(mapper, records, reader) for reader, mapper in mappers.items()}
        seconds = alternate(runs, rounds, warmup)
        return {
            reader: {
                "clips/s": 1 / seconds[reader]["clip"],
                "MiB": _growth(mapper, records, opens),
                "opens": opens,
            }
            for reader, mapper in mappers.items()
        }
    finally:
        for mapper in mappers.values():
            mapper.decoder.close()


def _growth(mapper: ClipMapper, records: list[dict[str, Any]], opens: int) -> float:
    return memory_growth_mib(mapper.decoder, lambda count: mapper(records[count % len(records)]), opens)


def measure_model(cfg: CfgNode, rounds: int, warmup: int) -> dict[str, float]:
    """{part: clips per second} of the backbone's forward pass, of a step of the head, and of both."""
    step = _Step(cfg)
    batch = _first_batch(cfg)
    seconds = alternate({"step": lambda: step.parts(batch)}, rounds, warmup)["step"]
    return {part: len(batch) / value for part, value in seconds.items()}


class _Step:
    """A model with its optimiser; runs training steps part by part."""

    def __init__(self, cfg: CfgNode) -> None:
        torch.manual_seed(cfg.SEED)
        self.model = VideoTrainer.build_model(cfg).train()
        self.optimizer = VideoTrainer.build_optimizer(cfg, self.model)
        self.precision = MixedPrecision(cfg.SOLVER.AMP.ENABLED, self.model.device.type)

    def parts(self, batch: list[dict[str, Any]]) -> Seconds:
        now = Clock()
        start = now()
        with torch.no_grad(), self.precision.forward():
            maps, labels = self.model.training_batch(batch)
        seen = now()
        with self.precision.forward():
            loss = F.cross_entropy(self.model.head(maps), labels)
        self.optimizer.zero_grad()
        self.precision.backward_and_update(loss, self.optimizer)
        end = now()
        return {"frozen forward": seen - start, "head step": end - seen, "both": end - start}


def report(result: dict[str, Any]) -> str:
    """The result as tables a person reads."""
    facts = "  ".join(f"{name}: {value}" for name, value in result["machine"].items())
    blocks = [f"{result['config']}  {' '.join(result['options'])}\n{facts}\n{result['clip']}"]
    rows = [
        [reader, f"{found['clips/s']:.2f}", f"{found['MiB']:+.1f}", str(found["opens"])]
        for reader, found in result["reading"].items()
    ]
    blocks.append(_table(rows, ["decode + sample", "clips/s", "growth, MiB", "over files"]))
    rows = [[part, f"{value:.2f}"] for part, value in result["model"].items()]
    blocks.append(_table(rows, ["training batch", "clips/s"]))
    blocks.append(loader.table(result["loop"], "clips"))
    return "\n\n".join(blocks)


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers=headers, disable_numparse=True)


def _first_batch(cfg: CfgNode) -> list[dict[str, Any]]:
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    return next(iter(VideoTrainer.build_train_loader(cfg)))


def _config(config_file: str, options: list[str], folder: str) -> CfgNode:
    """
    Args:
        folder: an empty one, for what preparing the data writes.
    Raises:
        SystemExit: a config of another task, or one that trains its backbone.
    """
    cfg = read_config(config_file, options)
    task = tasks.task_of(cfg)
    if task.name != "action recognition":
        raise SystemExit(f"python -m d2_frozen.bench video: {config_file} is a config of {task.name}.")
    if cfg.MODEL.BACKBONE.FREEZE != "all":
        raise SystemExit(
            "python -m d2_frozen.bench video measures a frozen backbone: MODEL.BACKBONE.FREEZE all."
        )
    # Of a sweep, one head, that of MODEL.VIDEO_HEAD.NAME; and without the cache, which is there to leave out what is
    # measured here.
    cfg.MODEL.META_ARCHITECTURE = "FrozenVideoClassifier"
    cfg.MODEL.FROZEN.CACHE.DIR, cfg.MODEL.FROZEN.CACHE.VIEWS = "", 0
    cfg.SEED = max(cfg.SEED, 0)
    cfg.OUTPUT_DIR = folder
    task.prepare_datasets(cfg, train=True)
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench video",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", default=DEFAULT_CONFIG, help="its training data is read (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each")
    parser.add_argument("--warmup", type=int, default=1, help="runs of each before measuring")
    parser.add_argument("--clips", type=int, default=20, help="files that each reader reads in a round")
    parser.add_argument("--opens", type=int, default=200, help="files over which memory may grow")
    parser.add_argument("--batches", type=int, default=8, help="of the loop, in a round")
    parser.add_argument("--workers", nargs="+", default=[1, 2], help="of the loader")
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser
