"""Run jobs on a Slurm cluster, one array of tasks, through submitit. Which have finished is read from their folders.

submitit asks a task that is about to be stopped (time limit, preemption) for a successor, which goes on from the last
checkpoint of the job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2_frozen.study.jobs import FAILURE_FILE, Job
from d2_frozen.study.worker import run_job

logger = logging.getLogger(__name__)

_POLL_SECONDS = 10.0


class SlurmQueue:
    """Jobs on a cluster.

    Args:
        root: folder of the study, seen by every node.
        parallel: jobs at a time.
        threads: of CPU arithmetic, per job; 0 leaves them as they are.
        num_gpus: per job, all on one node.
        settings: further ones of submitit, e.g. ``{"slurm_partition": "gpu", "timeout_min": 1440}``.
        cluster: "slurm", or submitit's "local" (processes on this machine).
    Raises:
        ImportError: submitit is not installed.
        ValueError: this machine is of no cluster, or there are no such settings.
    """

    def __init__(
        self,
        root: str | Path,
        parallel: int,
        threads: int = 0,
        num_gpus: int = 1,
        settings: Mapping[str, Any] | None = None,
        cluster: str = "slurm",
    ) -> None:
        try:
            import submitit
        except ImportError as err:
            raise ImportError("--slurm needs submitit: pip install 'd2_frozen[slurm]'.") from err
        self.root = str(root)
        self.threads = threads
        self.num_gpus = num_gpus
        try:
            self._executor = submitit.AutoExecutor(folder=Path(root) / "submitit" / "%j", cluster=cluster)
        except RuntimeError as err:
            raise ValueError(
                f"--slurm: {err} Run the command where srun is found (a login node), or leave the flag out."
            ) from err
        wanted: dict[str, Any] = {"name": "d2_frozen_study", "timeout_min": 1440, "gpus_per_node": num_gpus}
        if cluster == "slurm":
            wanted["slurm_array_parallelism"] = parallel
        try:
            self._executor.update_parameters(**{**wanted, **(settings or {})})
        except (NameError, AssertionError) as err:  # of an unknown setting, of a value of another type
            raise ValueError(f"--slurm: submitit does not take these settings. {err}") from err

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Submit jobs that have not finished, and wait. Interrupted, this leaves the submitted tasks running.

        Returns:
            The jobs that have still not finished.
        """
        open_names = {job.name for job in jobs}
        trainings = [job for job in jobs if job.evaluates not in open_names]
        self._wait(trainings)
        trained = {job.name for job in trainings if job.result(self.root) is not None}
        self._wait([job for job in jobs if job.evaluates in trained])
        return [job for job in jobs if job.result(self.root) is None]

    def _wait(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        for job in jobs:  # of an earlier try: a task may be killed before it writes why
            (job.folder(self.root) / FAILURE_FILE).unlink(missing_ok=True)
        with self._executor.batch():
            tasks = [
                self._executor.submit(ResumableRun(job, self.root, self.threads, self.num_gpus))
                for job in jobs
            ]
        logger.info("%d jobs submitted, the first as %s.", len(tasks), tasks[0].job_id)
        waiting = dict(zip(jobs, tasks))
        while waiting:
            for job, task in list(waiting.items()):
                if not task.done():
                    continue
                del waiting[job]
                if job.result(self.root) is not None:
                    logger.info("%s finished, %d left.", job.name, len(waiting))
                else:
                    reason = job.why_failed(self.root, f"{task.state}, {task.paths.stderr}")
                    logger.error("%s failed: %s", job.name, reason)
            if waiting:
                time.sleep(_POLL_SECONDS)


class ResumableRun:
    """What submitit pickles and calls on a node."""

    def __init__(self, job: Job, root: str, threads: int, num_gpus: int) -> None:
        self.arguments = job, root, threads, (), num_gpus

    def __call__(self) -> bool:
        return run_job(*self.arguments)

    def checkpoint(self, *args: Any) -> Any:
        """Asked before the task is stopped: the same again, which resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
