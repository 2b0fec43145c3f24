"""What does the fast frozen forward save in a training step? The same detector, its backbone frozen in several ways.

    python -m d2_frozen.bench step [--subjects naive fp32 bf16 full] [--size 512] [--batch 2] [--memory] [KEY VALUE ...]

``naive`` is how a backbone is frozen in Detectron2: ``requires_grad = False`` on its parameters, and nothing else
(timm's network as it is, in training mode, inside the model's graph). A precision, also with ``+compile``, is this
project's frozen backbone. ``full`` is fine-tuning. ``+amp`` behind any of them is SOLVER.AMP.ENABLED, mixed precision
for neck and heads (with naive and full for the backbone, too); ``+checkpoint`` is MODEL.USE_ACT_CHECKPOINT, less memory
for more time. ``@detectron2`` behind one runs it on an installed Detectron2, in a process of its own, ``@embedded`` on
the embedded engine; else it is the engine of this process (D2_FROZEN_ENGINE). Weights and images are generated; every
subject has the same.

Peak memory is measured first, each alone (on a CPU, in a process of its own). Ctrl-C and SIGTERM end the run with what
was measured; with ``--json`` the file is written again after every round.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import signal
import sys
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import d2_frozen
from d2_frozen.backbone.fast import PRECISIONS
from d2_frozen.benchmarks.arguments import parse_with_lists
from d2_frozen.benchmarks.engine_worker import generated_batch
from d2_frozen.benchmarks.engines import ENGINES, EngineProcess
from d2_frozen.benchmarks.measuring import (
    Clock,
    Seconds,
    add_measuring_flags,
    alternate,
    machine_facts,
    phase_table,
    write_json,
)
from d2_frozen.benchmarks.timed_step import PHASES, MixedPrecision, Watch, timed_step
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.engine.hooks import peak_memory_mib
from d2_frozen.train_net import read_config

DEFAULT_CONFIG = "configs/Base-Frozen-RCNN.yaml"
DEFAULT_OPTIONS = ["MODEL.TIMM.NAME", "swinv2_base_window8_256"]
# The batch is generated before the step.
_PHASES = tuple(phase for phase in PHASES if phase != "data")


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what ``--json`` writes."""
    args = parse_with_lists(_parser(), arguments, subjects=subject_name)
    if not torch.cuda.is_available():
        keep_freed_memory()  # as train_net.py does
    now = Clock(args.cpu_time)
    options = [*DEFAULT_OPTIONS, *args.opts]
    settings = {
        "config": args.config_file,
        "options": options,
        "size": args.size,
        "batch": args.batch,
        "cpu_time": args.cpu_time,
    }
    result: dict[str, Any] = {"machine": machine_facts(), "config": args.config_file, "options": options}
    result |= {"size": args.size, "batch": args.batch, "unit": "CPU seconds" if args.cpu_time else "seconds"}
    # As Ctrl-C: what was measured is not lost.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def keep(measured: dict[str, Seconds], rounds: int) -> None:
        result.update(step=measured, rounds=rounds)
        write_json(result, args.json, quietly=True)

    if args.memory:
        # Before there are models here, which may leave no room for another one.
        memory = result["peak memory MiB"] = {}
        for name in args.subjects:
            print(f"peak memory of {name}", file=sys.stderr, flush=True)
            memory[name] = _peak_memory(name, settings, now)
            write_json(result, args.json, quietly=True)
    with contextlib.ExitStack() as ends:
        ends.callback(signal.signal, signal.SIGTERM, before)
        subjects = {name: _make(name, settings, now) for name in args.subjects}
        for one in subjects.values():
            ends.callback(one.close)
        alternate({name: one.step for name, one in subjects.items()}, args.rounds, args.warmup, keep)
    print(report(result))
    write_json(result, args.json)
    return result


def report(result: dict[str, Any]) -> str:
    """The result as tables a person reads."""
    head = f"{result['config']} {' '.join(result['options'])}  {result['batch']} x {result['size']} px  "
    head += "  ".join(f"{k}: {v}" for k, v in result["machine"].items())
    steps, memory = result["step"], result.get("peak memory MiB", {})
    rows = dict(steps)
    first = next(iter(steps))
    others = [first, *(name for name in list(steps)[1:] if name.startswith("full"))]
    for other in others:
        for name in steps:
            if name not in others or (other == first and name != first):
                rows[f"{name} / {other}"] = {p: steps[name][p] / steps[other][p] for p in _PHASES}
    title = f"training step, {result['unit']}, {result['rounds']} rounds"
    table = phase_table(title, rows, list(_PHASES))
    if not memory:
        return f"{head}\n{table}"
    cells = [
        [name, "failed" if mib is None else f"{mib:.0f}", *(_share(mib, memory[other]) for other in others)]
        for name, mib in memory.items()
    ]
    headers = ["peak memory, MiB", "", *(f"/ {other}" for other in others)]
    return f"{head}\n{table}\n\n" + tabulate(cells, headers=headers, disable_numparse=True)


def _share(mib: float | None, of: float | None) -> str:
    return f"{mib / of:.2f}" if mib and of else ""


class Subject:
    """One model with its optimiser, on the same generated batch at each step.

    Args:
        name: of the subject, without an engine.
        settings: "config" (file), "options" (KEY, VALUE, ...), "size" (pixels), "batch" (images).
    """

    def __init__(self, name: str, settings: dict[str, Any], now: Clock) -> None:
        from d2_frozen.engine import FrozenTrainer

        cfg = read_config(settings["config"], settings["options"])
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = max(cfg.MODEL.ROI_HEADS.NUM_CLASSES, 1)
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        kind, *additions = name.split("+")
        frozen = kind not in ("naive", "full")
        cfg.MODEL.BACKBONE.FREEZE = "all" if frozen else "none"
        if frozen:
            cfg.MODEL.FROZEN.PRECISION, cfg.MODEL.FROZEN.COMPILE = kind, "compile" in additions
        cfg.SOLVER.AMP.ENABLED = cfg.SOLVER.AMP.ENABLED or "amp" in additions
        cfg.MODEL.USE_ACT_CHECKPOINT = cfg.MODEL.USE_ACT_CHECKPOINT or "checkpoint" in additions
        torch.manual_seed(0)
        self.model = FrozenTrainer.build_model(cfg)
        _enliven(self.model.backbone.bottom_up)
        if kind == "naive":
            self.model.backbone.bottom_up.requires_grad_(False)
        self.optimizer = FrozenTrainer.build_optimizer(cfg, self.model)
        self.batch = generated_batch(settings["size"], settings["batch"], cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        self.now = now
        self.backbone = Watch(self.model.backbone.bottom_up, now)
        self.precision = MixedPrecision(cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE)

    def close(self) -> None:
        """Nothing to end here."""

    def step(self) -> Seconds:
        """Seconds of one step by phase."""
        self.model.train()
        batch = copy.deepcopy(self.batch)
        torch.manual_seed(0)  # for the draws of anchors and proposals
        return timed_step(self.model, self.optimizer, lambda: batch, self.backbone, self.now, self.precision)


@torch.no_grad()
def _enliven(bottom_up: nn.Module) -> None:
    """SwinV2's branches start at 0; no pretrained one has that."""
    for key, tensor in bottom_up.named_parameters():
        if key.endswith(("norm1.weight", "norm2.weight")):
            tensor.fill_(0.2)


class _OnEngine:
    """A subject on a named engine, in a process of its own."""

    def __init__(self, name: str, engine: str, settings: dict[str, Any]) -> None:
        self._process = EngineProcess(engine, {**settings, "subject": name})
        self.peak_mib = float("nan")

    def step(self) -> Seconds:
        answer = self._process.run("frozen step", 0)
        self.peak_mib = answer["peak MiB"]
        return answer["seconds"]

    def close(self) -> None:
        self._process.close()


def _make(name: str, settings: dict[str, Any], now: Clock) -> Subject | _OnEngine:
    kind, _, engine = name.partition("@")
    if engine:
        return _OnEngine(kind, engine, settings)
    return Subject(kind, settings, now)


def _peak_memory(name: str, settings: dict[str, Any], now: Clock) -> float | None:
    """MiB that two steps need, alone; None where there is not enough, which is said on stderr."""
    kind, _, engine = name.partition("@")
    if torch.cuda.is_available() and not engine:
        # The allocator of a GPU can count from 0 again, a process cannot.
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        here = Subject(kind, settings, now)
        for _ in range(_STEPS_OF_PEAK):
            here.step()
        return peak_memory_mib()
    try:
        alone = _OnEngine(kind, engine or d2_frozen.engine_name(), settings)
        try:
            for _ in range(_STEPS_OF_PEAK):
                alone.step()
        finally:
            alone.close()
    except RuntimeError as err:
        print(f"no peak memory of {name}: {err}", file=sys.stderr)
        return None
    return alone.peak_mib


# The second one has the optimiser's state from the beginning.
_STEPS_OF_PEAK = 2


def subject_name(text: str) -> str:
    """A name of a subject.

    Raises:
        ValueError: it is none.
    """
    what, at, engine = text.partition("@")
    kind, *additions = what.split("+")
    known = [*PRECISIONS, "naive", "full"]
    allowed = {"amp", "checkpoint"} | ({"compile"} if kind in PRECISIONS else set())
    fits = kind in known and set(additions) <= allowed and len(set(additions)) == len(additions)
    if not fits or (at and engine not in ENGINES):
        raise ValueError(
            f"{text!r} is no subject of this comparison: choose {', '.join(known)}; behind a precision +compile, "
            "behind each +amp, +checkpoint, last an engine: @detectron2 or @embedded."
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--subjects", nargs="+", default=["naive", "fp32", "bf16"], help="the first is 1.00")
    parser.add_argument("--config-file", default=DEFAULT_CONFIG)
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--memory", action="store_true", help="also peak memory, each alone")
    add_measuring_flags(parser, "steps", rounds=5, warmup=1)
    return parser
