"""Is the embedded engine as fast as Detectron2? Both in turns, each in a process of its own, on equal work.

Sections: build of the model, training step, inference, COCO evaluation; and the peak memory of a step and of inference
in fresh processes. Equal work is checked, not assumed: both engines must give the same weights, losses, detections and
metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any

from tabulate import tabulate

from d2_frozen.benchmarks.measuring import Seconds, alternate, machine_facts, phase_table, with_ratio

DEFAULT_CONFIG = "configs/zoo/mask_rcnn_R_50_FPN_3x.yaml"
ENGINES = ("embedded", "detectron2")
# Tasks of engine_worker.py, as they are measured. With their memory: those that a user runs for long.
SECTIONS = ("build", "training step", "inference", "evaluation")
MEMORY_SECTIONS = ("training step", "inference")
# Largest difference of the checked numbers, relative to the number (absolute below 1).
TOLERANCE = 1e-5


def compare(
    settings: dict[str, Any], rounds: int, warmup: int, sections: Sequence[str] = SECTIONS
) -> dict[str, Any]:
    """Measure all sections.

    Args:
        settings: "config" (file), "options" (KEY, VALUE, ...), "size" (pixels), "batch" (images), "images" (per
            evaluation), "cpu_time" (bool: see ``Clock``).
        rounds, warmup: see ``alternate``.
        sections: which of ``SECTIONS``.
    Raises:
        RuntimeError: there is no Detectron2, a worker failed, or the engines did different work.
    """
    facts = machine_facts()
    facts["engine"] = " and ".join(ENGINES)
    result: dict[str, Any] = {"machine": facts, **settings}
    workers = {name: EngineProcess(name, settings) for name in ENGINES}
    try:
        for section in sections:
            checks: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
            runs = {name: _turns(worker, section, checks[name]) for name, worker in workers.items()}
            result[section] = with_ratio(alternate(runs, rounds, warmup))
            result[section]["largest difference"] = largest_difference(section, *checks.values())
    finally:
        for worker in workers.values():
            worker.close()
    result["peak memory MiB"] = {
        section: _peak_memory(settings, section) for section in MEMORY_SECTIONS if section in sections
    }
    return result


def report(result: dict[str, Any]) -> str:
    """The result as tables a person reads."""
    facts = "  ".join(f"{k}: {v}" for k, v in result["machine"].items())
    blocks = [f"{result['config']}  {result['batch']} images of {result['size']} pixels  {facts}"]
    unit = "CPU seconds" if result["cpu_time"] else "seconds"
    for section in [name for name in SECTIONS if name in result]:
        rows = {name: row for name, row in result[section].items() if name != "largest difference"}
        table = phase_table(f"{section}, {unit}", rows, list(rows[ENGINES[0]]))
        blocks.append(f"{table}\nlargest relative difference: {result[section]['largest difference']:.1e}")
    memory = result["peak memory MiB"]
    ratio = " / ".join(ENGINES)
    if not memory:
        return "\n\n".join(blocks)
    cells = [[s, *(f"{memory[s][e]:.0f}" for e in ENGINES), f"{memory[s][ratio]:.2f}"] for s in memory]
    blocks.append(tabulate(cells, headers=["peak memory, MiB", *ENGINES, ratio], disable_numparse=True))
    return "\n\n".join(blocks)


class EngineProcess:
    """A process that runs engine_worker.py on one engine.

    Raises:
        RuntimeError: it ends before it has answered, e.g. because there is no such engine.
    """

    def __init__(self, engine: str, settings: dict[str, Any]) -> None:
        self.engine = engine
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until close()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "d2_frozen.benchmarks.engine_worker",
                json.dumps(settings),
            ],
            env={**os.environ, "D2_FROZEN_ENGINE": engine},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        assert self._answer()["engine"] == engine

    def run(self, task: str, turn: int) -> dict[str, Any]:
        """One turn of a task: {"seconds": by phase, "check": numbers, "peak MiB": of the process so far}."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: _answer says why
            self._process.stdin.write(json.dumps({"task": task, "turn": turn}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # what it was to be told last, if it ended before
            self._process.communicate()  # it leaves at the end of its input
        self._stderr.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._stderr.seek(0)
        why = ""
        if code == -signal.SIGKILL:
            why = " It was killed: was there enough memory?"
        elif self.engine == "detectron2":
            why = " To compare, Detectron2 itself must be importable (PYTHONPATH may name its folder)."
        said = self._stderr.read()[-3000:]
        raise RuntimeError(f"the {self.engine} engine failed.{why} What its process said:\n{said}")


def largest_difference(section: str, first: list[dict[str, float]], second: list[dict[str, float]]) -> float:
    """Over all turns and numbers: |a - b| / max(1, |a|).

    Raises:
        RuntimeError: it is above TOLERANCE, so that the times are not of equal work.
    """
    largest = 0.0
    for turn, (ours, theirs) in enumerate(zip(first, second)):
        for name in ours.keys() | theirs.keys():
            a, b = ours.get(name, float("nan")), theirs.get(name, float("nan"))
            difference = abs(a - b) / max(1.0, abs(a))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{section}, turn {turn}: {name} is {a!r} on {ENGINES[0]} and {b!r} on {ENGINES[1]}; "
                    "the engines do different work, so their times cannot be compared."
                )
            largest = max(largest, difference)
    return largest


def _turns(worker: EngineProcess, section: str, checks: list[dict[str, float]]) -> Callable[[], Seconds]:
    """A function that runs the next turn, keeps its numbers in ``checks`` and gives its seconds."""

    def run() -> Seconds:
        answer = worker.run(section, turn=len(checks))
        checks.append(answer["check"])
        return answer["seconds"]

    return run


def _peak_memory(settings: dict[str, Any], section: str, turns: int = 3) -> dict[str, float]:
    found = {}
    for engine in ENGINES:
        worker = EngineProcess(engine, settings)
        try:
            found[engine] = [worker.run(section, turn)["peak MiB"] for turn in range(turns)][-1]
        finally:
            worker.close()
    found[" / ".join(ENGINES)] = found[ENGINES[0]] / found[ENGINES[1]]
    return found
