"""What does sharing the pass save? Two heads on one backbone: one run for both, against a run of each.

    python -m d2_frozen.bench one_pass [--size 512] [--batch 1] [--rounds 5] [--cpu-time] [--json FILE] [KEY VALUE ...]

Three subjects take turns on the same generated pictures, which have the size of the input, with new (untrained) heads
and a backbone of random weights:

    together   Predictor with both heads: picture in, results out
    apart      a Predictor of each head, one after the other
    parts      the backbone alone, then each head alone on maps that are there already

together / apart is what sharing saves; together / parts is what sharing costs (1.0: nothing).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from d2_frozen.backbone import frozen_parts
from d2_frozen.benchmarks.measuring import (
    Clock,
    Seconds,
    add_measuring_flags,
    alternate,
    machine_facts,
    write_json,
)
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.prediction import Predictor, build_head
from d2_frozen.prediction.predictor import model_inputs
from d2_frozen.tasks import Classes, read_config, task_of

DEFAULT_CONFIGS = (
    "configs/coco/table2/bifpn_mask_frozen.yaml",
    "configs/ade20k/table3/encoder_6_decoder_9_frozen.yaml",
)
# Task -> the part of MODEL that has NUM_CLASSES, and how many where the data is to tell: ADE20K's; for detection one,
# as an untrained detector scores 1 / (classes + 1), and its mask head has no work where that is below the threshold.
_CLASSES = {"detection": ("ROI_HEADS", 1), "semantic segmentation": ("SEM_SEG_HEAD", 150)}


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    args = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        keep_freed_memory()
    with _errors_only():
        predictors = _predictors(args.config_files, args.opts, args.size)
        result = compare(predictors, args.size, args.batch, args.rounds, args.warmup, args.cpu_time)
    result = {"configs": args.config_files, "options": args.opts, **result}
    print(report(result))
    write_json(result, args.json)
    return result


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    log = logging.getLogger("d2_frozen")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def compare(
    predictors: list[Predictor], size: int, batch: int, rounds: int, warmup: int, cpu_time: bool = False
) -> dict[str, Any]:
    """Medians of the seconds of one batch.

    Args:
        predictors: of both heads; of the first; of the second.
        size: side of the square pictures in pixels.
    """
    both, *each = predictors
    if len(both.plan(size, size)) != 1:
        raise ValueError(f"these heads do not share the pass:\n{both.describe(size, size)}")
    now = Clock(cpu_time)
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(batch)]
    subjects: dict[str, Callable[[], Seconds]] = {
        "together": lambda: _timed(now, {"all": partial(both, pictures)}),
        "apart": lambda: _timed(now, {p.heads[0].name: partial(p, pictures) for p in each}),
        "parts": lambda: _parts(now, both, pictures),
    }
    measured = alternate(subjects, rounds, warmup)
    together = measured["together"]["all"]
    ratios = {
        "together / apart": together / sum(measured["apart"].values()),
        "together / parts": together / sum(measured["parts"].values()),
    }
    counted = {"passes": both.memory.passes, "reused": both.memory.reused}
    return {
        "machine": machine_facts(),
        "unit": "CPU seconds" if cpu_time else "seconds",
        "size": size,
        "batch": batch,
        "seconds": measured,
        "ratios": ratios,
        "images per second, together": batch / together,
        "memory": counted,
    }


def report(result: dict[str, Any]) -> str:
    """The result as tables a person reads."""
    columns = ["backbone", *(phase for phase in result["seconds"]["apart"])]
    rows = [
        [name, *(f"{phases[c]:.3f}" if c in phases else "" for c in columns), f"{sum(phases.values()):.3f}"]
        for name, phases in result["seconds"].items()
    ]
    title = f"{result['unit']}, {result['batch']} x {result['size']} px"
    lines = [
        "  ".join(f"{k}: {v}" for k, v in result["machine"].items()),
        tabulate(rows, headers=[title, *columns, "all"], disable_numparse=True),
        *(f"{name}: {ratio:.3f}" for name, ratio in result["ratios"].items()),
        f"images/s together: {result['images per second, together']:.3f}",
    ]
    return "\n".join(lines)


def _timed(now: Clock, phases: dict[str, Callable[[], Any]]) -> Seconds:
    seconds = {}
    for name, work in phases.items():
        start = now()
        work()
        seconds[name] = now() - start
    return seconds


def _parts(now: Clock, both: Predictor, pictures: list[np.ndarray]) -> Seconds:
    """The backbone, and each head with the memory primed."""
    backbone: Any = next(iter(frozen_parts(both.heads[0].model).values()))
    seconds: Seconds = {}
    with torch.no_grad(), both.memory.on([backbone]):
        for head in both.heads:
            batch = model_inputs(head, pictures, *pictures[0].shape[:2])
            images = head.model.preprocess_image(batch).tensor  # type: ignore[operator]
            first = _timed(now, {"backbone": partial(backbone, images)})
            seconds = seconds or first  # the second head finds it done
            seconds |= _timed(now, {head.name: partial(head.model, batch)})
    both.memory.forget()
    return seconds


def _predictors(config_files: list[str], options: list[str], size: int) -> list[Predictor]:
    """Of both heads; of the first; of the second."""
    settings = [
        read_config(file, ["MODEL.TIMM.PRETRAINED", "", "MODEL.WEIGHTS", "", "SEED", "1", *options])
        for file in config_files
    ]
    tasks = [task_of(cfg).name for cfg in settings]
    if sorted(tasks) != sorted(_CLASSES):
        raise ValueError(
            f"--config-files: this compares a head for {' with one for '.join(_CLASSES)}, but "
            + " and ".join(f"{file} is for {task}" for file, task in zip(config_files, tasks))
            + "."
        )
    heads = []
    for task, cfg in zip(tasks, settings):
        part, usual = _CLASSES[task]
        count = cfg.MODEL[part].NUM_CLASSES if cfg.MODEL[part].NUM_CLASSES >= 0 else usual
        heads.append(build_head(task, cfg, Classes([str(k) for k in range(count)], list(range(count)))))
    both = Predictor.of(heads, size)
    return [both, *(Predictor.of([one], size) for one in heads)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench one_pass",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-files", nargs=2, default=list(DEFAULT_CONFIGS), help="a detection and a segmentation head"
    )
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--batch", type=int, default=1)
    add_measuring_flags(parser, "batches", rounds=5, warmup=1, options="config options for both heads")
    return parser
