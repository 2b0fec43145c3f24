"""Who am I among the processes of a run, and how do we exchange Python objects?

Everything works without ``torch.distributed`` too: a single process is rank 0 of 1.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# The processes of one machine, when there are several machines; set by create_local_process_group.
_LOCAL_PROCESS_GROUP: dist.ProcessGroup | None = None
_NO_LOCAL_GROUP = (
    "the processes of one machine do not know each other yet: start them with detectron2.engine.launch, or "
    "call detectron2.utils.comm.create_local_process_group(processes_per_machine) after init_process_group."
)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if _distributed() else 1


def get_rank() -> int:
    """This process among all of the run, from 0."""
    return dist.get_rank() if _distributed() else 0


def is_main_process() -> bool:
    """Is this rank 0, the one that writes files?"""
    return get_rank() == 0


@functools.lru_cache
def create_local_process_group(num_workers_per_machine: int) -> None:
    """Make groups of the processes of each machine; every process must call it, with the same number.

    Args:
        num_workers_per_machine: processes per machine, usually the number of GPUs; divides the world size.
    Raises:
        ValueError: it does not.
    """
    global _LOCAL_PROCESS_GROUP
    world, rank = get_world_size(), get_rank()
    if world % num_workers_per_machine:
        raise ValueError(f"{world} processes do not divide into machines of {num_workers_per_machine}.")
    for first in range(0, world, num_workers_per_machine):
        members = range(first, first + num_workers_per_machine)
        # new_group is collective: all processes take part in making each of the groups.
        group = dist.new_group(list(members))
        if rank in members:
            _LOCAL_PROCESS_GROUP = group


def _forget_groups() -> None:
    global _LOCAL_PROCESS_GROUP
    _LOCAL_PROCESS_GROUP = None
    create_local_process_group.cache_clear()
    _cpu_group.cache_clear()


def get_local_process_group() -> dist.ProcessGroup:
    """The group of the processes on this machine.

    Raises:
        RuntimeError: nobody called ``create_local_process_group``.
    """
    if _LOCAL_PROCESS_GROUP is None:
        raise RuntimeError(_NO_LOCAL_GROUP)
    return _LOCAL_PROCESS_GROUP


def get_local_rank() -> int:
    """This process among those of its machine, from 0."""
    return dist.get_rank(group=get_local_process_group()) if _distributed() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _distributed() else 1


def synchronize() -> None:
    """Wait until every process of the run is here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        # Without the device NCCL guesses one from the rank, which is wrong when a machine has several ranks.
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _cpu_group() -> dist.ProcessGroup:
    """A group for Python objects: they live on the CPU, which NCCL does not serve."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every process' ``data``, by rank, for every process.

    Args:
        data: anything picklable.
        group: who takes part; default all, over the CPU.
    """
    if get_world_size() == 1:
        return [data]
    group = group or _cpu_group()
    received: list[Any] = [None] * dist.get_world_size(group)
    if len(received) == 1:
        return [data]
    dist.all_gather_object(received, data, group=group)
    return received


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every process' ``data``, by rank, for process ``dst``; an empty list for the others."""
    if get_world_size() == 1:
        return [data]
    group = group or _cpu_group()
    size = dist.get_world_size(group)
    if size == 1:
        return [data]
    here = dist.get_rank() == dst
    received: list[Any] = [None] * size if here else []
    dist.gather_object(data, received if here else None, dst=dst, group=group)
    return received


def shared_random_seed() -> int:
    """A random number in 0 .. 2**31 - 1 that is the same in all processes: rank 0 draws it.

    It comes from numpy's global generator, so a seeded run repeats it.
    """
    drawn = int(np.random.randint(2**31))
    return all_gather(drawn)[0]


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Add up (or average) scalar tensors over the processes.

    Args:
        input_dict: the same keys in every process; scalars of one dtype on one device.
        average: divide by the number of processes.
    Returns:
        Detached results, valid in rank 0 only.
    """
    world = get_world_size()
    if world == 1:
        return input_dict
    with torch.no_grad():
        # One message for all, in an order that does not depend on how each process filled its dict.
        names = sorted(input_dict)
        total = torch.stack([input_dict[name] for name in names])
        dist.reduce(total, dst=0)
        if average and dist.get_rank() == 0:
            total /= world
        return dict(zip(names, total))
