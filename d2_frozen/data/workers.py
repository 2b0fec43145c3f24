"""How do samples get from the workers of a loader to the process that trains? Through shared memory, or with an error.

In a container shared memory may be small: Docker gives 64 MiB, less than a few large images.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2_frozen.caching.store import gib
from d2_frozen.data.device import with_tensors

Batch = TypeVar("Batch", bound=Sequence[Any])

_SHARED_MEMORY = "/dev/shm"
_OPEN_FILES = 2**16
LOST_WORKER = (
    "Did the system end it for too little memory? Fewer workers need less (DATALOADER.NUM_WORKERS), and the log of the "
    "system knows (dmesg)."
)
# How clusters announce the end of a job, and a terminal its own.
NOTICES = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)
_outlives = 0  # the worker that does
_ADVICE = (
    "Give the container more (Docker: --shm-size=8g or --ipc=host; Kubernetes: an emptyDir of medium Memory at "
    f"{_SHARED_MEMORY}), or use fewer workers: DATALOADER.NUM_WORKERS, 0 for none. --resume continues a training."
)


class SharedMemoryError(RuntimeError):
    """Samples do not fit into shared memory, or there are too many open files; says what to do."""


def hand_on(samples: Batch) -> Batch:
    """Put the tensors of samples into shared memory, in a worker; what to give a DataLoader as ``collate_fn``.

    torch would do it later, in a thread whose errors reach nobody: the process that trains would wait for ever.

    Args:
        samples: see ``with_tensors``, or NamedTuples with a ``sample`` each. They are returned as they are.
    Raises:
        SharedMemoryError: see there.
    """
    if torch.utils.data.get_worker_info() is not None:
        outlive_signals()
        try:
            for one in samples:
                with_tensors(getattr(one, "sample", one), Tensor.share_memory_)
        except (RuntimeError, OSError) as err:
            raise SharedMemoryError(_told(str(err))) from err
    return samples


def outlive_signals() -> None:
    """In a worker: only its parent ends it. Clusters send SIGTERM, or another notice, to all processes of a job, and
    terminals Ctrl-C.

    The parent finishes its iteration then, and saves, for which it needs the worker.
    """
    global _outlives
    if _outlives == os.getpid():
        return
    _outlives = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    creator = multiprocessing.parent_process()
    parent = creator.pid if creator is not None else os.getppid()
    # Programs that the worker starts have them blocked, too.
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)

    def answer() -> None:
        while True:
            told = signal.sigwaitinfo(NOTICES)
            if told.si_signo == signal.SIGTERM and told.si_pid in (parent, os.getpid()):
                os._exit(0)

    threading.Thread(target=answer, name="signals", daemon=True).start()


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may itself (to 65,536 at most).

    Each tensor on its way from a worker is an open file: 16 batches of 64 labelled images are 4096, and 1024 is what
    most systems begin with.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def deaths_told_in_turn() -> Iterator[None]:
    """For the start of workers: if one dies, the DataLoader says so when its batch is asked for.

    torch would raise in the middle of what the main thread does then: half a step is nothing to go on from.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    ours = (
        before is not None and getattr(before, "__module__", "") != "torch.utils.data._utils.signal_handling"
    )
    signal.signal(signal.SIGCHLD, before if ours else signal.SIG_DFL)


def is_lost_worker(err: Exception) -> bool:
    """Is it what a DataLoader says where a worker has died? Or what it hands on, tensors that the worker holds."""
    return isinstance(err, ConnectionError | EOFError) or str(err).startswith("DataLoader worker (pid")


def workers_cannot_start(err: OSError) -> OSError:
    """The error of a DataLoader that finds no place for its semaphores, with what to do."""
    seen = f"the loader's workers cannot be started: {err.strerror}; {_room()}. {_ADVICE}"
    return type(err)(err.errno, seen)


def _told(cause: str) -> str:
    if "open files" in cause:
        return (
            f"a worker of the loader cannot hand on its sample: {cause}. Each tensor on its way is an open file. Allow "
            "more (`ulimit -n 65536` before the command), or use fewer workers: DATALOADER.NUM_WORKERS."
        )
    return f"a worker of the loader cannot hand on its sample: {cause}; {_room()}. {_ADVICE}"


def _room() -> str:
    try:
        usage = shutil.disk_usage(_SHARED_MEMORY)
    except OSError as err:  # none, as in some sandboxes, or another system
        return f"{_SHARED_MEMORY}: {err.strerror}"
    return f"{_SHARED_MEMORY} has {gib(usage.total)}, of which {gib(usage.free)} are free"
