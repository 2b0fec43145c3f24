"""Normalisation layers by name: frozen, synchronised over workers, per pyramid level, LayerNorm of maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn

from detectron2.layers.wrappers import BatchNorm2d
from detectron2.utils import comm


class FrozenBatchNorm2d(nn.Module):
    """Batch norm as a fixed per-channel affine map: statistics and affine terms are buffers.

    A new one is the identity up to rounding. Checkpoints of ordinary batch norm load into it; early ones
    without statistics get mean 0 and variance 1.
    """

    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        one = torch.ones(num_features)
        start = {"weight": one, "bias": one * 0, "running_mean": one * 0, "running_var": one - eps}
        for name, value in start.items():
            self.register_buffer(name, value)
        self.register_buffer("num_batches_tracked", None)  # only a converted layer has it

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            # Fused, and the fastest; but its backward would also compute gradients that nobody needs.
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[None, :, None, None] + shift.to(x.dtype)[None, :, None, None]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if (local_metadata.get("version") or 0) < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __repr__(self) -> str:
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Freeze every BatchNorm2d and SyncBatchNorm inside a module.

        Returns:
            The module, changed in place; if it is a batch norm itself, the frozen one that takes its place.
        """
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            return _transplant(module, cls(module.num_features, module.eps))
        return _replace_children(module, cls.convert_frozen_batchnorm)

    @classmethod
    def convert_frozenbatchnorm2d_to_batchnorm2d(cls, module: nn.Module) -> nn.Module:
        """The way back: every FrozenBatchNorm2d inside a module becomes a trainable BatchNorm2d."""
        if isinstance(module, FrozenBatchNorm2d):
            return _transplant(module, nn.BatchNorm2d(module.num_features, module.eps))
        return _replace_children(module, cls.convert_frozenbatchnorm2d_to_batchnorm2d)


def _transplant(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give ``target`` the numbers of ``source``, on its device and in its mode."""
    if source.weight is not None:  # None: batch norm with affine=False
        target.weight.data = source.weight.data.clone().detach()
        target.bias.data = source.bias.data.clone().detach()
    target.running_mean.data = source.running_mean.data
    target.running_var.data = source.running_var.data
    target.num_batches_tracked = source.num_batches_tracked
    return target.train(source.training)


def _replace_children(module: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for name, child in list(module.named_children()):
        converted = convert(child)
        if converted is not child:
            setattr(module, name, converted)
    return module


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """A normalisation layer by name.

    Args:
        norm: "" or None for no norm; "BN", "SyncBN", "FrozenBN", "GN" (32 groups), "LN" (over channels),
            "nnSyncBN", "naiveSyncBN" (every worker counts the same), "naiveSyncBN_N" (every image counts the
            same, batches may be empty); or a function of the channel count.
        out_channels: channels of the map that it gets.
    Raises:
        KeyError: a name that is none of these.
    """
    if norm is None or norm == "":
        return None
    if isinstance(norm, str):
        if norm not in _NORMS:
            raise KeyError(
                f"unknown norm {norm!r}; choose one of {', '.join(sorted(_NORMS))}, or '' for none"
            )
        norm = _NORMS[norm]
    return norm(out_channels)


class NaiveSyncBatchNorm(BatchNorm2d):
    """Batch norm over the batches of all workers that also takes batches of different size.

    nn.SyncBatchNorm weighs and counts by pixels and needs equal sizes to be exact; here the workers' means
    and mean squares are averaged instead.
    """

    def __init__(self, *args: Any, stats_mode: str = "", **kwargs: Any) -> None:
        """
        Args:
            stats_mode: "": each worker counts the same and none may have an empty batch. "N": each counts by
                its number of images, which may be 0.
            args, kwargs: as for BatchNorm2d.
        """
        super().__init__(*args, **kwargs)
        assert stats_mode in ("", "N"), f"stats_mode is '' or 'N', not {stats_mode!r}"
        self._stats_mode = stats_mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or comm.get_world_size() == 1:
            return super().forward(x)
        in_dtype = x.dtype
        x = x.float() if in_dtype == torch.float16 else x  # squares of half floats overflow
        mean, mean_of_squares, momentum = self._global_moments(x)
        var = mean_of_squares - mean * mean
        self.running_mean += momentum * (mean.detach() - self.running_mean)
        self.running_var += momentum * (var.detach() - self.running_var)

        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(in_dtype)

    def _global_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Mean and mean square per channel over all workers, and the momentum for the running statistics."""
        num_images, channels = x.shape[:2]
        if num_images > 0:
            local = torch.cat((x.mean(dim=(0, 2, 3)), (x * x).mean(dim=(0, 2, 3))))
        else:
            assert self._stats_mode == "N", "a worker has an empty batch; use the norm naiveSyncBN_N"
            # Zeros, but part of the graph: its backward communicates too.
            local = x.new_zeros(2 * channels) + x.sum()
        if self._stats_mode == "":
            mean, mean_of_squares = (differentiable_all_reduce(local) / comm.get_world_size()).split(channels)
            return mean, mean_of_squares, self.momentum

        total = differentiable_all_reduce(torch.cat((local, local.new_ones(1))) * num_images)
        count = total[-1].detach()
        mean, mean_of_squares = (total[:-1] / count.clamp(min=1)).split(channels)
        # Without a single image anywhere the running statistics must stay as they are.
        return mean, mean_of_squares, self.momentum * count.clamp(max=1)


class CycleBatchNormList(nn.ModuleList):
    """Batch norms that take turns, call by call, and share one affine map.

    For a head that runs on the levels of a pyramid one after the other: statistics per level, one set of
    weights (Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 5).
    """

    def __init__(
        self, length: int, bn_class: Callable[..., nn.Module] = nn.BatchNorm2d, **kwargs: Any
    ) -> None:
        """
        Args:
            length: how many take turns.
            bn_class: called with ``kwargs`` and affine=False.
            kwargs: arguments of the norm; ``affine`` says whether there is the shared map.
        """
        self._affine = kwargs.pop("affine", True)
        super().__init__([bn_class(**kwargs, affine=False) for _ in range(length)])
        if self._affine:
            self.weight = nn.Parameter(torch.ones(self[0].num_features))
            self.bias = nn.Parameter(torch.zeros(self[0].num_features))
        self._next = 0

    def forward(self, x: Tensor) -> Tensor:
        normalised = self[self._next](x)
        self._next = (self._next + 1) % len(self)
        if not self._affine:
            return normalised
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"affine={self._affine}"


class LayerNorm(nn.Module):
    """LayerNorm over the channels of a channels-first map: (B, C, H, W) -> the same."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.normalized_shape = (normalized_shape,)

    def forward(self, x: Tensor) -> Tensor:
        # torch's own layer norm wants channels last; var_mean is slow along any dimension but the last.
        centered = x - x.mean(dim=1, keepdim=True)
        var = centered.square().mean(dim=1, keepdim=True)
        return centered / torch.sqrt(var + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
    "LN": LayerNorm,
    "SyncBN": nn.SyncBatchNorm,
    "nnSyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "naiveSyncBN_N": lambda channels: NaiveSyncBatchNorm(channels, stats_mode="N"),
}
