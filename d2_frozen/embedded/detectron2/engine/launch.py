"""How ``main`` gets started: in this process, or once per GPU on one or several machines."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

# How long a process waits for the others in a collective operation before it gives up.
DEFAULT_TIMEOUT = timedelta(minutes=30)


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Call ``main_func(*args)`` in ``num_machines * num_gpus_per_machine`` connected processes.

    With one process in all, it is called right here. Without CUDA the processes share the CPU and talk over
    gloo.

    Args:
        main_func: importable by name, since it is called in other processes.
        machine_rank: this machine, 0 .. num_machines-1; call ``launch`` once on each.
        dist_url: where the processes meet: ``tcp://HOST:PORT`` of machine 0, ``file://`` on one machine,
            or "auto" for a free port on one machine.
        timeout: of collective operations.
    Raises:
        ValueError: counts or ``dist_url`` make no sense, or there are fewer GPUs than asked for.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"machine_rank (--machine-rank) is {machine_rank}, but there are {num_machines} machines."
        )
    visible = torch.cuda.device_count()
    if visible and num_gpus_per_machine > visible:
        raise ValueError(
            f"--num-gpus asks for {num_gpus_per_machine} GPUs per machine, {visible} are visible here."
        )
    url = _meeting_point(dist_url, num_machines)
    mp.start_processes(
        _run_as_rank,
        args=(main_func, world_size, num_gpus_per_machine, machine_rank, url, args, timeout),
        nprocs=num_gpus_per_machine,
        daemon=False,
    )


def _meeting_point(dist_url: str | None, num_machines: int) -> str:
    if dist_url is None:
        raise ValueError(
            "several processes need dist_url (--dist-url): where they meet, e.g. tcp://HOST:PORT or auto."
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("dist_url=auto works on one machine only; give tcp://HOST:PORT of machine 0.")
        return f"tcp://127.0.0.1:{_free_port()}"
    if num_machines > 1 and dist_url.startswith("file://"):
        logging.getLogger(__name__).warning(
            "file:// across machines needs a shared file system with locks; tcp:// is safer."
        )
    return dist_url


def _free_port() -> int:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_as_rank(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    per_machine: int,
    machine_rank: int,
    url: str,
    args: tuple[Any, ...],
    timeout: timedelta,
) -> None:
    on_gpu = torch.cuda.is_available()
    rank = machine_rank * per_machine + local_rank
    try:
        dist.init_process_group(
            backend="nccl" if on_gpu else "gloo",
            init_method=url,
            world_size=world_size,
            rank=rank,
            timeout=timeout,
        )
    except Exception:
        logging.getLogger(__name__).error("rank %d of %d cannot join the others at %s", rank, world_size, url)
        raise
    comm.create_local_process_group(per_machine)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    # Past this point everyone has joined; a straggler would show up as a timeout far from its cause.
    comm.synchronize()
    main_func(*args)
    # Only after success: with a failed rank the others still wait in a collective, and this would wait for
    # them. Nothing may be left of the groups: their threads would, rarely, abort the process as it ends.
    comm._forget_groups()
    dist.destroy_process_group()
