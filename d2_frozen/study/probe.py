"""How long, how large would a job be? Its first iterations are run, then counted up; nothing of them is kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2_frozen import tasks
from d2_frozen.study.jobs import Job
from d2_frozen.study.queue import LocalQueue

# Detectron2's timer leaves the first three out.
_ITERATIONS = 8


@dataclass(frozen=True)
class Estimate:
    """Of one training, without its evaluations."""

    trainable: int
    iterations: int
    seconds_per_iteration: float
    checkpoint_mib: float
    checkpoints: int

    @property
    def hours(self) -> float:
        return self.iterations * self.seconds_per_iteration / 3600

    @property
    def disk_mib(self) -> float:
        return self.checkpoint_mib * self.checkpoints


def probe(jobs: Sequence[Job], threads: int = 0, num_gpus: int = 1) -> list[Estimate | str]:
    """An estimate per job, one after the other; where a job fails, why."""
    estimates: list[Estimate | str] = []
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            short = ("SOLVER.MAX_ITER", str(_ITERATIONS), "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
            first = Job("probe", job.config_file, (*job.options, *short, "TEST.EVAL_PERIOD", "0"))
            LocalQueue(folder, 1, threads, num_gpus=num_gpus).run([first])
            estimates.append(_estimate(job, first, folder))
    return estimates


def _estimate(job: Job, first: Job, root: str) -> Estimate | str:
    result = first.result(root)
    if result is None:
        failure = first.failure(root)
        return failure["error"] if failure else "failed"
    lines = (first.folder(root) / "metrics.json").read_text().splitlines()
    seconds = next(line["time"] for line in map(json.loads, reversed(lines)) if "time" in line)
    size = (first.folder(root) / "model_final.pth").stat().st_size / 2**20
    solver = tasks.read_config(job.config_file, job.options).SOLVER
    kept = solver.MAX_ITER // solver.CHECKPOINT_PERIOD + 1
    return Estimate(result["trainable"], solver.MAX_ITER, seconds, size, kept)


def disk_free_mib(folder: str | Path) -> float:
    """Of the disk that ``folder`` is on, or will be."""
    import shutil

    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 2**20
