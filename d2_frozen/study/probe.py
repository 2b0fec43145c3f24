"""How long, how large would a job be? Its first iterations are run, then counted up; nothing of them is kept.

``probe`` runs the job as it is, with its data and weights. ``probe_synthetic`` needs neither: one process trains on a
generated batch that is in memory, with random weights, so it says what the arithmetic takes, not what reading takes.
``count_up`` runs nothing, and knows parameters and disk only.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from d2_frozen import tasks
from d2_frozen.study.jobs import Job, write_json
from d2_frozen.study.queue import LocalQueue, job_context
from d2_frozen.study.worker import use_gpus
from d2_frozen.summary import Counts, build_weightless, fill_standard_classes, model_of
from detectron2.config import CfgNode

# Detectron2's timer leaves the first three out.
_ITERATIONS = 8
# Of the generated batch: the first steps compile kernels and find their algorithms.
_WARM_UP, _TIMED = 5, 10
# Numbers that an optimiser keeps for each parameter.
_STATES = {"ADAMW": 2, "SGD": 1}
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Estimate:
    """Of one training, without its evaluations."""

    trainable: int
    iterations: int
    seconds_per_iteration: float
    checkpoint_mib: float
    checkpoints: int
    # Of one GPU, or of the process where there is none.
    peak_memory_mib: float = math.nan

    @property
    def hours(self) -> float:
        return self.iterations * self.seconds_per_iteration / 3600

    @property
    def disk_mib(self) -> float:
        return self.checkpoint_mib * self.checkpoints


@dataclass(frozen=True)
class Step:
    """What one training step on one device takes.

    checkpoint_mib: of a checkpoint, with the optimiser's state.
    """

    trainable: int
    images: int
    seconds: float
    peak_memory_mib: float
    checkpoint_mib: float
    device: str


def probe(
    jobs: Sequence[Job], threads: int = 0, num_gpus: int = 1, gpus: Sequence[int] = ()
) -> list[Estimate | str]:
    """An estimate per job, one after the other; where a job fails, why."""
    estimates: list[Estimate | str] = []
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            short = ("SOLVER.MAX_ITER", str(_ITERATIONS), "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
            first = Job("probe", job.config_file, (*job.options, *short, "TEST.EVAL_PERIOD", "0"))
            LocalQueue(folder, 1, threads, gpus, num_gpus).run([first])
            estimates.append(_estimate(job, first, folder))
    return estimates


def _estimate(job: Job, first: Job, root: str) -> Estimate | str:
    result = first.result(root)
    if result is None:
        failure = first.failure(root)
        return failure["error"] if failure else "failed"
    lines = (first.folder(root) / "metrics.json").read_text(encoding="utf-8").splitlines()
    seconds = next(line["time"] for line in map(json.loads, reversed(lines)) if "time" in line)
    size = (first.folder(root) / "model_final.pth").stat().st_size / 2**20
    solver = job.config().SOLVER
    memory = result["peak_memory_mib"]
    return Estimate(result["trainable"], solver.MAX_ITER, seconds, size, _kept(solver), memory)


def probe_synthetic(
    jobs: Sequence[Job], threads: int = 0, num_gpus: int = 1, gpus: Sequence[int] = ()
) -> list[Estimate | str]:
    """An estimate per job from one device: that of a run on ``num_gpus`` of them, as if they needed no time to talk.

    Jobs that differ only in data, schedule, seed or weights share a measurement.

    Args:
        gpus: of which the first is used; empty for whatever is visible.
    """
    estimates: list[Estimate | str] = []
    for cfg, step in _shared(
        jobs, _what_a_step_depends_on, lambda job, _: _step_in_process(job, threads, num_gpus, gpus)
    ):
        if cfg is None or isinstance(step, str):
            estimates.append(str(step))
        else:
            estimates.append(
                Estimate(
                    step.trainable,
                    cfg.SOLVER.MAX_ITER,
                    step.seconds,
                    step.checkpoint_mib,
                    _kept(cfg.SOLVER),
                    step.peak_memory_mib,
                )
            )
    return estimates


def measure_step(job: Job, num_gpus: int = 1, warm_up: int = _WARM_UP, timed: int = _TIMED) -> Step:
    """In this process: the trainer of the job, on a generated batch of its size for one GPU of ``num_gpus``.

    Without GPUs (0) one process trains on the whole batch.

    Raises:
        ValueError: the batch cannot be shared evenly between the GPUs.
    """
    from d2_frozen.benchmarks.measuring import machine_facts
    from d2_frozen.data.device import with_tensors
    from d2_frozen.engine.hooks import peak_memory_mib
    from d2_frozen.train_net import read_config
    from detectron2.utils.events import EventStorage

    cfg = read_config(job.config_file, list(job.options))
    images, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, max(1, num_gpus))
    if rest:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be shared by {num_gpus} GPUs."
        )
    with tempfile.TemporaryDirectory() as folder:
        fill_standard_classes(cfg)
        cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", "", "OUTPUT_DIR", folder])
        cfg.merge_from_list(["MODEL.FROZEN.CACHE.DIR", "", "SOLVER.IMS_PER_BATCH", str(images)])
        cfg.DATASETS.TEST = ()  # whose class names would be asked for
        cfg.SEED = max(cfg.SEED, 0)
        cfg.freeze()
        task = tasks.task_of(cfg)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer = task.trainer()(cfg)
        # On the device already: in training, batches get there while the one before is computed.
        batch = [
            with_tensors(sample, lambda tensor: tensor.to(cfg.MODEL.DEVICE))
            for sample in task.generated_batch(cfg, images)
        ]
        trainer.checkpointer.extra = {}  # names of classes, which come from the data
        trainer.stream.build, trainer.stream.bring = lambda start_iteration: itertools.repeat(batch), iter
        seconds = []
        with EventStorage():
            for iteration in range(warm_up + timed):
                trainer.iter = iteration
                begun = time.perf_counter()
                trainer.run_step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
        return Step(
            Counts.of(trainer.model_without_ddp).trainable,
            images,
            statistics.median(seconds[warm_up:]),
            peak_memory_mib(),
            sum(t.nbytes for t in _tensors(trainer.checkpointer.content())) / 2**20,
            machine_facts()["device"],
        )


def count_up(jobs: Sequence[Job]) -> list[Estimate | str]:
    """As :func:`probe`, without running anything: the models are built without weights, and time and memory are NaN.

    A checkpoint has the trained parameters and the optimiser's state, in float32.
    """
    estimates: list[Estimate | str] = []
    for cfg, count in _shared(jobs, model_of, lambda _, cfg: _trainable(cfg)):
        if cfg is None or isinstance(count, str):
            estimates.append(str(count))
        else:
            size = 4 * count * (1 + _STATES[cfg.SOLVER.OPTIMIZER]) / 2**20
            solver = cfg.SOLVER
            estimates.append(Estimate(count, solver.MAX_ITER, math.nan, size, _kept(solver)))
    return estimates


def _shared(
    jobs: Sequence[Job], key: Callable[[CfgNode], str], measure: Callable[[Job, CfgNode], _Found]
) -> Iterator[tuple[CfgNode | None, _Found | str]]:
    """Config of each job, and what was measured of it; jobs with an equal key share a measurement.

    Of a job that has no config: None, and why.
    """
    known: dict[str, _Found] = {}
    for job in jobs:
        try:
            cfg = job.config()
        except (ValueError, FileNotFoundError) as err:  # the plan names it, and goes on with the next job
            yield None, f"{type(err).__name__}: {err}"
            continue
        of_job = key(cfg)
        if of_job not in known:
            known[of_job] = measure(job, cfg)
        yield cfg, known[of_job]


def _trainable(cfg: CfgNode) -> int | str:
    try:
        return Counts.of(build_weightless(cfg)).trainable
    except Exception as err:  # of any kind: the plan names it, and goes on with the next job
        return f"{type(err).__name__}: {err}"


def _step_in_process(job: Job, threads: int, num_gpus: int, gpus: Sequence[int]) -> Step | str:
    """A process of its own: what the next job may use is not filled by this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.json")
        process = job_context().Process(  # type: ignore[attr-defined]
            target=_measure_into, args=(path, job, threads, num_gpus, gpus)
        )
        process.start()
        process.join()
        if not path.exists():
            return f"exit code {process.exitcode}"
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, str) else Step(**found)


def _measure_into(path: Path, job: Job, threads: int, num_gpus: int, gpus: Sequence[int]) -> None:
    if threads:
        torch.set_num_threads(threads)
    try:
        use_gpus(gpus[:1])
        write_json(path, measure_step(job, num_gpus).__dict__)
    except Exception as err:  # of any kind: the plan names it, and goes on with the next job
        write_json(path, f"{type(err).__name__}: {err}")


def _what_a_step_depends_on(cfg: CfgNode) -> str:
    """Text that is the same for configs whose steps do the same work."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.PRETRAINED = cfg.OUTPUT_DIR = ""
    # What follows the dot names weights, not a network.
    cfg.MODEL.TIMM.NAME = cfg.MODEL.TIMM.NAME.partition(".")[0]
    solver = {
        key: value for key, value in cfg.SOLVER.items() if key not in ("MAX_ITER", "STEPS", "WARMUP_ITERS")
    }
    for part in ("DATASETS", "DATALOADER", "TEST", "SOLVER", "SEED"):
        del cfg[part]
    return f"{cfg}{solver}"


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)


def _kept(solver: CfgNode) -> int:
    """Checkpoints at the end of a whole training."""
    period = solver.CHECKPOINT_PERIOD
    written = solver.MAX_ITER // period if period > 0 else 0  # which training refuses
    return min(written, solver.CHECKPOINTS_KEPT or written) + 1


def disk_free_mib(folder: str | Path) -> float:
    """Of the disk that ``folder`` is on, or will be."""
    import shutil

    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 2**20
