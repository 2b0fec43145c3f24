"""Memory for time: which trained layers compute again in backward, instead of keeping what they computed?

In: MODEL.USE_ACT_CHECKPOINT. Out: the same losses and gradients, from less memory and more time: each such layer keeps
its inputs alone (activation checkpointing, arXiv:1604.06174). Figures: docs/speed.md, "Less memory".
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from d2_frozen.backbone.stages import bottom_up_of

logger = logging.getLogger(__name__)


class ActCheckpointLayer(nn.Module):
    """A layer of a stack. With ``act_checkpoint`` it keeps nothing but its inputs while it trains."""

    act_checkpoint = False

    def __call__(self, *inputs: Any) -> Any:
        if not (self.act_checkpoint and self.training and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        return checkpoint(
            super().__call__,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _uncounted(self)),
        )


def use_act_checkpoint(model: nn.Module) -> list[str]:
    """Switch it on in every layer of ``model`` that can: neck, head, and a timm network that trains.

    A timm network with batch norm stays as it is, as its statistics would be counted twice.

    Returns:
        Names of what it holds for; logged, and a warning where there is none.
    """
    names = []
    for name, layer in model.named_modules():
        if isinstance(layer, ActCheckpointLayer):
            layer.act_checkpoint = True
            names.append(name)
    name, bottom_up = bottom_up_of(model)
    if bottom_up is not None and any(p.requires_grad for p in bottom_up.parameters()):
        if _checkpoint_timm(bottom_up):
            names.append(name)
        else:
            logger.warning("MODEL.USE_ACT_CHECKPOINT: the trained part of %s keeps all its maps.", name)
    if names:
        logger.info("Computed again in backward (MODEL.USE_ACT_CHECKPOINT): %s", ", ".join(names))
    else:
        logger.warning(
            "MODEL.USE_ACT_CHECKPOINT changes nothing: no trained layer of this model can compute again. Those of "
            "BiFPN, ResidualFPN, seg_app's pixel decoder and video_app's blocks can, and timm networks that train."
        )
    return names


def _checkpoint_timm(bottom_up: nn.Module) -> bool:
    network = getattr(bottom_up, "network", None)
    switch = getattr(network, "set_grad_checkpointing", None)
    if switch is None or any(isinstance(module, _BatchNorm) for module in bottom_up.modules()):
        return False
    try:
        switch(True)
    except AssertionError:  # timm's way to say that a network cannot
        return False
    return True


@contextlib.contextmanager
def _uncounted(layer: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch as before, and do not count it a second time."""
    before = [
        (norm, norm.momentum, count, count.clone())
        for norm in layer.modules()
        if isinstance(norm, _BatchNorm) and (count := norm.num_batches_tracked) is not None
    ]
    for norm, *_ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count, value in before:
            norm.momentum = momentum
            count.copy_(value)
