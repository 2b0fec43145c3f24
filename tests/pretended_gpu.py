"""A CUDA device where there is none: tensors that say they are on it, and compute on the CPU.

python tests/pretended_gpu.py config.yaml       # one training step there and on the CPU: losses, waits for the device

Two tensors of different devices do not meet (:class:`TwoDevices`), as on a GPU, and operations for which a GPU's stream
would be waited for are counted by kind. Kernels, streams and memory are not pretended. It changes torch for the whole
process, so that it needs one of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
# Of operations that bring values to the host, or whose result's size is a value; an index by a mask is one too.
_WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.equal.default: "equal",
    aten.masked_select.default: "masked_select",
}
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
waits: Counter[str] = Counter()


class TwoDevices(RuntimeError):
    """An operation got tensors of the host and of the GPU."""


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGPU:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        # Not "cuda", without which autograd finds no streams.
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, **layout, device=torch.device("pretended", 0)
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TwoDevices("numpy() of a tensor on the GPU")

    def __deepcopy__(self, memo: dict) -> OnGPU:
        return OnGPU(self.held.clone()).requires_grad_(self.requires_grad)


class PretendedGPU(TorchDispatchMode):
    """Within, ``device="cuda"`` is the pretended one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "pretended")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnGPU)]
    here = [t for t in tensors if not isinstance(t, OnGPU)]
    device = kwargs.get("device")
    gives_gpu = _is_gpu(device) if device is not None else bool(there)
    if func is aten._to_copy.default:
        if there and not gives_gpu:
            waits["to the host"] += 1
        elif here and gives_gpu and not kwargs.get("non_blocking"):
            waits["to the GPU"] += 1
    elif func is aten.copy_.default:
        gives_gpu = isinstance(args[0], OnGPU)
    elif func in _INDEXING:
        index = [t for t in args[1] if t is not None]
        if any(isinstance(t, OnGPU) for t in (*index, *args[2:3])) and not isinstance(args[0], OnGPU):
            raise TwoDevices(f"{func}: a tensor of the host by indices on the GPU")
        if there and any(t.dtype == torch.bool for t in index):
            waits["index by a mask"] += 1
    elif there and any(t.dim() for t in here):  # numbers of no dimension may be anywhere
        raise TwoDevices(f"{func}: {[(str(t.device), tuple(t.shape)) for t in tensors]}")
    if there and func in _WAITS:
        waits[_WAITS[func]] += 1
        gives_gpu = gives_gpu and func is not aten.equal.default
    held_args, held_kwargs = tree_map(lambda t: t.held if isinstance(t, OnGPU) else t, (args, kwargs))
    if _is_gpu(device):
        held_kwargs["device"] = torch.device("cpu")
    held_kwargs.pop("pin_memory", None)
    own = {id(t.held): t for t in there}  # of in-place operations the result is the argument

    def given(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return own.get(id(value)) if id(value) in own else OnGPU(value) if gives_gpu else value

    return tree_map(given, func(*held_args, **held_kwargs))


def pretend() -> PretendedGPU:
    """Let torch say that there is a GPU; what this returns is the mode in which to run."""
    backend_registration._setup_privateuseone_for_python_backend("pretended")
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False).__enter__()
    for name, answer in {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    plain = torch.tensor

    def tensor(data: Any, *rest: Any, device: Any = None, **more: Any) -> torch.Tensor:
        made = plain(data, *rest, **more)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # type: ignore[assignment]
    return PretendedGPU()


def step(config_file: str, device: str) -> dict[str, float]:
    """Losses of one training step; their gradients are computed."""
    from d2_frozen import tasks
    from d2_frozen.data.device import with_tensors
    from d2_frozen.data.label_values import LABEL_VALUES, values_of
    from d2_frozen.summary import fill_standard_classes
    from detectron2.utils.events import EventStorage

    cfg = tasks.read_config(config_file, ["MODEL.DEVICE", device])
    fill_standard_classes(cfg)
    torch.manual_seed(0)
    trainer = tasks.task_of(cfg).trainer()
    model = trainer.build_model(cfg)
    batch = tasks.task_of(cfg).generated_batch(cfg, 2)
    for sample in batch:
        if "sem_seg" in sample:  # as the mapper does it
            sample[LABEL_VALUES] = values_of(sample["sem_seg"])
    batch = [with_tensors(sample, lambda one: one.to(device)) for sample in batch]
    torch.manual_seed(1)
    with EventStorage():
        model.train()(batch)  # what depends on the sizes alone is made now
        waits.clear()
        torch.manual_seed(1)
        losses = model(batch)
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient of {without}"
    return {name: float(loss.detach()) for name, loss in losses.items()}


if __name__ == "__main__":
    on_cpu = step(sys.argv[1], "cpu")
    with pretend():
        on_gpu = step(sys.argv[1], "cuda")
    waits["item"] -= len(on_gpu)  # of step itself
    print(json.dumps({"cpu": on_cpu, "gpu": on_gpu, "waits": waits}))
