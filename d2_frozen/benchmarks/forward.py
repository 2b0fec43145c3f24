"""How fast is the frozen forward, mode by mode, against the network as timm runs it, and how exact is it?

    python -m d2_frozen.bench forward [--name swinv2_base_window8_256] [--size 512] [--batch 1] [--modes MODE ...]
        [--profile]

Modes: ``timm`` and a precision (timm's network as it is), ``autocast`` and a precision (the same under torch.autocast,
as Detectron2's AMP runs it), or a precision alone (MODEL.FROZEN.PRECISION); ``+compile`` behind it compiles.
Random weights, but for those that start at 0, and images of noise. On a GPU also the share of the measured peak rates.
``--profile`` says what the time of each mode goes to, by torch's profiler: matrix products, attention, norms, copies,
and the rates that they reach. On a GPU these are seconds of kernels, whose sum is less than the forward's where the GPU
waits for Python; on a CPU the forward's seconds, by the profiler's shares (it slows small operators down).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from d2_frozen.backbone import FrozenBackbone, PlainViT, TimmBackbone, create_timm_backbone
from d2_frozen.backbone.fast import EIGHT_BITS, PRECISIONS
from d2_frozen.benchmarks.measuring import Clock, Seconds, alternate, machine_facts, write_json
from d2_frozen.benchmarks.profiling import NORM, Share, flops_by_kind, least_traffic, time_by_kind

DEFAULT_MODES = ("timm-fp32", "autocast-bf16", "timm-bf16", "fp32", "bf16")
Maps = dict[str, Tensor]


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what ``--json`` writes."""
    args = _parser().parse_args(arguments)
    result = compare(
        args.name, args.size, args.batch, args.modes, args.rounds, args.warmup, args.cpu_time, args.profile
    )
    print(report(result))
    write_json(result, args.json)
    return result


def compare(
    name: str,
    size: int,
    batch: int,
    modes: list[str],
    rounds: int,
    warmup: int,
    cpu_time: bool = False,
    profile: bool = False,
) -> dict[str, Any]:
    """Seconds, error and GPU memory of each mode; a mode that fails is reported with its error, the others go on."""
    for mode in modes:
        _parts_of(mode)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = lively_backbone(name).to(device)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        truth = backbone(images)
    work = flops_by_kind(backbone, images)
    flops = sum(work.values())
    now = Clock(cpu_time)
    subjects: dict[str, Callable[[], Seconds]] = {}
    runs: dict[str, Callable[[], Maps]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for mode in modes:
        run = _runner(mode, backbone)
        started = time.perf_counter()
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            maps = run(images)
            run(images)  # the second batch of a size may be recorded
            facts[mode] = {
                "error": relative_errors(maps, truth),
                "first two s": time.perf_counter() - started,
            }
            if device.type == "cuda":
                facts[mode]["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        except Exception as reason:  # one mode that a machine cannot run must not hide the others
            facts[mode] = {
                "failed": f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:200]}"
            }
            continue
        finally:  # compiling may take long, and a run may be stopped
            print(
                f"{mode}: first forwards took {time.perf_counter() - started:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        runs[mode] = partial(run, images)
        subjects[mode] = _timed(runs[mode], now)
    for mode, seconds in alternate(subjects, rounds, warmup).items():
        facts[mode]["seconds"] = seconds["forward"]
        facts[mode]["TFLOP/s"] = flops / seconds["forward"] / 1e12
    result = {"machine": machine_facts(), "name": name, "size": size, "batch": batch, "TFLOP": flops / 1e12}
    result["unit"] = "CPU seconds" if cpu_time else "seconds"
    result["modes"] = facts
    traffic = {mode: least_traffic(run_of, images) for mode, run_of in _swin_modes(modes, backbone)}
    if device.type == "cuda":
        result["peaks"] = measured_peaks(device)
        result["GB"] = {mode: sum(by_kind.values()) / 1e9 for mode, by_kind in traffic.items()}
    if profile:
        result["profile"] = {
            mode: _profiled(
                time_by_kind(run, device),
                # On a CPU the profiler takes part of the time, and counts that of other programs on the same core.
                None if device.type == "cuda" else facts[mode]["seconds"],
                work,
                None if _parts_of(mode).family else traffic.get(mode, {}),
            )
            for mode, run in runs.items()
        }
    return result


def report(result: dict[str, Any]) -> str:
    """The result as a table a person reads."""
    head = f"{result['name']}  {result['batch']} x {result['size']} px  {result['TFLOP']:.2f} TFLOP  "
    head += "  ".join(f"{k}: {v}" for k, v in result["machine"].items())
    first = next((m["seconds"] for m in result["modes"].values() if "seconds" in m), float("nan"))
    rows = []
    for mode, one in result["modes"].items():
        if "failed" in one:
            rows.append([mode, one["failed"]])
            continue
        error = " ".join(f"{e:.1e}" for e in one["error"].values())
        row = [mode, f"{one['seconds']:.4f}", f"{one['seconds'] / first:.3f}", error, f"{one['TFLOP/s']:.2f}"]
        if "peaks" in result:
            peaks = result["peaks"]
            precision = _parts_of(mode).precision
            share = one["TFLOP/s"] / peaks[f"{'bf16' if precision in EIGHT_BITS else precision} TFLOP/s"]
            rate = result["GB"].get(mode, float("nan")) / one["seconds"]
            row += [f"{share:.2f}", f"{rate:.0f}", f"{rate / peaks['GB/s']:.2f}", f"{one['peak MiB']:.0f}"]
        rows.append(row)
    names = [result["unit"], "ratio", "error of " + ", ".join(next(iter(_errors(result)), {})), "TFLOP/s"]
    if "peaks" in result:
        names += ["of matmul", "GB/s (least)", "of copy", "peak MiB"]
        head += "\npeaks: " + "  ".join(f"{k}: {v:.0f}" for k, v in result["peaks"].items())
    tables = [head + "\n" + tabulate(rows, headers=["forward", *names], disable_numparse=True)]
    for mode, kinds in result.get("profile", {}).items():
        tables.append(_profile_table(mode, kinds))
    return "\n\n".join(tables)


def _profiled(
    found: dict[str, Share], forward: float | None, flops: dict[str, int], traffic: dict[str, float] | None
) -> dict[str, dict[str, Any]]:
    """Kind of work -> seconds, calls, share, name of the largest, and where it is known TFLOP/s and GB/s.

    Args:
        forward: seconds of a forward that the kinds share; None where theirs count as they are.
        traffic: bytes by kind; None where the kinds are not told apart: timm's attention is matrix products too.
    """
    whole = sum(share.seconds for share in found.values())
    result: dict[str, dict[str, Any]] = {}
    for kind, share in found.items():
        seconds = share.seconds if forward is None else share.seconds / whole * forward
        result[kind] = {**share._asdict(), "seconds": seconds, "share": share.seconds / whole}
        if traffic is not None and flops.get(kind):
            result[kind]["TFLOP/s"] = flops[kind] / seconds / 1e12
        # The bytes of norms have the residual in them, which only our kernel adds in the same place.
        if traffic is not None and kind in traffic and (kind != NORM or "normalised" in share.largest):
            result[kind]["GB/s (least)"] = traffic[kind] / seconds / 1e9
    return result


def _profile_table(mode: str, kinds: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            kind,
            f"{1000 * one['seconds']:.2f}",
            f"{one['share']:.2f}",
            f"{one['calls']:.0f}",
            *(f"{one[rate]:.3g}" if rate in one else "" for rate in ("TFLOP/s", "GB/s (least)")),
            one["largest"][:60],
        ]
        for kind, one in kinds.items()
    ]
    rows.append(["all", f"{1000 * sum(one['seconds'] for one in kinds.values()):.2f}", "1.00"])
    headers = [f"profile of {mode}", "ms", "share", "calls", "TFLOP/s", "GB/s (least)", "the largest"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def lively_backbone(name: str) -> TimmBackbone | PlainViT:
    """A network with random weights, none of which switches a branch off as SwinV2's start does."""
    torch.manual_seed(0)
    backbone = create_timm_backbone(name).eval().requires_grad_(False)
    assert isinstance(backbone, TimmBackbone | PlainViT)
    for key, tensor in backbone.named_parameters():
        if key.endswith(("norm1.weight", "norm2.weight", "gamma")):
            tensor.uniform_(0.1, 0.3)
        elif key.endswith("logit_scale"):
            tensor.uniform_(2.3, 4.0)
    return backbone


def relative_errors(maps: Maps, truth: Maps) -> Seconds:
    """Norm of the difference over norm of the map, by feature."""
    return {k: ((maps[k].float() - t).norm() / t.norm()).item() for k, t in truth.items()}


def measured_peaks(device: torch.device) -> dict[str, float]:
    """What this GPU reaches: TFLOP/s of a matmul of 8192 x 8192, GB/s of a copy (read and write)."""
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        a = torch.randn(8192, 8192, device=device, dtype=PRECISIONS[precision])
        found[f"{precision} TFLOP/s"] = 2 * 8192**3 / _best(partial(torch.matmul, a, a)) / 1e12
    block = torch.empty(2**29, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    found["GB/s"] = 2 * block.numel() / _best(lambda: other.copy_(block)) / 1e9
    return found


def _best(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of ten calls."""
    now, times = Clock(), []
    for _ in range(12):
        start = now()
        function()
        times.append(now() - start)
    return min(times[2:])


def _swin_modes(modes: list[str], backbone: TimmBackbone | PlainViT) -> list[tuple[str, FrozenBackbone]]:
    if not hasattr(backbone.network, "layers") or not hasattr(backbone.network.layers[0], "blocks"):
        return []
    if not hasattr(backbone.network.layers[0].blocks[0], "window_size"):
        return []
    return [(mode, FrozenBackbone(backbone, _parts_of(mode).precision)) for mode in modes]


class _Mode(NamedTuple):
    family: str  # "timm", "autocast", or "" for this project's forward
    precision: str
    compiled: bool


def _parts_of(mode: str) -> _Mode:
    """Raises: ValueError: there is no such mode."""
    kind, plus, addition = mode.partition("+")
    family, _, precision = kind.rpartition("-")
    known = {"": tuple(PRECISIONS), "timm": ("fp32", "bf16", "fp16"), "autocast": ("bf16", "fp16")}
    fits = precision in known.get(family, ()) and addition == ("compile" if plus else "")
    if not fits or (family == "autocast" and plus):
        raise ValueError(
            f"there is no mode {mode!r}; modes are {', '.join(PRECISIONS)}, and of timm's network as it is "
            + ", ".join(f"{f}-{p}" for f, of in known.items() if f for p in of)
            + ". All but autocast may have +compile behind them."
        )
    return _Mode(family, precision, bool(plus))


def _runner(mode: str, backbone: TimmBackbone | PlainViT) -> Callable[[Tensor], Maps]:
    family, precision, compiled = _parts_of(mode)
    if not family:
        return FrozenBackbone(backbone, precision, compile=compiled)
    dtype = PRECISIONS[precision]
    if family == "timm":
        network: Any = backbone if dtype == torch.float32 else copy.deepcopy(backbone).to(dtype)
        call = torch.compile(network) if compiled else network

        def run(images: Tensor) -> Maps:
            with torch.no_grad():
                return call(images.to(dtype))

        return run

    def run_autocast(images: Tensor) -> Maps:
        with torch.no_grad(), torch.autocast(images.device.type, dtype=dtype):
            return backbone(images)

    return run_autocast


def _timed(run: Callable[[], Maps], now: Clock) -> Callable[[], Seconds]:
    def once() -> Seconds:
        start = now()
        run()
        return {"forward": now() - start}

    return once


def _errors(result: dict[str, Any]) -> list[Seconds]:
    return [one["error"] for one in result["modes"].values() if "error" in one]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench forward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", default="swinv2_base_window8_256", help="timm's name of the network")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--modes", nargs="+", default=list(DEFAULT_MODES), help="the first is 1.00")
    parser.add_argument("--rounds", type=int, default=10, help="measured forwards of each")
    parser.add_argument("--warmup", type=int, default=2, help="forwards of each before measuring")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds instead of the clock")
    parser.add_argument("--profile", action="store_true", help="also what the time of each mode goes to")
    parser.add_argument("--json", help="also write the result to this file")
    return parser
