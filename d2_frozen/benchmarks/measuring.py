"""How is measured: two subjects take turns, medians, ratios, and the facts that a reported figure must name."""

from __future__ import annotations

import argparse
import functools
import json
import platform
import signal
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
from d2_frozen.files import write_text

# Seconds by phase; one of them may be the whole.
Seconds = dict[str, float]


class Run(NamedTuple):
    """Seconds by phase, and numbers that must be the same on both engines."""

    seconds: Seconds
    check: dict[str, float]


# Does its work once, in the given turn; the turn seeds what is drawn.
Task = Callable[[int], Run]


# Called with the medians so far and the number of measured rounds behind them.
Keep = Callable[[dict[str, Seconds], int], None]


def alternate(
    subjects: dict[str, Callable[[], Seconds]], rounds: int, warmup: int, keep: Keep | None = None
) -> dict[str, Seconds]:
    """Run A, B, A, B, ... and give the median seconds of each phase.

    Ctrl-C ends the measurement after the last whole round, with what was measured until then.

    Args:
        subjects: name -> function that runs once and returns seconds by phase.
        rounds: measured runs of each.
        warmup: runs of each that are not counted.
        keep: called after each measured round, for a run that may be cut off.
    Raises:
        SystemExit: interrupted before the first measured round was whole.
        ValueError: no round is to be measured.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(
            f"--rounds {rounds} --warmup {warmup}: at least one round is measured, behind 0 or more."
        )
    whole: list[dict[str, Seconds]] = []  # by round: name -> seconds
    try:
        for turn in range(warmup + rounds):
            one = {}
            for name, run in subjects.items():
                one[name] = run()
                _progress(name, one[name], turn, warmup, rounds)
            if turn >= warmup:
                whole.append(one)
                if keep is not None:
                    keep(_medians(whole), len(whole))
    except KeyboardInterrupt:
        if not whole:
            raise SystemExit("interrupted before the first measured round was whole") from None
        print(f"interrupted: medians of {len(whole)} of {rounds} rounds", file=sys.stderr)
    return _medians(whole)


def _medians(whole: list[dict[str, Seconds]]) -> dict[str, Seconds]:
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in whole:
        for name, seconds in one.items():
            for phase, value in seconds.items():
                seen[name][phase].append(value)
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


def write_json(result: dict[str, Any], path: str | None, quietly: bool = False) -> None:
    """What ``--json FILE`` does; nothing without a file."""
    if path:
        write_text(Path(path), json.dumps(result, indent=1) + "\n")
        if not quietly:
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
        "commit": source_commit(),
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


def _progress(name: str, seconds: Seconds, turn: int, warmup: int, rounds: int) -> None:
    """A line per run where somebody looks, or where runs take so long that somebody will."""
    took = seconds.get("step", max(seconds.values(), default=0.0))
    if sys.stderr.isatty() or took > _LONG_SECONDS:
        which = f"round {turn - warmup + 1}/{rounds}" if turn >= warmup else f"warmup {turn + 1}/{warmup}"
        print(f"{which}  {name}  {took:.3g} s", file=sys.stderr, flush=True)


_LONG_SECONDS = 5.0


_HERE = Path(__file__).resolve().parent


@functools.cache
def source_commit(folder: Path = _HERE) -> str:
    """The commit of the code that runs, "-dirty" behind it where tracked files differ from it; else "unknown".

    Asked once per process and remembered: call it at the start of a run, as somebody may commit during it.
    """
    git = ["git", "-C", str(folder)]
    try:
        # An installed package may lie in a repository of the user's that has nothing to do with it.
        ours = subprocess.run([*git, "ls-files", "--error-unmatch", "."], capture_output=True, text=True)
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
        )
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() if ours.returncode == done.returncode == 0 else "unknown"


def memory_in_child(command: list[str]) -> float | None:
    """Run a command whose last line is {"peak": MiB}; None where it fails, which is said on stderr."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    why = " (killed: was there enough memory?)" if done.returncode == -signal.SIGKILL else ""
    print(f"measuring memory failed{why}: {' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
    return None
