"""Small backbones for the tables at mini scale, by each kind of pretraining that the paper's Table 1 compares.

    python -m d2_frozen.study pretrain --kind contrastive --size pico --images 4000

All kinds see the same generated scenes (``backbone/pretraining/scenes.py``), the same number of times:
    supervised    which shapes and textures does the image show? (image labels, as ImageNet's; several may be right)
    contrastive   which two crops are of one image? SimCLR's loss (arXiv 2002.05709, equation 1)
    masked        what colours have the hidden pixels? SimMIM (arXiv 2111.09886): squares of 32 px, 60 % hidden, L1
Out: NAME.safetensors for MODEL.TIMM.PRETRAINED. A call that was interrupted goes on from NAME.partial.pth.
Some come with the package, made by the same command: ``backbone/pretrained/study``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.ops import roi_align

from d2_frozen.backbone.pretraining.scenes import IGNORE, SceneGenerator
from d2_frozen.backbone.pretraining.shapes import NUM_SHAPES
from d2_frozen.backbone.pretraining.textures import NUM_TEXTURES
from d2_frozen.backbone.swin_v2 import PICO_NAME
from d2_frozen.backbone.timm_backbone import TimmBackbone, create_timm_backbone
from d2_frozen.backbone.weights import SHIPPED_DIR, save_weights
from d2_frozen.claims import claimed
from d2_frozen.files import whole_file

logger = logging.getLogger(__name__)

KINDS = ("supervised", "contrastive", "masked")
# Arguments of timm's SwinV2, as MODEL.TIMM.ARGS.
SIZES: dict[str, dict[str, Any]] = {
    "pico": {},
    "nano": {"embed_dim": 48, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
}
SIDE_PX = 128
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
HIDDEN_SHARE = 0.6  # SimMIM, section 3.2
HIDDEN_SQUARE_PX = 32
TEMPERATURE = 0.2
# A class counts as shown from this share of the pixels on.
_SHOWN = 0.01
_LOG_EVERY, _SAVE_EVERY = 20, 200
ITERATIONS = 2000
_BATCH = 64
# Of files from before each fact was written down.
_USUAL = {"seed": 0, "iterations": ITERATIONS, "batch": _BATCH}


@dataclass(frozen=True)
class Pretraining:
    """One of the networks. Its name tells all that the tables vary.

    Args:
        kind: one of KINDS.
        size: one of SIZES.
        images: number of scenes.
        iterations: of 64 images.
        seed: of scenes, start and draws.
    """

    kind: str
    size: str = "pico"
    images: int = 4000
    iterations: int = ITERATIONS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.size not in SIZES or min(self.images, self.iterations) < 1:
            raise ValueError(
                f"{self.name} is no pretraining: kinds are {', '.join(KINDS)}, sizes {', '.join(SIZES)}, and "
                "there is at least one image and iteration."
            )

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.size}_{self.images}"

    @classmethod
    def of_name(cls, name: str, **settings: Any) -> Pretraining:
        """The one whose file is called so.

        Raises:
            ValueError: it is no such name.
        """
        kind, size, images = ([*name.split("_"), "", "", ""])[:3]
        if not images.isdecimal():
            raise ValueError(f"{name} is no KIND_SIZE_IMAGES, such as supervised_pico_4000.")
        return cls(kind, size, int(images), **settings)


@dataclass(frozen=True)
class Machine:
    """How a backbone is pretrained, which does not change what it learns.

    Args:
        device: "cpu", "cuda", or "cuda:1".
        workers: processes that draw the scenes.
        amp: mixed precision, bfloat16. None: on GPUs. It pays on CPUs with AMX.
        compiled: the backbone by torch.compile, after minutes of compiling.
    """

    device: str = "cpu"
    workers: int = 1
    amp: bool | None = None
    compiled: bool = False


def pretrain(
    what: Pretraining, folder: str | Path, machine: Machine = Machine(), batch: int = _BATCH
) -> Path:
    """Train a backbone and write ``NAME.safetensors``; nothing to do where that exists.

    Returns:
        The file.
    Raises:
        ImportError: contrastive pretraining without pytorch-metric-learning.
        FloatingPointError: the loss is no number.
        ValueError: the file, or what an interrupted call left, is of another seed, length or batch.
    """
    folder = Path(folder)
    path, unfinished = folder / f"{what.name}.safetensors", folder / f"{what.name}.partial.pth"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder / f".{what.name}.in_use", wait=True):  # two queues may miss the same backbone
            if not path.exists():
                _train(what, path, unfinished, machine, batch)
    check_pretrained(what, path, batch)
    return path


def shipped(what: Pretraining) -> Path | None:
    """The file of this pretraining that comes with the package, float16; None where none does."""
    path = SHIPPED_DIR / "study" / f"{what.name}.safetensors"
    return path if facts_of_file(path) == _facts(what, _BATCH) else None


def check_pretrained(what: Pretraining, path: Path, batch: int = _BATCH) -> None:
    """Is the file of this pretraining? One that does not say its seed, as older ones, is of seed 0.

    Raises:
        ValueError: it is of another, or cannot be read.
    """
    try:
        found = _metadata(path)
    except SafetensorError as err:
        raise ValueError(f"{path} is no complete safetensors file: {err}. Remove it.") from err
    _require_same(what, batch, found, path)


def facts_of_file(path: str | Path) -> dict[str, int]:
    """Seed, iterations and batch of the pretraining whose file this is; nothing for any other file, or none."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        found = _metadata(path)
    except SafetensorError:  # whoever loads it says so
        return {}
    if found.get("kind") not in KINDS:
        return {}
    return {fact: int(found.get(fact, usual)) for fact, usual in _USUAL.items()}


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _facts(what: Pretraining, batch: int) -> dict[str, int]:
    """What the name of a file does not say."""
    return {"seed": what.seed, "iterations": what.iterations, "batch": batch}


def _require_same(what: Pretraining, batch: int, found: Mapping[str, Any], path: Path) -> None:
    differing = [
        f"{fact} {seen}, not {wanted}"
        for fact, wanted in _facts(what, batch).items()
        if (seen := int(found.get(fact, _USUAL[fact]))) != wanted
    ]
    if differing:
        raise ValueError(
            f"{path} is of another pretraining than the one that is wanted: {'; '.join(differing)}. Remove the file to "
            "pretrain anew, or have the other one elsewhere: study pretrain --output DIR. Tables compare backbones of "
            "another length by --pretraining-iterations."
        )


def _train(what: Pretraining, path: Path, unfinished: Path, machine: Machine, batch: int) -> None:
    device = machine.device
    saved = _saved(unfinished, what, batch, device)
    kind = torch.device(device).type
    amp = kind == "cuda" if machine.amp is None else machine.amp
    torch.manual_seed(what.seed)
    backbone = create_timm_backbone(PICO_NAME, arguments=SIZES[what.size], final_norm=True)
    task = _task(what.kind, backbone).to(device)
    if machine.compiled:
        torch.compiler.reset()  # what was compiled before would be taken, as hooks (masked has one) are not compared
        task.backbone.compile()
    decaying = [p for p in task.parameters() if p.ndim > 1]
    others = [p for p in task.parameters() if p.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    logger.info("%s: drawing %d scenes", what.name, what.images)
    scenes, shown = draw_scenes(what.seed, what.images, machine.workers)
    scenes, shown = scenes.to(device), shown.to(device)
    first = 0
    if saved is not None:
        task.load_state_dict(saved["task"])
        optimizer.load_state_dict(saved["optimizer"])
        first = int(saved["step"])
    logged, since = first, time.monotonic()
    for step in range(first, what.iterations):
        # Draws are functions of (seed, step), so an interrupted run ends as an uninterrupted one.
        generator = torch.Generator().manual_seed(what.seed * 1_000_003 + step)
        torch.manual_seed(what.seed * 1_000_003 + step)
        chosen = torch.randint(len(scenes), (batch,), generator=generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * learning_rate(step, what.iterations)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=amp):
            loss = task(scenes[chosen], shown[chosen], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        last = done == what.iterations
        if done % _LOG_EVERY == 0 or last:
            found = loss.item()
            if not math.isfinite(found):
                raise FloatingPointError(f"{what.name}: the loss is {found} at iteration {step}.")
            each = (time.monotonic() - since) / (done - logged)
            eta = timedelta(seconds=int(each * (what.iterations - done)))
            line = "%s  iter: %d  loss: %.4f  eta: %s  images/s: %.1f"
            logger.info(line, what.name, step, found, eta, batch / each)
            logged, since = done, time.monotonic()
        if done % _SAVE_EVERY == 0 or last:
            states = {"task": task.state_dict(), "optimizer": optimizer.state_dict()}
            _save(unfinished, {"step": done, **states, **_facts(what, batch)})
    facts = {fact: str(value) for fact, value in _facts(what, batch).items()}
    about = {"kind": what.kind, "images": str(what.images), **facts}
    state = {name: value.detach().cpu() for name, value in whole_state(backbone).items()}
    save_weights(state, path, metadata=about)
    unfinished.unlink(missing_ok=True)


def whole_state(backbone: TimmBackbone) -> dict[str, Tensor]:
    """Parameters and buffers under timm's names, with those of the norm behind the last stage."""
    norm = backbone.final_norm
    assert norm is not None
    return {
        **backbone.network.state_dict(),
        **{f"norm.{name}": value for name, value in norm.state_dict().items()},
    }


def learning_rate(step: int, iterations: int) -> float:
    """Relative: up over the first 5 %, then down along a cosine."""
    warmup = max(1, iterations // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, iterations - warmup)))


def draw_scenes(seed: int, count: int, workers: int = 1) -> tuple[Tensor, Tensor]:
    """Scenes 0 .. count - 1 of a seed.

    Returns:
        (count, 3, 128, 128) uint8 RGB, and (count, K) float: which shapes, then which textures, each one shows.
    """
    parts = [range(k, count, workers) for k in range(workers)]
    images = np.empty((count, SIDE_PX, SIDE_PX, 3), np.uint8)
    shown = np.empty((count, NUM_SHAPES + NUM_TEXTURES), np.float32)
    draw = partial(_draw, seed)
    if workers == 1:
        drawn: Iterator[tuple[np.ndarray, np.ndarray]] = iter([draw(parts[0])])
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            drawn = iter(list(pool.map(draw, parts)))
    for part, (part_images, part_shown) in zip(parts, drawn):
        images[part.start :: workers], shown[part.start :: workers] = part_images, part_shown
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(shown)


def _draw(seed: int, indices: range) -> tuple[np.ndarray, np.ndarray]:
    generator = SceneGenerator(seed)
    images, shown = [], []
    for index in indices:
        scene = generator.scene(index, SIDE_PX)
        images.append(scene.image)
        shown.append(shown_classes(scene.labels))
    return np.stack(images), np.stack(shown)


def shown_classes(labels: np.ndarray) -> np.ndarray:
    """(4, S, S) labels of a scene -> (K,) float32, 1 where a shape or texture covers at least 1 % of the pixels."""
    shapes = np.bincount(labels[0].ravel(), minlength=NUM_SHAPES + 1)[1 : NUM_SHAPES + 1]
    textures = labels[1][labels[1] != IGNORE]
    counts = np.concatenate([shapes, np.bincount(textures, minlength=NUM_TEXTURES)[:NUM_TEXTURES]])
    return (counts >= _SHOWN * labels[0].size).astype(np.float32)


class _Task(nn.Module):
    """Backbone and what is thrown away: images and their labels -> loss."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = backbone.output_shape()["res5"].channels
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def last_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255 -> (B, C, H / 32, W / 32), behind the network's final norm."""
        return self.backbone((images - self.mean) / self.std)["res5"]


class _Supervised(_Task):
    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__(backbone)
        self.classifier = nn.Linear(self.channels, NUM_SHAPES + NUM_TEXTURES)

    def forward(self, scenes: Tensor, shown: Tensor, generator: torch.Generator) -> Tensor:
        features = self.last_map(random_views(scenes, generator, smallest=0.6)).mean(dim=(2, 3))
        return F.binary_cross_entropy_with_logits(self.classifier(features), shown)


class _Contrastive(_Task):
    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__(backbone)
        try:
            from pytorch_metric_learning.losses import NTXentLoss
        except ImportError as err:
            raise ImportError(
                "Contrastive pretraining needs pytorch-metric-learning: pip install 'd2_frozen[study]'."
            ) from err
        wide = 2 * self.channels
        self.projector = nn.Sequential(nn.Linear(self.channels, wide), nn.GELU(), nn.Linear(wide, 128))
        self.loss = NTXentLoss(temperature=TEMPERATURE)

    def forward(self, scenes: Tensor, shown: Tensor, generator: torch.Generator) -> Tensor:
        views = torch.cat([random_views(scenes, generator, smallest=0.2) for _ in range(2)])
        projected = self.projector(self.last_map(views).mean(dim=(2, 3))).float()
        return self.loss(projected, torch.arange(len(scenes), device=scenes.device).repeat(2))


class _Masked(_Task):
    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__(backbone)
        stem = backbone.network.patch_embed
        self.token = nn.Parameter(torch.zeros(stem.proj.out_channels))
        nn.init.trunc_normal_(self.token, std=0.02)
        self.decoder = nn.Sequential(nn.Conv2d(self.channels, 32 * 32 * 3, 1), nn.PixelShuffle(32))
        self._hidden: Tensor | None = None
        stem.register_forward_hook(self._hide)

    def _hide(self, stem: nn.Module, inputs: Any, cells: Tensor) -> Tensor:
        """(B, h, w, C) of the stem -> the same with the token where pixels are hidden."""
        assert self._hidden is not None
        hidden = F.interpolate(self._hidden, size=cells.shape[1:3], mode="nearest").permute(0, 2, 3, 1)
        return torch.where(hidden > 0, self.token.to(cells.dtype), cells)

    def forward(self, scenes: Tensor, shown: Tensor, generator: torch.Generator) -> Tensor:
        images = random_views(scenes, generator, smallest=0.6)
        B, _, H, W = images.shape
        grid = (H // HIDDEN_SQUARE_PX, W // HIDDEN_SQUARE_PX)
        order = torch.rand(B, grid[0] * grid[1], generator=generator).argsort(dim=1)
        hidden = (order < HIDDEN_SHARE * order.shape[1]).float().view(B, 1, *grid).to(images.device)
        self._hidden = hidden
        predicted = self.decoder(self.last_map(images)).float()
        error = F.l1_loss(predicted, (images - self.mean) / self.std, reduction="none")
        weight = F.interpolate(hidden, size=(H, W), mode="nearest")
        return (error * weight).sum() / (3 * weight.sum()).clamp(min=1)


def _task(kind: str, backbone: TimmBackbone) -> _Task:
    return {"supervised": _Supervised, "contrastive": _Contrastive, "masked": _Masked}[kind](backbone)


def random_views(scenes: Tensor, generator: torch.Generator, smallest: float) -> Tensor:
    """A crop of each image at its full size, half of them mirrored, brightness and colours changed.

    Args:
        scenes: (B, 3, H, W) uint8.
        smallest: area of the smallest crop, as a share.
    Returns:
        (B, 3, H, W) float32, about 0..255.
    """
    B, _, H, W = scenes.shape
    draws = torch.rand(B, 8, generator=generator).to(scenes.device)
    area = smallest + (1 - smallest) * draws[:, 0]
    stretch = torch.exp((draws[:, 1] - 0.5) * math.log(4 / 3))
    height, width = H * (area / stretch).sqrt().clamp(max=1), W * (area * stretch).sqrt().clamp(max=1)
    y, x = draws[:, 2] * (H - height), draws[:, 3] * (W - width)
    number = torch.arange(B, device=scenes.device, dtype=torch.float32)
    boxes = torch.stack([number, x, y, x + width, y + height], dim=1)
    # A crop is never larger than the view, so one sample per pixel is enough.
    views = roi_align(scenes.float(), boxes, (H, W), sampling_ratio=1, aligned=True)
    views = torch.where((draws[:, 4] < 0.5).view(B, 1, 1, 1), views.flip(-1), views)
    gain = (0.7 + 0.6 * draws[:, 5:8]).view(B, 3, 1, 1)
    middle = views.mean(dim=(1, 2, 3), keepdim=True)
    return (views - middle) * gain + middle * gain.mean(dim=1, keepdim=True)


def _saved(path: Path, what: Pretraining, batch: int, device: str) -> dict[str, Any] | None:
    """What an interrupted call left; ValueError if it was of another pretraining."""
    if not path.exists():
        return None
    saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    _require_same(what, batch, saved, path)
    return saved


def _save(path: Path, state: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        torch.save(state, partial)
