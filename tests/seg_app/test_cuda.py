"""On a CUDA device: the Triton kernel against the exact computation, what chooses it, training, inference."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2_frozen.train_net import main, setup
from seg_app.models.deformable import IMPLEMENTATIONS, deformable_attention, dispatch, implementation_for
from seg_app.trainer import SegmentationTrainer

pytestmark = pytest.mark.gpu
Flags = Callable[..., Namespace]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32: 10 bits are too few to compare devices."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def case(B: int, Lq: int, M: int, D: int, shapes, P: int = 4) -> tuple[Tensor, ...]:
    """(values, locations, weights, gradient of the result), float64 on CPU; places at odd multiples of 1/128 cell."""
    numbers = torch.Generator().manual_seed(B + Lq + D)

    def draw(*dims: int) -> Tensor:
        return torch.rand(*dims, generator=numbers, dtype=torch.float64)

    L = len(shapes)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    cells = (draw(B, Lq, M, L, P, 2) * (sizes + 4) * 64).floor() / 64 - 2 + 1 / 128
    value = draw(B, sum(h * w for h, w in shapes), M, D) - 0.5
    return value, cells / sizes, draw(B, Lq, M, L, P) / 4, draw(B, Lq, M * D) - 0.5


def results(
    name: str, inputs: tuple[Tensor, ...], shapes, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    value, locations, weights, outer = inputs
    at_least_32 = torch.promote_types(dtype, torch.float32)
    leaves = [
        x.to(device, kind).requires_grad_()
        for x, kind in ((value, dtype), (locations, at_least_32), (weights, dtype))
    ]
    out = IMPLEMENTATIONS[name](leaves[0], shapes, leaves[1], leaves[2])
    gradients = torch.autograd.grad(out, leaves, outer.to(device, dtype))
    return [x.detach().cpu().double() for x in (out, *gradients)]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize(
    "B, Lq, M, D, shapes",
    [
        (2, 300, 8, 32, [(4, 8), (8, 16), (16, 32)]),  # as in the pixel decoder
        (1, 7, 3, 5, [(3, 1), (1, 1)]),  # odd widths, maps of one cell
        (3, 65, 1, 1, [(5, 7)]),
        (1, 1, 2, 130, [(2, 2)]),  # one query, wide heads
    ],
)
def test_the_kernel_equals_the_exact_computation(B, Lq, M, D, shapes, dtype, tolerance, device) -> None:
    """Result and the three gradients, relative to the largest number."""
    inputs = case(B, Lq, M, D, shapes)
    inputs = (
        inputs[0].to(dtype).double(),
        inputs[1],
        inputs[2].to(dtype).double(),
        inputs[3].to(dtype).double(),
    )
    exact = results("grid_sample", inputs, shapes, torch.device("cpu"), torch.float64)
    found = results("triton", inputs, shapes, device, dtype)
    for a, b in zip(found, exact):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def test_inputs_that_are_not_contiguous_and_a_gradient_that_is_expanded(device: torch.device) -> None:
    shapes = [(3, 4), (2, 2)]
    value, locations, weights, _ = (x.to(device) for x in case(2, 9, 2, 6, shapes))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, locations, weights)]
    assert not any(x.is_contiguous() for x in strided)
    answers = []
    for v, at, w in ((value, locations, weights), strided):
        v = v.detach().requires_grad_()
        out = IMPLEMENTATIONS["triton"](v, shapes, at, w)
        answers.append((out, *torch.autograd.grad(out.sum(), v)))
    assert all(torch.allclose(a, b) for a, b in zip(*answers))


def test_no_queries_and_no_images(device: torch.device) -> None:
    shapes = [(2, 3)]
    for B, Lq in ((2, 0), (0, 5)):
        inputs = [x.to(device).requires_grad_() for x in case(B, Lq, 2, 4, shapes)[:3]]
        out = IMPLEMENTATIONS["triton"](inputs[0], shapes, inputs[1], inputs[2])
        assert out.shape == (B, Lq, 8)
        assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


def test_places_far_outside_read_zero_and_nan_stays_nan(device: torch.device) -> None:
    shapes = [(3, 5), (1, 1)]
    value, locations, weights, _ = (x.to(device, torch.float32) for x in case(1, 4, 2, 8, shapes))
    locations[0, 0], locations[0, 1], locations[0, 2] = 1e30, -torch.inf, torch.nan
    out = deformable_attention(value, shapes, locations, weights)
    assert (out[0, :2] == 0).all() and out[0, 2].isnan().all() and out[0, 3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_triton_is_chosen(dtype: torch.dtype, device: torch.device) -> None:
    pytest.importorskip("triton")
    dispatch._triton_works.cache_clear()
    with torch.inference_mode():  # what is found out here holds for training, too
        assert implementation_for(device, dtype) == "triton"


# With AMP the loss scale begins at 65536, and steps whose gradients overflow are left out until it has come down.
@pytest.mark.parametrize("amp, steps", [(False, 1), (True, 16)])
def test_training_and_evaluation(amp: bool, steps: int, flags: Flags) -> None:
    """The head moves, the backbone does not; then the whole command, with evaluation and pictures."""
    options = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", str(amp), "SOLVER.MAX_ITER", str(steps))
    cfg = setup(flags(*options))
    trainer = SegmentationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model = trainer.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(key.startswith("sem_seg_head.") for key in moved)
    assert all(value.isfinite().all() for value in after.values())
    assert 0 <= main(flags(*options, "OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_again"))["sem_seg"]["mIoU"] <= 100


@pytest.mark.usefixtures("exact_convolutions")
def test_inference_equals_that_of_the_cpu(flags: Flags, tmp_path: Path) -> None:
    cfg = setup(flags("OUTPUT_DIR", str(tmp_path / "out")))
    torch.manual_seed(0)
    model = SegmentationTrainer.build_model(cfg).eval()
    image = {"image": torch.randint(0, 256, (3, 75, 50), dtype=torch.uint8), "height": 90, "width": 61}
    with torch.no_grad():
        on_cpu = model([image])[0]["sem_seg"]
        on_gpu = model.cuda()([image])[0]["sem_seg"]
    assert on_gpu.is_cuda and on_gpu.shape == (len(on_cpu), 90, 61)
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=2e-3)
