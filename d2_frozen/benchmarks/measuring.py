"""How is measured: two subjects take turns, medians, ratios, and the facts that a reported figure must name."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

import d2_frozen

# Seconds by phase; one of them may be the whole.
Seconds = dict[str, float]


class Run(NamedTuple):
    """Seconds by phase, and numbers that must be the same on both engines."""

    seconds: Seconds
    check: dict[str, float]


# Does its work once, in the given turn; the turn seeds what is drawn.
Task = Callable[[int], Run]


def alternate(subjects: dict[str, Callable[[], Seconds]], rounds: int, warmup: int) -> dict[str, Seconds]:
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


def ratios(measured: dict[str, Seconds]) -> Seconds:
    """First subject over second, phase by phase; phases that take no time are left out."""
    first, second = measured.values()
    return {phase: first[phase] / second[phase] for phase in first if second.get(phase, 0) > 0}


def with_ratio(measured: dict[str, Seconds]) -> dict[str, Seconds]:
    """Two subjects, and a third row "A / B"."""
    return {**measured, " / ".join(measured): ratios(measured)}


def phase_table(title: str, rows: dict[str, Seconds], phases: list[str]) -> str:
    """A table with a column per phase; rows whose name is "A / B" are ratios."""
    cells = [
        [name, *(f"{row.get(phase, float('nan')):{'.2f' if '/' in name else '.4f'}}" for phase in phases)]
        for name, row in rows.items()
    ]
    return tabulate(cells, headers=[title, *phases], disable_numparse=True)


def add_measuring_flags(
    parser: argparse.ArgumentParser, what: str, rounds: int, warmup: int, options: str = "config options"
) -> None:
    """Flags that comparisons share; the last of a parser, as KEY VALUE options take the rest of the line.

    Args:
        what: is done once in a round, in the plural: "steps".
        rounds, warmup: defaults.
        options: what the KEY VALUE are.
    """
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured {what} of each")
    parser.add_argument("--warmup", type=int, default=warmup, help=f"{what} of each before measuring")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds instead of the clock: steadier on a shared machine; use one thread",
    )
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help=f"{options}: KEY VALUE ...")


def write_json(result: dict[str, Any], path: str | None) -> None:
    """What ``--json FILE`` does; nothing without a file."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")


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


class Clock:
    """Seconds, of the wall or of the CPU time that this process got.

    The second is the steadier one where other work runs on the same cores; it is comparable with one thread only.
    """

    def __init__(self, cpu_time: bool = False) -> None:
        self._read = time.process_time if cpu_time else time.perf_counter

    def __call__(self) -> float:
        """Now, after everything that was given to an accelerator is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._read()


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} rounds", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
