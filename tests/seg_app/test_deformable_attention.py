"""Deformable attention: what it computes, its gradients, and that all implementations agree."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from seg_app.models.deformable import (
    IMPLEMENTATIONS,
    MSDeformAttn,
    cell_centres,
    deformable_attention,
    dispatch,
    implementation_for,
)
from seg_app.models.deformable.dispatch import difference_to_exact

CPU = torch.device("cpu")
ON_CPU = ["bags", "grid_sample"]


def by_definition(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 of arXiv 2010.04159, one number at a time."""
    B, _, M, D = value.shape
    Lq, L, P = weights.shape[1], *weights.shape[3:]
    out = torch.zeros(B, Lq, M, D, dtype=value.dtype)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(L)]
    for b in range(B):
        for q in range(Lq):
            for m in range(M):
                for level, (h, w) in enumerate(shapes):
                    for p in range(P):
                        x = float(locations[b, q, m, level, p, 0]) * w - 0.5
                        y = float(locations[b, q, m, level, p, 1]) * h - 0.5
                        for j in (math.floor(y), math.floor(y) + 1):
                            for i in (math.floor(x), math.floor(x) + 1):
                                if 0 <= i < w and 0 <= j < h:
                                    share = (1 - abs(x - i)) * (1 - abs(y - j))
                                    cell = value[b, starts[level] + j * w + i, m]
                                    out[b, q, m] += weights[b, q, m, level, p] * share * cell
    return out.flatten(2)


def case(Lq: int = 7, D: int = 3):
    shapes = [(3, 5), (2, 2), (1, 1)]
    torch.manual_seed(1)
    value = torch.randn(2, 20, 2, D, dtype=torch.float64)
    locations = torch.rand(2, Lq, 2, 3, 2, 2, dtype=torch.float64) * 2 - 0.5
    weights = torch.rand(2, Lq, 2, 3, 2, dtype=torch.float64)
    return value, shapes, locations, weights


@pytest.mark.parametrize("name", ON_CPU)
def test_equals_the_definition(name: str) -> None:
    inputs = case()
    assert torch.allclose(IMPLEMENTATIONS[name](*inputs), by_definition(*inputs), atol=1e-12)


@pytest.mark.parametrize("name", ON_CPU)
def test_gradients(name: str) -> None:
    value, shapes, locations, weights = (
        x.requires_grad_() if isinstance(x, Tensor) else x for x in case(2, 1)
    )
    assert torch.autograd.gradcheck(
        lambda v, at, w: IMPLEMENTATIONS[name](v, shapes, at, w), (value, locations, weights)
    )


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_implementations_agree(name: str, dtype: torch.dtype, tolerance: float) -> None:
    with torch.inference_mode():  # it is called wherever an implementation is first wanted
        assert difference_to_exact(IMPLEMENTATIONS[name], CPU, dtype) < tolerance


def test_a_large_case_is_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seg_app.models.deformable.bags._ROWS_AT_ONCE", 11)  # 2 heads: 10 rows at a time
    assert difference_to_exact(IMPLEMENTATIONS["bags"], CPU, torch.float64) < 1e-12


def test_points_far_outside_and_not_finite_ones() -> None:
    value, shapes, locations, weights = case()
    locations[0, 0] = 1e30
    locations[0, 1] = -math.inf
    locations[0, 2] = math.nan
    out = deformable_attention(value, shapes, locations, weights)
    assert (out[0, :2] == 0).all()
    assert out[0, 2].isnan().all()
    assert out[0, 3:].isfinite().all() and out[1].isfinite().all()


def test_zero_offsets_and_equal_weights_average_the_levels_bilinearly() -> None:
    """With start values every head looks 1..4 cells away; without offsets, from a cell's centre, it sees the cell."""
    layer = MSDeformAttn(d_model=4, n_levels=2, n_heads=2, n_points=4)
    torch.nn.init.zeros_(layer.sampling_offsets.bias)
    for linear in (layer.value_proj, layer.output_proj):
        linear.weight.data.copy_(torch.eye(4))
    shapes = ((2, 2), (1, 1))
    memory = torch.arange(20.0).view(1, 5, 4)
    out = layer(torch.randn(1, 5, 4), cell_centres(shapes, CPU, torch.float32), memory, shapes)
    fine, coarse = memory[:, :4], memory[:, 4:]
    # The coarse cell lies in the middle of the four fine ones. From a fine cell's centre, the coarse map (one cell and
    # zeros around it) is read at 1/4 cell from its centre on both axes: 9/16 of its value.
    assert torch.allclose(out[:, :4], (fine + coarse * 9 / 16) / 2)
    assert torch.allclose(out[:, 4:], (fine.mean(1, keepdim=True) + coarse) / 2)


def test_half_precision_keeps_its_places() -> None:
    """On a map 400 cells wide, bfloat16 coordinates would be off by up to a cell."""
    columns = torch.arange(400.0)
    value = columns.view(1, 400, 1, 1)
    locations = ((columns + 0.5) / 400).view(1, 400, 1, 1, 1, 1)
    locations = torch.cat((locations, torch.full_like(locations, 0.5)), dim=-1)
    weights = torch.ones(1, 400, 1, 1, 1, dtype=torch.bfloat16)
    out = deformable_attention(value.bfloat16(), [(1, 400)], locations, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.flatten(), columns.bfloat16())


def test_training_after_inference_mode_at_the_same_size() -> None:
    """What is kept per size must not be inference tensors, which no backward pass takes."""
    layer, shapes = MSDeformAttn(8, 2, 2, 2), ((2, 3), (1, 2))

    def run() -> Tensor:
        return layer(
            torch.randn(1, 8, 8), cell_centres(shapes, CPU, torch.float32), torch.randn(1, 8, 8), shapes
        )

    with torch.inference_mode():
        run()
    run().sum().backward()
    assert layer.sampling_offsets.weight.grad is not None


def test_wrong_shapes_are_named() -> None:
    value, _, locations, weights = case()
    with pytest.raises(ValueError, match="20 cells"):
        deformable_attention(value, [(3, 5), (2, 2), (2, 1)], locations, weights)
    with pytest.raises(ValueError, match="3 heads"):
        MSDeformAttn(d_model=16, n_heads=3)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (CPU build of torch)"
)
def test_triton_kernel_in_its_interpreter() -> None:
    """Forward and backward, on CPU: TRITON_INTERPRET must be set before Triton is imported."""
    code = """
import torch
from seg_app.models.deformable.dispatch import attend_by_triton, difference_to_exact
for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
    error = difference_to_exact(attend_by_triton, torch.device("cpu"), dtype)
    assert error < tolerance, (dtype, error)
value, weights = torch.ones(1, 6, 1, 3), torch.ones(1, 3, 1, 1, 1)
places = torch.tensor([[torch.nan, 0.5], [1e30, -torch.inf], [0.5, 0.5]]).view(1, 3, 1, 1, 1, 2)
out = attend_by_triton(value, [(2, 3)], places, weights)[0, :, 0].tolist()
assert out[0] != out[0] and out[1:] == [0.0, 1.0], out
nothing = places[:, :0].requires_grad_()
empty = attend_by_triton(value, [(2, 3)], nothing, weights[:, :0])
empty.sum().backward()
assert empty.shape == (1, 0, 3) and nothing.grad.shape == nothing.shape
print("agrees")
"""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "agrees", done.stderr


def test_without_a_working_triton_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._triton_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert implementation_for(torch.device("cuda", 0), torch.float32) == "grid_sample"
        assert implementation_for(torch.device("cuda", 0), torch.float32) == "grid_sample"
    dispatch._triton_works.cache_clear()
    assert len(caplog.records) == 1 and "grid_sample, since" in caplog.text


def test_choice_per_device() -> None:
    assert implementation_for(CPU, torch.float32) == "bags"
    assert implementation_for(CPU, torch.bfloat16) == "grid_sample"
    assert implementation_for(torch.device("mps"), torch.float32) == "grid_sample"
