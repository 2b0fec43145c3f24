"""How a backbone, or its first stages, is kept from training.

In: any Detectron2 backbone.  Out: the same backbone, parameter names included, that a training loop cannot
change.  Setting of Lin et al., arXiv:2211.02043: only what stands on the bottom-up network trains.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2_frozen.backbone.by_sample import Batch
from d2_frozen.backbone.fast import PRECISIONS, contiguous, fast_network
from d2_frozen.backbone.stages import parameters_by_stage
from d2_frozen.backbone.timm_backbone import TimmBackbone
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone

# Names of what MODEL.BACKBONE.FREEZE counts, from the input on.
_PARTS = ("stem", "res2", "res3", "res4", "res5")
# Held while a fast network is made: threads that bring their first images at once would each make one.
_MAKING = threading.RLock()


class _TransparentWrapper(Backbone):
    """A backbone that stands for ``inner`` under the same names.

    It shares the dictionaries of inner's root module instead of registering inner as a child:
    ``named_parameters``, ``state_dict``, ``load_state_dict``, ``to`` and ``deepcopy`` see inner's tensors
    without a prefix.
    """

    def __init__(self, inner: Backbone) -> None:
        super().__init__()
        for key, value in inner.__dict__.items():
            if (
                key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
                or "state_dict" in key
            ):
                self.__dict__[key] = value  # "state_dict": the hooks of saving and loading
        self.__dict__["_inner"] = inner

    @property
    def inner(self) -> Backbone:
        """The wrapped backbone."""
        return self.__dict__["_inner"]

    @property
    def size_divisibility(self) -> int:
        return self.inner.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.inner.padding_constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.inner.output_shape()

    # nn.Module calls these on each module of the tree; inner's root may have its own ways.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _TransparentWrapper:
        self.inner._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.inner._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.inner._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return type(self.inner).__name__


class FrozenBackbone(_TransparentWrapper):
    """A backbone that does not train, whatever the training loop does.

    - No parameter requires a gradient and ``forward`` records no graph (``no_grad``, not ``inference_mode``:
      heads keep its outputs for their own backward).
    - ``train()`` does not reach it: drop-path stays off and norm statistics stay as they are.
    - Its arithmetic is its own, also inside an autocast region. Outputs are float32, or autocast's dtype
      where an autocast region encloses the call.

    - ``torch.export`` and ``torch.jit.trace`` record the backbone itself, in float32 whatever the precision.

    Args:
        inner: the backbone to freeze, changed in place (gradients off, eval mode). Any module whose forward gives a
            dict of maps; who asks for ``output_shape()`` needs a Detectron2 Backbone.
        precision: one of PRECISIONS. What runs is a fast network made of the weights (fast/) at the
            first forward, and again after the weights change; ``state_dict`` always holds the originals. Below fp32 it
            has weights of its own on the images' device, and the originals stay in the computer's memory.
        name: for :meth:`fingerprint`; by default ``inner.name``, else inner's class.
        compile: compile what runs, see fast/compiled.py; the first forward then takes longer.
    Raises:
        ValueError: unknown precision.
    """

    def __init__(
        self, inner: Backbone, precision: str = "fp32", name: str | None = None, compile: bool = False
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"MODEL.FROZEN.PRECISION is {precision!r}; choose one of {', '.join(PRECISIONS)}."
            )
        super().__init__(inner)
        self.precision = precision
        self.compile_forward = compile
        self.name: str = name or getattr(inner, "name", None) or type(inner).__name__
        # While a batch comes whose samples may bring features along: answers in this network's place (by_sample.py).
        self.by_sample: Batch | None = None
        self._runner: nn.Module | None = None
        self._runner_state: tuple | None = None
        self._sha256 = ""
        self._sha256_state: tuple | None = None
        inner.requires_grad_(False)
        inner.eval()
        self.training = False

    def __setattr__(self, name: str, value: object) -> None:
        # nn.Module would register the fast network as a child, under parameter names of its own.
        if name == "_runner":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        # deepcopy and pickle carry the originals only; the fast network is made again where it is needed.
        return {**self.__dict__, "_runner": None, "_runner_state": None, "by_sample": None}

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Does nothing: a frozen backbone stays in eval mode."""
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images -> feature maps by name, without graph.

        Raises:
            ValueError: images of another rank.
            TypeError: ``inner`` gives no dict of tensors, or its weights are not those of the precision.
        """
        device = images.device.type
        outer = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if self.by_sample is not None:
                return self.by_sample(images, self._compute, outer)
            return self._compute(images, outer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenBackbone:
        # An accelerator needs the weights that run, not their originals: SwinV2-G has 12 GB of them in float32.
        example = fn(torch.empty(0))
        if self.precision == "fp32" or example.device.type == "cpu":
            self.inner._apply(fn, recurse)
        elif example.dtype != torch.float32:
            self.inner._apply(lambda tensor: fn(tensor).to(tensor.device), recurse)
        return self

    def fingerprint(self) -> dict[str, str]:
        """``{"name", "sha256"}`` of the weights: every persistent tensor's name, shape and float32 value.

        The same on every device and for every precision of the forward; computed again only after a change.
        """
        state = _tensor_versions(self.inner)
        if state != self._sha256_state:
            self._sha256 = _sha256_of(self.inner)
            self._sha256_state = state
        return {"name": self.name, "sha256": self._sha256}

    def _compute(self, images: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Maps in ``dtype``, or in that of the network."""
        if images.dim() != 4:
            raise ValueError(f"a backbone takes images of shape (B, 3, H, W), not {tuple(images.shape)}.")
        # Recorders cannot follow what makes the fast network, nor need they: what they give is made fast elsewhere.
        recorded = _is_recorded()
        network = self._recordable(images.device) if recorded else self._network(images.device)
        maps = network(images.float())
        if not isinstance(maps, Mapping) or not all(isinstance(one, Tensor) for one in maps.values()):
            raise TypeError(
                f"{self.name} gives {_described(maps)}; a backbone gives maps by name, "
                '{"res2": (B, C, H/4, W/4), ...}. Wrap it in a Detectron2 Backbone whose forward does '
                "(docs/library.md has an example)."
            )
        if recorded:
            return {name: feature.to(dtype or feature.dtype).contiguous() for name, feature in maps.items()}
        return {name: contiguous(feature, dtype or feature.dtype) for name, feature in maps.items()}

    def _recordable(self, device: torch.device) -> nn.Module:
        own = next((p.device for p in self.inner.parameters()), device)
        if own != device:
            raise RuntimeError(
                f"torch.export and torch.jit.trace record the float32 weights of {self.name}, which are on {own}; the "
                f"images are on {device}. In precision {self.precision} they stay there: build the model with "
                "MODEL.FROZEN.PRECISION fp32, or record it on the CPU."
            )
        return self.inner

    def _network(self, device: torch.device) -> nn.Module:
        state = (device, _tensor_versions(self.inner))
        ready = self._runner if state == self._runner_state else None
        if ready is not None:
            return ready
        with _MAKING:
            if state != self._runner_state:
                self._require_float32()
                self._runner = None  # before the next one takes its memory
                self._runner = fast_network(self.inner, self.precision, device, self.compile_forward)
                self._runner_state = state
            assert self._runner is not None
            return self._runner

    def _require_float32(self) -> None:
        dtypes = {p.dtype for p in self.inner.parameters() if p.is_floating_point()}
        if self.precision == "fp32" and dtypes and torch.float32 not in dtypes:
            raise TypeError(
                f"the weights of {self.name} are {', '.join(map(str, dtypes))}, but precision 'fp32' computes in "
                "float32. half(), bfloat16() and to(dtype) of a model round its frozen weights too: build it again, "
                "and choose the frozen arithmetic by MODEL.FROZEN.PRECISION (FrozenBackbone's precision), that of "
                "heads by torch.autocast."
            )


class PartlyFrozenBackbone(_TransparentWrapper):
    """A backbone whose first stages do not train; the others train as always.

    Made by :func:`freeze_stages`. The frozen stages keep eval mode (drop-path, norm statistics) under
    ``train()``.
    """

    def __init__(self, inner: Backbone, frozen_names: set[str]) -> None:
        super().__init__(inner)
        self.frozen_names = frozenset(frozen_names)
        for name, parameter in inner.named_parameters():
            if name in frozen_names:
                parameter.requires_grad_(False)
        self.train(inner.training)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images -> feature maps by name; the graph begins at the trained stages."""
        return self.inner(images)

    def train(self, mode: bool = True) -> PartlyFrozenBackbone:
        """As ever for the trained stages; frozen ones stay in eval mode."""
        self.training = mode
        self.inner.train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> Iterator[nn.Module]:
        for prefix, module in self.inner.named_modules():
            names = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()]
            if names and self.frozen_names.issuperset(names):
                yield module


def freeze_stages(inner: Backbone, stages: int) -> Backbone:
    """Freeze the first parts of a backbone: 1 = stem, 2 = stem and res2, ... as in MODEL.BACKBONE.FREEZE_AT.

    Args:
        inner: a :class:`TimmBackbone`, or one with ``stem``, ``res2``, .. such as Detectron2's ResNet.
        stages: 0 returns ``inner`` unchanged.
    Raises:
        ValueError: ``inner`` has fewer parts, none that are known, or some that cannot be separated.
    """
    if stages == 0:
        return inner
    # timm's stages are told apart as far as they are asked for: fused branches have a stem all the same.
    parts = (
        inner.parameters_by_stage(stages) if isinstance(inner, TimmBackbone) else parameters_by_stage(inner)
    )
    if not 0 < stages <= len(parts):
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE is {stages}, but {getattr(inner, 'name', type(inner).__name__)} has "
            f"{len(parts)} parts (stem and {len(parts) - 1} stages); choose 0..{len(parts)}, 'all' or 'none'."
        )
    return PartlyFrozenBackbone(inner, {name for part in parts[:stages] for name in part})


def freeze_backbone(
    bottom_up: Backbone, freeze: str | int = "all", precision: str = "fp32", compile: bool = False
) -> Backbone:
    """Apply MODEL.BACKBONE.FREEZE, MODEL.FROZEN.PRECISION and MODEL.FROZEN.COMPILE to a bottom-up network.

    Args:
        freeze: "all", "none", the last frozen stage by name ("stem", "res2" .. "res5"), or a number of parts as in
            :func:`freeze_stages`. Configs use names: their values may not change type.
    Raises:
        ValueError: any other value, or a low precision or compilation for a network that trains.
    """
    if freeze == "all":
        return FrozenBackbone(bottom_up, precision, compile=compile)
    if precision not in PRECISIONS:
        raise ValueError(f"MODEL.FROZEN.PRECISION is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision != "fp32":
        raise ValueError(
            f"MODEL.FROZEN.PRECISION is {precision}, which is for MODEL.BACKBONE.FREEZE: all, but FREEZE is "
            f"{freeze!r}. Set it to fp32; SOLVER.AMP.ENABLED lowers the precision of parts that train."
        )
    if compile:
        raise ValueError(
            f"MODEL.FROZEN.COMPILE is True, which is for MODEL.BACKBONE.FREEZE: all, but FREEZE is {freeze!r}. "
            "Set it to False."
        )
    if freeze == "none":
        return bottom_up
    parts = _PARTS.index(freeze) + 1 if freeze in _PARTS else freeze
    if isinstance(parts, bool) or not isinstance(parts, int):
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE is {freeze!r}; choose 'all', 'none', or the last stage that is frozen: "
            f"{', '.join(_PARTS)}."
        )
    return freeze_stages(bottom_up, parts)


def exclude_frozen_from_ddp(model: nn.Module) -> nn.Module:
    """Keep frozen backbones out of DistributedDataParallel: not in its buckets, not broadcast. In place.

    Call it on the model before it is wrapped; every process must have loaded the same frozen weights.
    """
    ignored = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        if isinstance(part, FrozenBackbone)
        for name in [*dict(part.named_parameters()), *dict(part.named_buffers())]
    }
    if ignored:
        present = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        object.__setattr__(model, "_ddp_params_and_buffers_to_ignore", sorted({*present, *ignored}))
    return model


def _is_recorded() -> bool:
    """By torch.jit.trace (and torch.onnx by it), or torch.export? Before torch 2.7, not by the latter's strict way."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # of torch 2.7 and later
    if exporting is None:
        compiling, by_dynamo = torch.compiler.is_compiling(), torch.compiler.is_dynamo_compiling()
        return torch.jit.is_tracing() or (compiling and not by_dynamo)
    return torch.jit.is_tracing() or exporting()


def _described(result: Any) -> str:
    if isinstance(result, Mapping):
        kinds = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in result.items())
        return f"a {type(result).__name__} of {{{kinds}}}"
    return f"a {type(result).__name__}"


def _tensor_versions(module: nn.Module) -> tuple:
    """Changes when a tensor of the module is replaced, moved, or written to in place.

    Asked at each forward, while a GPU waits: torch's own walk, which puts names together, takes 20 times as long.
    """
    found, left = [], [module]
    while left:
        part = left.pop()
        for t in (*part._parameters.values(), *part._buffers.values()):
            if t is not None:
                found.append((t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device))
        left.extend(child for child in part._modules.values() if child is not None)
    return tuple(found)


def _sha256_of(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
