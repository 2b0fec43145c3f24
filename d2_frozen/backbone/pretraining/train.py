"""Pretrain the small SwinV2 that ships with the project, on generated scenes.

    python -m d2_frozen.backbone.pretraining.train --out OUT --minutes 60
    torchrun --nproc-per-node 2 -m d2_frozen.backbone.pretraining.train --out OUT --minutes 60

Out: OUT/checkpoint.pth (to resume from), OUT/log.jsonl, OUT/backbone.safetensors (averaged weights, float16).
Formula-driven supervised learning: linear classifiers at every cell of every stage predict the cell's shape
class, texture class, part of the object, object size and colour, so that all four stages learn features that
a head can read off. The classifiers are thrown away.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn

from d2_frozen.backbone.pretraining.muon import Muon
from d2_frozen.backbone.pretraining.scenes import (
    IGNORE,
    NUM_PARTS,
    NUM_SHAPES,
    NUM_SIZES,
    NUM_TEXTURES,
    SceneGenerator,
)
from d2_frozen.backbone.swin_v2 import PICO_NAME
from d2_frozen.backbone.weights import save_weights
from d2_frozen.files import whole_file

STRIDES_PX = (4, 8, 16, 32)
COLOUR_LEVELS = 3
# What is classified at a cell: number of classes, weight in the loss.
TARGETS = {
    "object": (2, 1.0),  # ground or object
    "shape": (NUM_SHAPES, 0.5),
    "texture": (NUM_TEXTURES, 1.0),
    "part": (NUM_PARTS, 0.5),
    "size": (NUM_SIZES, 0.5),
    "colour": (COLOUR_LEVELS**3, 0.25),
}
READ_OUT_RATE = 0.25  # up to 256 inputs each: at the full rate one step moves a logit by about 1
POSITION_RATE = 0.02  # 512 inputs each, see look_at_neighbours
MUON_RATE = 2.0  # times --lr: its steps are bounded by the spectral norm, so they may be longer than AdamW's
# (rows, columns) from a cell to the one that a head looks at first: sides, corners, then the same two cells away.
NEIGHBOURS = [
    *((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)),
    *((0, 2), (2, 0), (0, -2), (-2, 0), (2, 2), (-2, -2), (2, -2), (-2, 2)),
]
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)


class CellClassifiers(nn.Module):
    """The backbone and, per stage, one linear layer on its raw features."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        outputs = sum(classes for classes, _ in TARGETS.values())
        self.read_out = nn.ModuleList(nn.Conv2d(c["num_chs"], outputs, 1) for c in backbone.feature_info)
        for layer in self.read_out:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and parts of it for the log.

        Args:
            images: (B, 3, S, S) uint8 RGB. labels: (B, 4, S, S) uint8 as in `Scene`.
        """
        pixels = (images.float() - MEAN.to(images.device)) / STD.to(images.device)
        maps = self.backbone.forward_intermediates(pixels, intermediates_only=True)
        total, log = pixels.new_zeros(()), {}
        for stride, read_out, feature in zip(STRIDES_PX, self.read_out, maps):
            targets = cell_targets(images, labels, stride)
            logits = read_out(feature).float().split([classes for classes, _ in TARGETS.values()], dim=1)
            for (name, (_, weight)), logit in zip(TARGETS.items(), logits):
                loss = F.cross_entropy(logit, targets[name], ignore_index=IGNORE, label_smoothing=0.05)
                total = total + weight * loss
                log[f"{name}/{stride}"] = accuracy(logit, targets[name])
        return total, log


def cell_targets(images: Tensor, labels: Tensor, stride: int) -> dict[str, Tensor]:
    """Class at the centre pixel of each cell, (B, S/stride, S/stride) int64; colour is the cell's mean."""
    centre = labels[:, :, stride // 2 :: stride, stride // 2 :: stride].long()
    targets = dict(zip(("shape", "texture", "part", "size"), centre.unbind(1)))
    targets["object"] = (targets["shape"] > 0).long()
    targets["shape"] = torch.where(targets["shape"] > 0, targets["shape"] - 1, IGNORE)
    mean = F.avg_pool2d(images.float(), stride)
    level = (mean * (COLOUR_LEVELS / 256)).long()
    targets["colour"] = (level[:, 0] * COLOUR_LEVELS + level[:, 1]) * COLOUR_LEVELS + level[:, 2]
    return targets


@torch.no_grad()
def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    counted = target != IGNORE
    right = (logits.argmax(1) == target) & counted
    return right.sum() / counted.sum().clamp(min=1)


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 3 %, constant up to 75 % (may be prolonged until then), then linearly to zero."""
    return peak * min(1.0, progress / 0.03, max(0.0, (1.0 - progress) / 0.25))


def optimizers(model: nn.Module, peak: float, matrix_method: str) -> list[torch.optim.Optimizer]:
    hidden, other, plain, read_out, positions = [], [], [], [], []
    for name, parameter in model.named_parameters():
        is_block_matrix = parameter.ndim == 2 and name.startswith("backbone.layers")
        if name.startswith("read_out"):
            read_out.append(parameter)
        elif "cpb_mlp" in name:
            positions.append(parameter)
        elif parameter.ndim < 2 or "logit_scale" in name:
            plain.append(parameter)
        else:
            (hidden if is_block_matrix and matrix_method == "muon" else other).append(parameter)
    groups = [
        {"params": other, "weight_decay": 0.05, "rate": 1.0},
        {"params": plain, "weight_decay": 0.0, "rate": 1.0},
        {"params": read_out, "weight_decay": 0.0, "rate": READ_OUT_RATE},
        {"params": positions, "weight_decay": 0.0, "rate": POSITION_RATE},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))]
    if hidden:
        found.append(Muon([{"params": hidden, "rate": MUON_RATE}], lr=peak, weight_decay=0.05))
    return found


def batch(generator: SceneGenerator, first: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    scenes = [generator.scene(first + i, side) for i in range(count)]
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.stack([s.labels for s in scenes]))


def train(args: argparse.Namespace) -> None:
    rank, world = _start_processes()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    generator = SceneGenerator(args.seed)
    backbone = timm.create_model(args.model, num_classes=0, strict_img_size=False, always_partition=True)
    start_in_full(backbone)
    whiten_patches(backbone, generator)
    model = CellClassifiers(backbone)
    average = {k: v.detach().clone() for k, v in backbone.state_dict().items()}
    optims = optimizers(model, args.lr, args.matrices)
    state = {"step": 0, "images": 0, "seconds": 0.0}
    if (out / "checkpoint.pth").exists():
        saved = torch.load(out / "checkpoint.pth", map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        state = saved["state"]
        for optim, optim_state in zip(optims, saved["optimizers"]):
            optim.load_state_dict(optim_state)

    last_save = last_log = time.monotonic()
    before, start = state["seconds"], time.monotonic()
    while True:
        progress = state["seconds"] / (60 * args.minutes)
        if progress >= 1:
            break
        # Large scenes at the end: whole windows in the last stage, as at the sizes that heads are trained on.
        side, count = (256, args.batch // 4) if progress > args.large_from else (128, args.batch)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = learning_rate(progress, args.lr) * group["rate"]
        images, labels = batch(generator, state["images"] + rank * count, count, side)
        loss, log = model(images, labels)
        for optim in optims:
            optim.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(model, world)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for optim in optims:
            optim.step()
        state["step"] += 1
        state["images"] += count * world
        decay = min(0.998, state["step"] / (state["step"] + 10))
        for key, value in backbone.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        state["seconds"] = _same_clock(before + time.monotonic() - start, world)

        if rank == 0 and (time.monotonic() - last_log > 30 or state["step"] <= 3):
            last_log = time.monotonic()
            row = {**state, "side": side, "loss": loss.item(), "grad_norm": norm.item()}
            row.update({k: round(v.item(), 4) for k, v in log.items()})
            with open(out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            print(
                "step {step} images {images} {seconds:.0f} s".format(**state),
                f"loss {loss.item():.3f}",
                flush=True,
            )
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()} at step {state['step']}; lower --lr.")
        if rank == 0 and time.monotonic() - last_save > 60 * args.save_minutes:
            last_save = time.monotonic()
            _save(out, model, average, optims, state)
    if rank == 0:
        _save(out, model, average, optims, state)


def start_in_full(backbone: nn.Module) -> None:
    """Initial weights for a narrow network and a short schedule, in place.

    timm starts the norm that ends each residual branch at 0 (SwinV2, section 3.1) and all weights at 0.02: good for
    wide networks and long schedules. A narrow one then has almost linear blocks and blurring attention for long.
    """
    for stage in backbone.layers:
        for module in stage.modules():
            if isinstance(module, nn.Linear) and module.in_features > 2:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for index, block in enumerate(stage.blocks):
            nn.init.constant_(block.norm1.weight, 0.5)
            nn.init.constant_(block.norm2.weight, 0.5)
            look_at_neighbours(block.attn, first=index * block.num_heads)


@torch.no_grad()
def whiten_patches(backbone: nn.Module, generator: SceneGenerator, scenes: int = 48) -> None:
    """Start the patch embedding as a whitening of patches: brightness would hide fine structure for long.

    Method: principal components of patches divided by their standard deviation, as in the first layer of
    arXiv:2404.00498, section 3.2.
    """
    projection = backbone.patch_embed.proj
    images, _ = batch(generator, 0, scenes, 128)
    pixels = (images.float() - MEAN) / STD
    patches = F.unfold(pixels, projection.kernel_size, stride=projection.stride).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    kept = slice(-projection.out_channels, None)  # eigh sorts upwards
    filters = vectors[:, kept] / (values[kept] + 0.01).sqrt()
    projection.weight.copy_(filters.T.reshape(projection.weight.shape))
    projection.bias.copy_(-(filters.T @ mean))


@torch.no_grad()
def look_at_neighbours(attention: WindowAttention, first: int) -> None:
    """Let each head begin by looking at one neighbouring cell, so that a block begins as a convolution.

    The position bias 16 * sigmoid(mlp(offset)) gets a peak of 12 at the neighbour over a ground of 2; the mlp's last
    layer is solved for it (512 random features, 225 offsets).

    Args:
        first: head h looks at neighbour ``first + h`` of a fixed list.
    """
    lift, _, last = attention.cpb_mlp
    nn.init.normal_(lift.weight)
    nn.init.normal_(lift.bias)
    table = attention.relative_coords_table
    reach = torch.arange(table.shape[1], device=table.device) - table.shape[1] // 2
    offsets = torch.stack(torch.meshgrid(reach, reach, indexing="ij"), -1).view(-1, 2).float()
    chosen = [NEIGHBOURS[(first + h) % len(NEIGHBOURS)] for h in range(attention.num_heads)]
    distance = torch.cdist(offsets, torch.tensor(chosen, dtype=torch.float32, device=table.device))
    bias = 2 + 10 * torch.exp(-(distance**2) / (2 * 0.6**2))
    hidden = F.relu(lift(table.view(-1, 2)))
    kernel = hidden @ hidden.T + 1e-2 * torch.eye(len(hidden), device=table.device)
    last.weight.copy_((hidden.T @ torch.linalg.solve(kernel, torch.logit(bias / 16))).T)


def _start_processes() -> tuple[int, int]:
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def _average_gradients(model: nn.Module, world: int) -> None:
    if world == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def _same_clock(seconds: float, world: int) -> float:
    """Every process must stop and change size at the same step: the clock of rank 0 counts."""
    if world == 1:
        return seconds
    clock = torch.tensor([seconds], dtype=torch.float64)
    dist.broadcast(clock, 0)
    return clock.item()


def _save(out: Path, model: nn.Module, average: dict, optims: list, state: dict) -> None:
    saved = {
        "model": model.state_dict(),
        "average": average,
        "optimizers": [o.state_dict() for o in optims],
        "state": state,
    }
    with whole_file(out / "checkpoint.pth") as partial:
        torch.save(saved, partial)
    facts = {key: str(round(value, 1)) for key, value in state.items()}
    save_weights(average, out / "backbone.safetensors", half=True, metadata=facts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="folder of checkpoint, log and weights; resumes from what is there"
    )
    parser.add_argument("--minutes", type=float, required=True, help="length of the schedule, wall clock")
    parser.add_argument("--model", default=PICO_NAME, help="a SwinV2 of timm")
    parser.add_argument("--batch", type=int, default=12, help="images of 128 px per process and step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--matrices", choices=("muon", "adamw"), default="muon", help="optimiser of the block matrices"
    )
    parser.add_argument(
        "--large-from", type=float, default=0.8, help="progress at which scenes grow to 256 px"
    )
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
