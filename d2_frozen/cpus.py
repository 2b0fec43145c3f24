"""How many CPUs may this process use? Fewer than the machine has, in a container or in a job of a cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """At least 1: those that it may run on (`taskset`, Slurm), or fewer, by its share of time (`docker --cpus`)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(share) for share in _shares())]))


def fit_threads() -> None:
    """Let torch and OpenCV have no more threads than CPUs; unless OMP_NUM_THREADS or MKL_NUM_THREADS say how many.

    They do not know of a container's share of time: with 64 threads on the time of 2 CPUs, all wait for each other.
    """
    import cv2
    import torch

    if os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"):
        return
    count = usable_cpus()
    if torch.get_num_threads() > count:
        torch.set_num_threads(count)
    if cv2.getNumThreads() > count:
        cv2.setNumThreads(count)


def _shares() -> Iterator[float]:
    """Of the control groups that the process is in: CPUs' worth of time."""
    try:
        lines = _PROCESS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _GROUPS / "cpu" if controllers else _GROUPS
        # A limit of a group holds for those below it.
        for group in (PurePosixPath(name), *PurePosixPath(name).parents):
            folder = root / str(group).lstrip("/")
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{of}_us").read_text() for of in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):
                    yield int(quota) / int(period)
            except (OSError, ValueError, ZeroDivisionError):
                continue  # no such limit, or a group outside of the container
