"""Seconds per training step and per image, split by phase, and peak memory: frozen against full fine-tuning.

    python -m d2_frozen.bench --config-file configs/quickstart/detection.yaml [--json FILE] [KEY VALUE ...]

Both models are built from one config and take turns in one run (A, B, A, B, ...), so that a noisy machine disturbs both
alike; the figures are medians, and what counts is their ratio. Peak memory is taken in a process of its own each.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import d2_frozen
from d2_frozen.engine.hooks import peak_memory_mib
from d2_frozen.train_net import read_config
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

PHASES = ("data", "backbone", "neck+heads", "backward+update", "step")
_DEFAULT_CONFIG = "configs/quickstart/detection.yaml"


class _Subject:
    """One model with its loader and optimiser; runs single timed steps."""

    def __init__(self, cfg: CfgNode) -> None:
        from d2_frozen.data import build_test_loader, build_train_loader
        from d2_frozen.engine import FrozenTrainer

        self.model = FrozenTrainer.build_model(cfg)
        self.optimizer = FrozenTrainer.build_optimizer(cfg, self.model)
        self.batches = iter(build_train_loader(cfg))
        self.test_batches = _cycle(lambda: build_test_loader(cfg, cfg.DATASETS.TEST[0]))
        self.backbone_seconds = 0.0
        self._watch(getattr(self.model.backbone, "bottom_up", self.model.backbone))

    def _watch(self, bottom_up: nn.Module) -> None:
        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            started = _now()

        def after(*_: Any) -> None:
            self.backbone_seconds += _now() - started

        bottom_up.register_forward_pre_hook(before)
        bottom_up.register_forward_hook(after)

    def train_step(self) -> dict[str, float]:
        """Seconds of one step by phase."""
        self.model.train()
        self.backbone_seconds = 0.0
        start = _now()
        batch = next(self.batches)
        loaded = _now()
        with EventStorage():
            loss = sum(self.model(batch).values())
        forwarded = _now()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        end = _now()
        return {
            "data": loaded - start,
            "backbone": self.backbone_seconds,
            "neck+heads": forwarded - loaded - self.backbone_seconds,
            "backward+update": end - forwarded,
            "step": end - start,
        }

    def test_image(self) -> dict[str, float]:
        """Seconds per image at evaluation by phase."""
        self.model.eval()
        self.backbone_seconds = 0.0
        start = _now()
        batch = next(self.test_batches)
        loaded = _now()
        with torch.no_grad():
            self.model(batch)
        end = _now()
        return {
            "data": loaded - start,
            "backbone": self.backbone_seconds,
            "neck+heads": end - loaded - self.backbone_seconds,
            "step": end - start,
        }


def alternate(
    subjects: dict[str, Callable[[], dict[str, float]]], rounds: int, warmup: int
) -> dict[str, dict[str, float]]:
    """Run A, B, A, B, ... and give the median seconds of each phase.

    Args:
        subjects: name -> function that runs once and returns seconds by phase.
        rounds: measured runs of each.
        warmup: runs of each that are not counted.
    """
    seen: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in subjects}
    for turn in range(warmup + rounds):
        for name, run in subjects.items():
            for phase, seconds in run().items():
                if turn >= warmup:
                    seen[name][phase].append(seconds)
        _progress(turn + 1, warmup + rounds)
    return {name: {p: statistics.median(v) for p, v in phases.items()} for name, phases in seen.items()}


def ratios(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """First subject over second, phase by phase; phases that take no time are left out."""
    first, second = measured.values()
    return {phase: first[phase] / second[phase] for phase in first if second.get(phase, 0) > 0}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    if args.memory_of:
        print(json.dumps(_measure_memory(_config(args, args.memory_of), args.rounds)))
        return {}
    result: dict[str, Any] = {"machine": machine_facts(), "config": args.config_file, "options": args.opts}
    subjects = {
        name: _Subject(_config(args, freeze)) for name, freeze in (("frozen", "all"), ("full", "none"))
    }
    for title, runs in (
        ("training step", {name: s.train_step for name, s in subjects.items()}),
        ("evaluation image", {name: s.test_image for name, s in subjects.items()}),
    ):
        measured = alternate(runs, args.rounds, args.warmup)
        result[title] = {**measured, "frozen / full": ratios(measured)}
    result["peak memory MiB"] = _memory_in_children(args)
    print(report(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.json}")
    return result


def report(result: dict[str, Any]) -> str:
    """The result as tables a person reads."""
    facts = result["machine"]
    blocks = [f"{result['config']}  " + "  ".join(f"{k}: {v}" for k, v in facts.items())]
    for title in ("training step", "evaluation image"):
        measured = result[title]
        phases = [phase for phase in PHASES if phase in measured["frozen"]]
        rows = [[name, *(f"{measured[name][p]:.4f}" for p in phases)] for name in ("frozen", "full")] + [
            ["frozen / full", *(f"{measured['frozen / full'].get(p, float('nan')):.2f}" for p in phases)]
        ]
        blocks.append(tabulate(rows, headers=[f"{title}, seconds", *phases]))
    memory = result["peak memory MiB"]
    rows = [[name, f"{value:.2f}" if "/" in name else f"{value:.0f}"] for name, value in memory.items()]
    blocks.append(tabulate(rows, headers=["training step", "peak memory, MiB"]))
    return "\n\n".join(blocks)


def machine_facts() -> dict[str, Any]:
    """What a reported figure must name."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else (platform.processor() or platform.machine())
    )
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "engine": d2_frozen.engine_name(),
        "commit": _commit(),
    }


def _measure_memory(cfg: CfgNode, steps: int) -> dict[str, float]:
    subject = _Subject(cfg)
    for _ in range(steps):
        subject.train_step()
    return {"peak": peak_memory_mib()}


def _memory_in_children(args: argparse.Namespace) -> dict[str, float]:
    found = {}
    for name, freeze in (("frozen", "all"), ("full", "none")):
        command = [sys.executable, "-m", "d2_frozen.bench", "--config-file", args.config_file]
        command += ["--memory-of", freeze, "--rounds", "3", *args.opts]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"measuring memory failed: {' '.join(command)}\n{done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    if found["full"] > 0:
        found["frozen / full"] = found["frozen"] / found["full"]
    return found


def _config(args: argparse.Namespace, freeze: str) -> CfgNode:
    from d2_frozen.data import prepare_datasets

    cfg = read_config(args.config_file, args.opts)
    cfg.MODEL.BACKBONE.FREEZE = freeze
    cfg.SEED = max(cfg.SEED, 0)
    cfg.OUTPUT_DIR = tempfile.gettempdir()
    prepare_datasets(cfg, train=True)
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default=_DEFAULT_CONFIG, help=f"default: {_DEFAULT_CONFIG}")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each model")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each model before measuring")
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _cycle(build: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield from build()


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} rounds", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
