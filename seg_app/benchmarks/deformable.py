"""Deformable attention: the implementation that the device gets, against the exact one in plain PyTorch.

    python -m d2_frozen.bench deformable [--sizes 1024] [--batches 2 8] [--dtypes fp32 bf16] [--json FILE]

As the pixel decoder calls it: every cell of the maps at strides 32, 16 and 8 looks at 4 points per map, with 8 heads of
width 32. On CUDA it is the Triton kernel that is measured, on CPU the sparse matrix, always against grid_sample.
Results and gradients must agree, else nothing is reported.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from d2_frozen.benchmarks.measuring import Clock, Seconds, alternate, machine_facts, with_ratio, write_json
from seg_app.models.deformable import IMPLEMENTATIONS, cell_centres, implementation_for

EXACT = "grid_sample"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference to the exact result in float32, relative to its largest number.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-3}
_STRIDES = (32, 16, 8)
_HEADS, _WIDTH, _POINTS = 8, 32, 4
_PHASES = ("forward", "backward", "both")
_OF = ("result", "to values", "to locations", "to weights")


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench deformable",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="sides of square images, pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8], help="images at a time")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10, help="measured runs of each")
    parser.add_argument("--warmup", type=int, default=2, help="runs of each before measuring")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    result: dict[str, Any] = {"machine": machine_facts(), "device": str(device), "cases": []}
    print("  ".join(f"{k}: {v}" for k, v in result["machine"].items()))
    for size in args.sizes:
        for batch in args.batches:
            for dtype in args.dtypes:
                found = compare(size, batch, dtype, device, args.rounds, args.warmup)
                result["cases"].append(found)
    print(report(result["cases"]))
    write_json(result, args.json)
    return result


def compare(
    size: int, batch: int, dtype: str, device: torch.device, rounds: int, warmup: int
) -> dict[str, Any]:
    """One case, in turns.

    Raises:
        RuntimeError: the device has no implementation but the exact one, or the two disagree.
    """
    own = implementation_for(device, DTYPES[dtype])
    if own == EXACT:
        raise RuntimeError(
            f"on {device} in {dtype} the exact implementation runs, so there is nothing to compare; the warning above "
            "says why no other one does, if one could."
        )
    shapes = tuple((math.ceil(size / stride),) * 2 for stride in _STRIDES)
    inputs, outer = _case(shapes, batch, DTYPES[dtype], device)
    case = {"size": size, "batch": batch, "dtype": dtype}
    differences = _differences(own, shapes, inputs, outer)
    for name, difference in differences.items():
        if not difference <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{case}: {own} differs from {EXACT} by {difference:.2g} of the largest number ({name}; "
                f"{TOLERANCE[dtype]} is allowed), so their times cannot be compared."
            )
    now = Clock()
    names = (own, EXACT)
    measured = alternate({n: _turn(n, shapes, inputs, outer, now) for n in names}, rounds, warmup)
    memory = {n: _extra_memory(n, shapes, inputs, outer) for n in names} if device.type == "cuda" else {}
    return {**case, "differences": differences, "seconds": with_ratio(measured), "extra memory MiB": memory}


def report(cases: Sequence[dict[str, Any]]) -> str:
    """Milliseconds and ratios of all cases as a table."""
    rows = []
    for case in cases:
        own, exact, ratio = case["seconds"]
        difference = max(case["differences"].values())
        for name in (own, exact, ratio):
            scale, digits = (1, 2) if name == ratio else (1000, 3)
            cells = [f"{scale * case['seconds'][name][phase]:.{digits}f}" for phase in _PHASES]
            memory = case["extra memory MiB"].get(name)
            rows.append(
                [
                    f"{case['size']} px, batch {case['batch']}, {case['dtype']}" if name == own else "",
                    name,
                    *cells,
                    "" if memory is None else f"{memory:.0f}",
                    f"{difference:.1e}" if name == own else "",
                ]
            )
    headers = ["", "milliseconds", *_PHASES, "memory, MiB", "largest difference"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _case(
    shapes: tuple[tuple[int, int], ...], batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(values, locations, weights), and the gradient that comes back to the result.

    Locations are float32 in any case, as in the network. They lie some cells around each cell's centre, at odd
    multiples of 1/128 cell: on the border of two cells their gradient jumps, and rounding must not choose the side.
    """
    numbers = torch.Generator(device).manual_seed(0)

    def draw(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=numbers, device=device)

    cells, levels = sum(h * w for h, w in shapes), len(shapes)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=device)[:, None]
    centres = cell_centres(shapes, device, torch.float32)[:, :, None, :, None] * sizes  # (1, Lq, 1, L, 1, 2)
    places = centres + 3 * draw(batch, cells, _HEADS, levels, _POINTS, 2)
    locations = ((places * 64).floor() / 64 + 1 / 128) / sizes
    weights = draw(batch, cells, _HEADS, levels * _POINTS).softmax(-1).unflatten(-1, (levels, _POINTS))
    value = draw(batch, cells, _HEADS, _WIDTH)
    outer = draw(batch, cells, _HEADS * _WIDTH).to(dtype)
    inputs = (value.to(dtype), locations, weights.to(dtype))
    return inputs, outer


def _run(
    name: str, shapes: Any, inputs: Sequence[Tensor], outer: Tensor, now: Callable[[], float]
) -> tuple[list[Tensor], Seconds]:
    """Result and gradients, and how long each way took."""
    value, locations, weights = leaves = [x.detach().requires_grad_() for x in inputs]
    start = now()
    out = IMPLEMENTATIONS[name](value, shapes, locations, weights)
    forwarded = now()
    gradients = torch.autograd.grad(out, leaves, outer)
    end = now()
    seconds = {"forward": forwarded - start, "backward": end - forwarded, "both": end - start}
    return [out.detach(), *gradients], seconds


def _turn(
    name: str, shapes: Any, inputs: Sequence[Tensor], outer: Tensor, now: Callable[[], float]
) -> Callable[[], Seconds]:
    return lambda: _run(name, shapes, inputs, outer, now)[1]


def _differences(own: str, shapes: Any, inputs: Sequence[Tensor], outer: Tensor) -> dict[str, float]:
    """Largest difference to the exact computation in float32 over its largest number, of the result and gradients."""
    found, _ = _run(own, shapes, inputs, outer, Clock())
    exact, _ = _run(EXACT, shapes, [x.float() for x in inputs], outer.float(), Clock())
    return {name: float((a.float() - b).abs().max() / b.abs().max()) for name, a, b in zip(_OF, found, exact)}


def _extra_memory(name: str, shapes: Any, inputs: Sequence[Tensor], outer: Tensor) -> float:
    """MiB at the peak of a run on CUDA, without the inputs."""
    device = outer.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _run(name, shapes, inputs, outer, Clock())
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
