"""Fixed factors behind a linear map belong into its weights: batch norm into convolutions, layer scale into layers.

    norm(conv(x)) = s * (W x + b - mean) + shift = (s W) x + s (b - mean) + shift,  s = weight / sqrt(var + eps)

Which norm follows which convolution is not read from names: a small image runs through the network, and the norm
whose input is a convolution's output is folded into it. The result is compared with the network on that image, so that
a network in which something else uses the convolution's output too stays as it is.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from d2_frozen.backbone.fast.sharing import with_shared_tensors

# Largest difference of the maps, relative to their largest value; folding itself rounds to about 1e-6.
_TOLERANCE = 1e-4
logger = logging.getLogger(__name__)


def folded_copy(inner: nn.Module) -> nn.Module | None:
    """A copy of a backbone without its foldable norms and scales; None where there are none, or it would differ.

    The copy shares all tensors that folding does not change.
    """
    if any(t.dtype != torch.float32 for t in inner.parameters()):
        return None
    try:
        copy = with_shared_tensors(inner)
        trial = _small_image(inner)
        count = _fold_inside(copy) + _fold_traced(copy, trial)
        if not count:
            return None
        difference = _largest_difference(copy(trial), inner(trial))
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as reason:
        # Somebody's own network: one that takes a single image size, say, or no copies.
        logger.info(
            "%s runs as it is, with nothing folded: it could not be tried on a small image (%s: %s).",
            getattr(inner, "name", type(inner).__name__),
            type(reason).__name__,
            reason,
        )
        return None
    if not difference < _TOLERANCE:
        logger.warning(
            "%s: folding its norms and scales would change the maps by %.1e; they are left as they are.",
            getattr(inner, "name", type(inner).__name__),
            difference,
        )
        return None
    return copy


def _fold_traced(network: nn.Module, image: Tensor) -> int:
    """Fold each norm that is applied to a convolution's output; returns how many."""
    produced: dict[int, nn.Module] = {}
    alive: list[Tensor] = []  # an id stands for a tensor as long as the tensor lives
    calls: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, nn.Module] = {}

    def after(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            produced[id(output)] = module
            alive.append(output)
        elif id(inputs[0]) in produced:
            pairs[module] = produced[id(inputs[0])]

    handles = [
        m.register_forward_hook(after)
        for m in network.modules()
        if isinstance(m, nn.Conv2d) or _is_fixed_batch_norm(m)
    ]
    network(image)
    for handle in handles:
        handle.remove()
    parents = {
        child: (parent, name) for parent in network.modules() for name, child in parent.named_children()
    }
    folded = 0
    for norm, conv in pairs.items():
        assert isinstance(conv, nn.Conv2d)
        if calls[norm] == calls[conv] == 1:
            _scale_outputs(conv, *_as_affine(norm))
            parent, name = parents[norm]
            setattr(parent, name, _rest_of(norm))
            folded += 1
    return folded


def _fold_inside(network: nn.Module) -> int:
    """Fold what a module keeps for itself: norms of Detectron2's Conv2d, scales of timm's blocks."""
    folded = 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _is_fixed_batch_norm(getattr(module, "norm", None)):
            _scale_outputs(module, *_as_affine(module.norm))
            setattr(module, "norm", None)  # noqa: B010 - torch's own Conv2d declares no such attribute
            folded += 1
        for scale, layer in _scaled_layers(module):
            _scale_outputs(layer, scale, torch.zeros_like(scale))
            folded += 1
    return folded


def _scaled_layers(block: Any) -> list[tuple[Tensor, nn.Module]]:
    """(scale, last layer before it) of a ConvNeXt or ViT block of timm's; the scales are taken out of the block."""
    found = []
    kind = type(block).__name__
    if kind == "ConvNeXtBlock" and block.gamma is not None:
        found.append((block.gamma, block.mlp.fc2))
        block.gamma = None
    elif kind == "Block" and type(block).__module__ == "timm.models.vision_transformer":
        for name, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            if type(getattr(block, name)).__name__ == "LayerScale":
                found.append((getattr(block, name).gamma, layer))
                setattr(block, name, nn.Identity())
    return found


def _is_fixed_batch_norm(module: nn.Module | None) -> bool:
    """Detectron2's FrozenBatchNorm2d, torch's and timm's batch norms with statistics."""
    return (
        "BatchNorm" in type(module).__name__
        and isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
    )


def _as_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) per channel."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _scale_outputs(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Give a layer new weights, so that it gives ``scale * y + shift`` where it gave y."""
    weight, bias = layer.weight, layer.bias
    shape = (-1,) + (1,) * (weight.dim() - 1)
    new_bias = shift if bias is None else scale * bias + shift
    layer.weight = nn.Parameter((weight * scale.view(shape)).to(weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(new_bias.to(weight.dtype), requires_grad=False)


def _rest_of(norm: Any) -> nn.Module:
    """What a norm layer of timm's does besides: dropout (off) and activation."""
    rest = [part for name in ("drop", "act") if (part := getattr(norm, name, None)) is not None]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()


def _small_image(inner: Any) -> Tensor:
    """One small image of noise, as the network takes it."""
    first = next((p for p in inner.parameters() if p.dim() == 4), None)
    channels = 3 if first is None else first.shape[1]
    side = max(64, int(getattr(inner, "size_divisibility", 0) or 0))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, side, side, generator=generator)
    return image if first is None else image.to(first.device)


def _largest_difference(maps: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return max(
        ((maps[name] - t).abs().max() / t.abs().max().clamp(min=1e-12)).item() for name, t in truth.items()
    )
