"""One engine in a process of its own: does a named task when told to, and says how long it took.

A task is made once from the settings, and then run turn by turn. Both engines run this same file; what makes them
comparable is that weights, inputs and draws are functions of the seed, and that each run also returns numbers to
compare ("check"). ``TASKS`` is the list; engines.py says in which order they are measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import d2_frozen
from d2_frozen.benchmarks.evaluation import evaluation_task
from d2_frozen.benchmarks.measuring import Clock, Run, Task
from d2_frozen.data.generated import generated_batch
from d2_frozen.engine.hooks import peak_memory_mib
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

_SEED = 0
_SHARPNESS = 30.0


def build_task(settings: dict[str, Any], now: Clock) -> Task:
    """Build the model from its config; no weights are loaded."""
    cfg = _config(settings)

    def run(turn: int) -> Run:
        torch.manual_seed(_SEED)
        start = now()
        model = build_model(cfg)
        seconds = now() - start
        total = sum(p.detach().double().abs().sum().item() for p in model.parameters())
        return Run({"build": seconds}, {"sum of absolute weights": total})

    return run


def training_task(settings: dict[str, Any], now: Clock) -> Task:
    """One step of SGD on a generated batch."""
    cfg = _config(settings)
    model = _calm_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    batch = generated_batch(settings["size"], settings["batch"], cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    def run(turn: int) -> Run:
        torch.manual_seed(_SEED + turn)  # for the draws of anchors and proposals
        start = now()
        with EventStorage():
            losses = model(batch)
        forwarded = now()
        optimizer.zero_grad()
        sum(losses.values()).backward()
        gone_back = now()
        optimizer.step()
        end = now()
        seconds = {
            "forward": forwarded - start,
            "backward": gone_back - forwarded,
            "update": end - gone_back,
            "step": end - start,
        }
        # After an update rounding grows, so that only the first step can be compared number by number.
        check = {name: loss.item() for name, loss in losses.items()} if turn == 0 else {}
        return Run(seconds, check)

    return run


def inference_task(settings: dict[str, Any], now: Clock) -> Task:
    """Detections of one generated image at a time, masks pasted."""
    cfg = _config(settings)
    model = _calm_model(cfg).eval()
    # An untrained classifier is sure of nothing, and nothing would pass the score threshold. Sharpened, it finds
    # the full number of objects per image.
    with torch.no_grad():
        model.get_parameter("roi_heads.box_predictor.cls_score.weight").mul_(_SHARPNESS)
    batch = generated_batch(settings["size"], settings["batch"], cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    def run(turn: int) -> Run:
        one = {**batch[turn % len(batch)]}
        del one["instances"]
        start = now()
        with torch.no_grad():
            found = model([one])[0]["instances"]
        seconds = now() - start
        check = {"detections": float(len(found)), "sum of scores": found.scores.double().sum().item()}
        return Run({"image": seconds}, check)

    return run


def frozen_step_task(settings: dict[str, Any], now: Clock) -> Task:
    """A step of ``bench step``, of the subject in the settings."""
    from d2_frozen.benchmarks.step import Subject
    from d2_frozen.engine.allocator import keep_freed_memory

    if not torch.cuda.is_available():
        keep_freed_memory()  # as train_net.py does
    one = Subject(settings["subject"], settings, now)
    return lambda turn: Run(one.step(), {})


TASKS: dict[str, Callable[[dict[str, Any], Clock], Task]] = {
    "build": build_task,
    "training step": training_task,
    "inference": inference_task,
    "evaluation": evaluation_task,
    "frozen step": frozen_step_task,
}


def main() -> None:
    """Read {"task", "turn"} lines, answer each with a line; settings are the only argument, as JSON."""
    # Libraries may print: what they write goes to stderr, so that only answers are on the real stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    now = Clock(settings["cpu_time"])
    answers.write(json.dumps({"engine": d2_frozen.engine_name()}) + "\n")
    tasks: dict[str, Task] = {}
    for line in sys.stdin:
        order = json.loads(line)
        name = order["task"]
        if name not in tasks:
            tasks.clear()  # one task in memory at a time
            tasks[name] = TASKS[name](settings, now)
        seconds, check = tasks[name](order["turn"])
        answers.write(json.dumps({"seconds": seconds, "check": check, "peak MiB": peak_memory_mib()}) + "\n")


def _config(settings: dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(settings["config"])
    cfg.merge_from_list(settings["options"])
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.PIXEL_STD = [57.0] * len(cfg.MODEL.PIXEL_MEAN)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _calm_model(cfg: CfgNode) -> nn.Module:
    """A seeded model whose activations stay about 1, as those of a trained one do.

    Fixed batch norm does not normalise before weights are loaded: over fifty layers the maps grow by orders of
    magnitude, and the work of a step (proposals, detections) would be that of no real model.
    """
    torch.manual_seed(_SEED)
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.2)
    return model


if __name__ == "__main__":
    main()
