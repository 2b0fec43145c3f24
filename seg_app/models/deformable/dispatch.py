"""Which implementation of deformable attention runs? The fastest that works on the tensors' device.

CPU: a sparse matrix (bags.py).  CUDA: a Triton kernel (triton_kernel.py) where it compiles and agrees with
grid_sample.  Everything else, and CUDA without Triton: grid_sample (grid.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from seg_app.models.deformable.bags import attend_by_bags
from seg_app.models.deformable.grid import attend_by_grid_sample

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of values sampled bilinearly at the locations, per head (arXiv 2010.04159, equation 3).

    Cells outside a map read as zero; pixel centres lie at (i + 0.5) / size.

    Args:
        value: (B, S, M, D): cells of all levels one after the other, row by row; M heads of width D.
        shapes: (h, w) of each of the L levels; S = sum of h*w.
        locations: (B, Lq, M, L, P, 2), x and y in 0..1 over the level.
        weights: (B, Lq, M, L, P).
    Returns:
        (B, Lq, M * D), dtype of value.
    Raises:
        ValueError: the shapes do not fit ``value`` or ``locations``.
    """
    cells = sum(h * w for h, w in shapes)
    if cells != value.shape[1] or len(shapes) != locations.shape[3]:
        raise ValueError(
            f"deformable attention over maps {list(shapes)} ({cells} cells) got values of {value.shape[1]} cells "
            f"and sampling points for {locations.shape[3]} maps."
        )
    return IMPLEMENTATIONS[implementation_for(value.device, value.dtype)](value, shapes, locations, weights)


def attend_by_triton(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The kernel of triton_kernel.py, which is imported when it is first called: Triton is optional."""
    from seg_app.models.deformable.triton_kernel import attend_by_kernel

    return attend_by_kernel(value, shapes, locations, weights)


IMPLEMENTATIONS: dict[str, Attend] = {
    "bags": attend_by_bags,
    "triton": attend_by_triton,
    "grid_sample": attend_by_grid_sample,
}


def implementation_for(device: torch.device, dtype: torch.dtype) -> str:
    """A key of ``IMPLEMENTATIONS``. Triton is tried once per device and dtype; why it is not used is logged."""
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        return "bags"
    if device.type == "cuda" and _triton_works(device, dtype):
        return "triton"
    return "grid_sample"


@cache
def _triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        error = difference_to_exact(attend_by_triton, device, dtype)
    except Exception as reason:  # whatever goes wrong inside a compiler must not stop the training
        logger.warning(
            "Deformable attention on %s in %s: grid_sample, since Triton's kernel does not run here (%s: %s).",
            device,
            dtype,
            type(reason).__name__,
            str(reason).strip().split("\n")[0][:200],
        )
        return False
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
    if not error <= tolerance:
        logger.warning(
            "Deformable attention on %s in %s: grid_sample, since Triton's kernel is wrong by %.2g here.",
            device,
            dtype,
            error,
        )
        return False
    logger.info("Deformable attention on %s in %s: Triton kernel.", device, dtype)
    return True


@torch.inference_mode(False)  # gradients are compared too
def difference_to_exact(attend: Attend, device: torch.device, dtype: torch.dtype) -> float:
    """Largest absolute difference to grid_sample in float64, of the result and of all gradients, on a small case."""
    numbers = torch.Generator().manual_seed(0)
    shapes = [(7, 8), (2, 3)]

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=numbers, dtype=torch.float64).to(dtype).double()

    # Up to four cells outside, at odd multiples of 1/128 cell: no location moves across a cell's border by rounding.
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    cells = (draw(2, 37, 2, 2, 2, 2) * (sizes + 8) * 64).floor() / 64 - 4 + 1 / 128
    case = (draw(2, 62, 2, 12) - 0.5, cells / sizes, draw(2, 37, 2, 2, 2) / 4)
    outer = draw(2, 37, 24) - 0.5

    def run(function: Attend, to: torch.device, inputs_in: torch.dtype) -> list[Tensor]:
        # Locations are computed in float32 or better whatever the values are in.
        at_least_32 = torch.promote_types(inputs_in, torch.float32)
        kinds = (inputs_in, at_least_32, inputs_in)
        inputs = [t.to(to, kind).requires_grad_() for t, kind in zip(case, kinds)]
        with torch.enable_grad():
            out = function(inputs[0], shapes, inputs[1], inputs[2])
            gradients = torch.autograd.grad(out, inputs, outer.to(to, inputs_in))
        return [t.detach().cpu().double() for t in (out, *gradients)]

    exact = run(attend_by_grid_sample, torch.device("cpu"), torch.float64)
    return max(float((a - b).abs().max()) for a, b in zip(run(attend, device, dtype), exact))
