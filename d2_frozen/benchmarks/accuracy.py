"""What does each mode of the frozen forward do to a trained head: error of the maps, and AP, mIoU or top-1?

    python -m d2_frozen.bench accuracy --config-file output/config.yaml [--modes fp32 bf16 ...] [--json FILE] \\
        MODEL.WEIGHTS output/model_final.pth [KEY VALUE ...]

Evaluates the head on DATASETS.TEST once in each mode, as ``train_net.py --eval-only`` does, for every task. A mode is a
value of MODEL.FROZEN.PRECISION; ``+compile`` behind it is MODEL.FROZEN.COMPILE. The error of a map is against
the network as it is, in float32: norm of the difference over norm of the map, over the first batches of the data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from d2_frozen import tasks
from d2_frozen.backbone import PRECISIONS, FrozenBackbone, frozen_parts
from d2_frozen.benchmarks.arguments import parse_with_lists
from d2_frozen.benchmarks.measuring import machine_facts, write_json
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.train_net import evaluate, evaluation_model, read_config
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

DEFAULT_MODES = ("fp32", "fp32+compile", "bf16", "bf16+compile", "fp16", "fp16+compile", "int8")
# Of the metrics of a task the one that a table has room for; --json has all.
_HEADLINES = ("AP", "mIoU", "top1")


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what ``--json`` writes."""
    args = parse_with_lists(_parser(), arguments, modes=_no_key)
    if not torch.cuda.is_available():
        keep_freed_memory()  # as train_net.py does
    result = compare(args.config_file, args.opts, args.modes, args.batches)
    print(report(result))
    write_json(result, args.json)
    return result


def compare(config_file: str, options: list[str], modes: list[str], batches: int) -> dict[str, Any]:
    """Errors and metrics of each mode; a mode that does not run here is reported with the reason, the others go on.

    Args:
        batches: how many enter the errors of the maps. All of DATASETS.TEST enters the metrics.
    Raises:
        ValueError: no weights, no test data, an unknown mode, or a model without a frozen part.
    """
    with tempfile.TemporaryDirectory() as folder:  # the results of the training itself stay as they are
        cfg = _config(config_file, options, folder)
        for mode in modes:
            _with_mode(cfg, mode)
        exact = _frozen_part(_model(cfg, "fp32"), cfg)
        found: dict[str, dict[str, Any]] = {}
        for mode in modes:
            started = time.perf_counter()
            try:
                found[mode] = _measured(cfg, mode, exact, batches)
            except RuntimeError as reason:  # no torchao, no compiler, no such GPU
                found[mode] = {
                    "failed": f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:300]}"
                }
            print(f"{mode}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "machine": machine_facts(),
        "config": config_file,
        "options": options,
        "backbone": exact.fingerprint(),
        "datasets": list(cfg.DATASETS.TEST),
        "batches of the errors": batches,
        "modes": found,
    }


def report(result: dict[str, Any]) -> str:
    """The result as a table a person reads; changes are against the first mode that ran."""
    head = f"{result['config']} {' '.join(result['options'])}\n{result['backbone']['name']} on "
    head += f"{', '.join(result['datasets'])}  " + "  ".join(
        f"{k}: {v}" for k, v in result["machine"].items()
    )
    ran = {mode: one for mode, one in result["modes"].items() if "failed" not in one}
    first: dict[str, Any] = next(iter(ran.values()), {"error": {}, "metrics": {}})
    shown = [name for name in first["metrics"] if name.split("/")[-1] in _HEADLINES]
    rows = []
    for mode, one in result["modes"].items():
        if "failed" in one:
            rows.append([mode, "does not run here"])
            continue
        row = [mode, " ".join(f"{error:.1e}" for error in one["error"].values())]
        for name in shown:
            value = one["metrics"].get(name, float("nan"))
            row += [f"{value:.2f}", f"{value - first['metrics'][name]:+.2f}"]
        rows.append(row)
    columns = [column for name in shown for column in (name, "change")]
    table = tabulate(
        rows, headers=["mode", f"error of {', '.join(first['error'])}", *columns], disable_numparse=True
    )
    failed = [f"{mode}: {one['failed']}" for mode, one in result["modes"].items() if "failed" in one]
    return "\n".join([head, table, *failed])


def _config(config_file: str, options: list[str], folder: str) -> CfgNode:
    cfg = read_config(config_file, options)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("Which head? Give MODEL.WEIGHTS output/model_final.pth behind the flags.")
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: there is nothing to evaluate on.")
    cfg.OUTPUT_DIR = folder
    cfg.MODEL.FROZEN.CACHE.DIR = ""  # features are computed, in the precision of the mode
    tasks.task_of(cfg).prepare_datasets(cfg, train=False)
    return cfg


def _with_mode(cfg: CfgNode, mode: str) -> CfgNode:
    precision, _, compiled = mode.partition("+")
    if precision not in PRECISIONS or compiled not in ("", "compile"):
        raise ValueError(f"mode {mode!r} is none of {', '.join(PRECISIONS)}, nor one of them with +compile.")
    cfg = cfg.clone()
    cfg.MODEL.FROZEN.PRECISION, cfg.MODEL.FROZEN.COMPILE = precision, bool(compiled)
    cfg.freeze()
    return cfg


def _model(cfg: CfgNode, mode: str) -> Any:
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED)  # a backbone of random weights is that of training again
    return evaluation_model(_with_mode(cfg, mode))


def _frozen_part(model: Any, cfg: CfgNode) -> FrozenBackbone:
    parts = list(frozen_parts(model).values())
    if len(parts) != 1:
        raise ValueError(
            f"the model has {len(parts)} frozen backbones, and must have one: MODEL.BACKBONE.FREEZE is "
            f"{cfg.MODEL.BACKBONE.FREEZE!r}; set it to 'all'."
        )
    return parts[0]


def _measured(cfg: CfgNode, mode: str, exact: FrozenBackbone, batches: int) -> dict[str, Any]:
    """{"error": {map: relative error}, "metrics": {"bbox/AP": ...}} of one evaluation."""
    model = _model(cfg, mode)
    difference: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    left = batches

    def compare_maps(_module: Any, inputs: tuple, maps: dict[str, Tensor]) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            with torch.no_grad():
                truth = exact.inner(inputs[0].float())
            for name, feature in truth.items():
                difference[name] += (maps[name].double() - feature.double()).square().sum().item()
                size[name] += feature.double().square().sum().item()

    handle = _frozen_part(model, cfg).register_forward_hook(compare_maps)
    try:
        metrics = _flat(evaluate(_with_mode(cfg, mode), model))
    finally:
        handle.remove()
    return {"error": {name: (difference[name] / size[name]) ** 0.5 for name in size}, "metrics": metrics}


def _flat(results: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"bbox": {"AP": 1.0}} -> {"bbox/AP": 1.0}."""
    flat: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = float(value)
    return flat


def _no_key(text: str) -> str:
    if text.isupper():
        raise ValueError(text)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="of the head: config.yaml of its OUTPUT_DIR")
    parser.add_argument(
        "--modes", nargs="+", default=list(DEFAULT_MODES), help="changes of a metric are against the first"
    )
    parser.add_argument("--batches", type=int, default=8, help="how many enter the errors of the maps")
    parser.add_argument("--json", help="also write the result to this file, with all metrics")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config options: MODEL.WEIGHTS FILE KEY VALUE ..."
    )
    return parser
