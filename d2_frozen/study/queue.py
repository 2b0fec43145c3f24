"""Run many jobs, several at a time, each in a process of its own; a failed one does not stop the others.

Which jobs have finished is read from their folders: a queue that was killed goes on when it is started again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from d2_frozen.study.jobs import Job
from d2_frozen.study.worker import run_job_in_process

logger = logging.getLogger(__name__)


class LocalQueue:
    """Jobs on this machine.

    Args:
        root: folder of the study.
        parallel: jobs at a time.
        threads: of CPU arithmetic, per job.
        gpus: numbers of the GPUs to share between the jobs; empty for none, or whatever is visible.
        num_gpus: GPUs per job.
    """

    def __init__(
        self,
        root: str | Path,
        parallel: int = 1,
        threads: int = 0,
        gpus: Sequence[int] = (),
        num_gpus: int = 1,
    ) -> None:
        self.root = str(root)
        self.parallel = parallel
        self.threads = threads
        self.gpus = list(gpus)
        self.num_gpus = num_gpus
        self._stopped_by = 0

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Run jobs that have not finished. On SIGTERM and Ctrl-C running ones save and leave, then so does this.

        Returns:
            The jobs that have still not finished.
        """
        done, total, begun = 0, len(jobs), time.monotonic()
        open_names = {job.name for job in jobs}
        waiting = list(jobs)
        running: dict[int, tuple[Job, BaseProcess]] = {}
        context = job_context()
        free = list(range(self.parallel))
        with _Signals(self._stop):
            while (waiting or running) and not (self._stopped_by and not running):
                while free and not self._stopped_by:
                    job = _next(waiting, open_names)
                    if job is None:
                        break
                    slot = free.pop(0)
                    running[slot] = job, self._start(context, job, slot)
                if not running:
                    break  # what is left waits for jobs that failed
                if self._stopped_by:
                    self._pass_on(running)
                for slot in _ended(running):
                    job, process = running.pop(slot)
                    free.append(slot)
                    if self._outcome(job, process):
                        open_names.discard(job.name)
                        done += 1
                        eta = timedelta(seconds=int((time.monotonic() - begun) / done * (total - done)))
                        logger.info("%d/%d  %s finished  eta: %s", done, total, job.name, eta)
        return [job for job in jobs if job.name in open_names]

    def _start(self, context: multiprocessing.context.BaseContext, job: Job, slot: int) -> BaseProcess:
        # Neighbours in turn; with more runs than GPUs, several share one.
        first, count = slot * max(1, self.num_gpus), max(1, self.num_gpus)
        gpus = [self.gpus[(first + i) % len(self.gpus)] for i in range(count)] if self.gpus else []
        process = context.Process(  # type: ignore[attr-defined]
            target=run_job_in_process,
            args=(job, self.root, self.threads, gpus, self.num_gpus),
            name=job.name,
        )
        process.start()
        logger.debug("%s started", job.name)
        return process

    def _outcome(self, job: Job, process: BaseProcess) -> bool:
        process.join()
        if job.result(self.root) is not None:
            return True
        if self._stopped_by:
            return False
        killed = " (killed: too little memory?)" if process.exitcode == -signal.SIGKILL else ""
        reason = job.why_failed(self.root, f"exit code {process.exitcode}{killed}")
        logger.error("%s failed: %s (%s)", job.name, reason, job.folder(self.root) / "output.txt")
        return False

    def _stop(self, number: int) -> None:
        self._stopped_by = number
        logger.warning(
            "%s: running jobs save and leave; the same command goes on.", signal.Signals(number).name
        )

    def _pass_on(self, running: dict[int, tuple[Job, BaseProcess]]) -> None:
        for _, process in running.values():
            if process.pid and not getattr(process, "told", False):
                os.kill(process.pid, signal.SIGTERM)
                process.told = True  # type: ignore[attr-defined]


class _Signals:
    """Calls a function with the number on SIGTERM and SIGINT, instead of what they do otherwise."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self._call = call

    def __enter__(self) -> None:
        def receive(number: int, frame: FrameType | None) -> None:
            self._call(number)

        self._before = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def job_context() -> multiprocessing.context.BaseContext:
    """For processes that have imported what a job needs."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["d2_frozen.study.preloaded"])
    return context


def _next(waiting: list[Job], unfinished: set[str]) -> Job | None:
    """Take the first job that need not wait for another; None if there is none."""
    for index, job in enumerate(waiting):
        if job.evaluates not in unfinished:
            return waiting.pop(index)
    return None


def _ended(running: dict[int, tuple[Job, BaseProcess]]) -> list[int]:
    ended = set(wait([process.sentinel for _, process in running.values()], timeout=0.5))
    return [slot for slot, (_, process) in running.items() if process.sentinel in ended]
