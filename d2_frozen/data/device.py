"""How do batches get to a GPU while it computes? One ahead: pinned by a thread, copied on a stream of their own.

In: a loader's batches, lists of Detectron2's dicts in the computer's memory.  Out: the same lists, their tensors on the
device.

While the model works on one batch, the next one is on its way. On a CPU there is no way to go, and nothing happens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detectron2.structures import Instances

Batch = list[Any]
Change = Callable[[Tensor], Tensor]


def on_device(
    batches: Iterable[Batch], device: torch.device | str, leave: Collection[str] = ()
) -> Iterable[Batch]:
    """The batches with their tensors on ``device``; as they are if that is no CUDA device.

    Order and values stay; an error of the loader comes in the turn of its batch. Only a loader that makes batches in
    this process (no workers) is not asked one ahead, since it may draw from generators that the model draws from too.

    Args:
        leave: keys of samples that stay in the computer's memory.
    """
    device = torch.device(device)
    return _OnDevice(batches, device, leave) if device.type == "cuda" else batches


class _OnDevice:
    def __init__(self, batches: Iterable[Batch], device: torch.device, leave: Collection[str]) -> None:
        self.batches, self.device, self.leave = batches, device, leave

    def __iter__(self) -> Iterator[Batch]:
        transfer = _Transfer(self.device, self.leave)
        arrivals: Iterable[Any]
        if makes_batches_here(self.batches):
            arrivals = map(transfer.send, self.batches)
        else:
            arrivals = one_ahead(self.batches, transfer.send)
        for sent in arrivals:
            yield transfer.receive(sent)


def makes_batches_here(loader: Any) -> bool:
    """Does a loader without worker processes stand behind this? Wrappers have what they wrap as ``dataset``."""
    while loader is not None:
        workers = getattr(loader, "num_workers", None)
        if isinstance(workers, int):
            return workers == 0
        loader = getattr(loader, "dataset", None)
    return True


def one_ahead(items: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """``work`` of each item, in order; a thread does that of the next one while the caller is busy with this one.

    Items are taken in the caller's thread. What fails, here or there, raises in the turn of its item.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-batch") as thread:

        def following() -> Future | None:
            try:
                item = next(source)
            except StopIteration:
                return None
            except Exception as err:
                failed: Future = Future()
                failed.set_exception(err)
                return failed
            return thread.submit(work, item)

        coming = following()
        while coming is not None:
            ready, coming = coming, following() if coming.exception() is None else None
            yield ready.result()


class Sent(NamedTuple):
    """A batch on its way: its ``tensors`` are there when ``arrived`` (a CUDA event) has happened."""

    batch: Batch
    tensors: list[Tensor]
    arrived: Any


class _Transfer:
    """Copies batches on a stream of its own."""

    def __init__(self, device: torch.device, leave: Collection[str]) -> None:
        # "cuda" is another GPU in another thread; all of it is for the one that is current now.
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.leave = frozenset(leave)
        self.stream = torch.cuda.Stream(self.device)

    def send(self, batch: Batch) -> Sent:
        """Start the copy; in any thread."""
        tensors: list[Tensor] = []

        def copied(tensor: Tensor) -> Tensor:
            there = _pinned(tensor).to(self.device, non_blocking=True)
            tensors.append(there)
            return there

        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            moved = [with_tensors(sample, copied, self.leave) for sample in batch]
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return Sent(moved, tensors, arrived)

    def receive(self, sent: Sent) -> Batch:
        """For the stream that is current: it waits for the copy, and the memory is not used again before it is done."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(sent.arrived)
        for tensor in sent.tensors:
            tensor.record_stream(current)
        return sent.batch


class Pinnable:
    """A batch that torch's DataLoader can pin, Detectron2's Instances in it too.

    Args:
        drawn: NamedTuples with a ``sample`` each.
    """

    def __init__(self, drawn: list[Any]) -> None:
        self.drawn = drawn

    def pin_memory(self) -> Pinnable:
        """Called by the DataLoader's own thread, where it has one."""
        return Pinnable([one._replace(sample=with_tensors(one.sample, _pinned)) for one in self.drawn])


def with_tensors(value: Any, change: Change, leave: Collection[str] = ()) -> Any:
    """A copy of a sample with ``change(tensor)`` for each of its tensors that is on the CPU.

    They are found in dicts, in Instances, and in what these hold (boxes, bit masks, keypoints: whatever has an
    attribute ``tensor``). All else, polygons too, is the same object.

    A tensor whose elements are all one in memory, as the pixels of a sample whose features are stored, stays so.

    Args:
        leave: keys of a dict whose values stay.
    """
    if isinstance(value, Tensor):
        return _changed(value, change)
    if isinstance(value, dict):
        return {key: one if key in leave else with_tensors(one, change, leave) for key, one in value.items()}
    if isinstance(value, Instances):
        moved = Instances(value.image_size)
        for name, field in value.get_fields().items():
            moved.set(name, with_tensors(field, change))
        return moved
    inner = getattr(value, "tensor", None)
    if isinstance(inner, Tensor):
        value = copy.copy(value)
        value.tensor = _changed(inner, change)
    return value


def _changed(tensor: Tensor, change: Change) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor
    if tensor.numel() > 1 and not any(tensor.stride()):
        return change(tensor[(0,) * tensor.ndim]).expand(tensor.shape)
    return change(tensor)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()
