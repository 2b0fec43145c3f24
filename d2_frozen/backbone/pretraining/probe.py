"""What do a backbone's features say about real photos? Linear probes, pretrained against random weights.

    python -m d2_frozen.backbone.pretraining.probe --weights FILE --coco DIR --sem-seg DIR

In: images with COCO json of objects; images with label maps.  Out: a row per network and task.
The features are frozen and only a linear classifier is fitted: this compares representations, not detectors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2_frozen.backbone.pretraining.scenes import SceneGenerator
from d2_frozen.backbone.pretraining.train import MEAN, STD, start_in_full, whiten_patches
from d2_frozen.backbone.swin_v2 import PICO_NAME
from d2_frozen.backbone.timm_backbone import TimmBackbone, create_timm_backbone

STAGES = ("res2", "res3", "res4", "res5")
_IGNORE = 255
_CELLS_PER_IMAGE = 200


@torch.no_grad()
def maps_of(backbone: TimmBackbone, image_bgr: np.ndarray) -> dict[str, Tensor]:
    """Feature maps (C, h, w) of one image, sides padded to multiples of 32 by repeating the border."""
    h, w = image_bgr.shape[:2]
    padded = cv2.copyMakeBorder(image_bgr, 0, -h % 32, 0, -w % 32, cv2.BORDER_REPLICATE)
    pixels = torch.from_numpy(np.ascontiguousarray(padded[..., ::-1])).permute(2, 0, 1)[None].float()
    return {name: value[0] for name, value in backbone((pixels - MEAN) / STD).items()}


def object_samples(
    backbone: TimmBackbone, folder: Path, split: str, side_px: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean feature inside each object's box: {stage: (features (N, C), classes (N,))}."""
    data = json.loads((folder / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    classes = {c["id"]: i for i, c in enumerate(sorted(data["categories"], key=lambda c: c["id"]))}
    by_image: dict[int, list[dict]] = {}
    for annotation in data["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    samples: dict[str, list] = {s: [] for s in STAGES}
    for record in data["images"]:
        image = cv2.imread(str(folder / split / record["file_name"]))
        scale = side_px / max(image.shape[:2])
        maps = maps_of(backbone, cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        for annotation in by_image.get(record["id"], []):
            x, y, w, h = (v * scale for v in annotation["bbox"])
            for stage, stride in zip(STAGES, (4, 8, 16, 32)):
                value = maps[stage]
                x0, y0 = int(min(x / stride, value.shape[2] - 1)), int(min(y / stride, value.shape[1] - 1))
                x1, y1 = max(x0 + 1, round((x + w) / stride)), max(y0 + 1, round((y + h) / stride))
                box = value[:, y0:y1, x0:x1]
                samples[stage].append((box.mean((1, 2)), classes[annotation["category_id"]]))
    return {s: (torch.stack([f for f, _ in v]), torch.tensor([c for _, c in v])) for s, v in samples.items()}


def cell_samples(
    backbone: TimmBackbone, folder: Path, split: str, side_px: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of cells whose centre pixel is labelled, at most 200 per image and stage."""
    samples: dict[str, list] = {s: [] for s in STAGES}
    rng = np.random.default_rng(0)
    for path in sorted((folder / "images" / split).iterdir()):
        labels = cv2.imread(str(folder / "annotations" / split / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        image = cv2.imread(str(path))
        scale = side_px / max(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        labels = cv2.resize(labels, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        for (stage, value), stride in zip(maps_of(backbone, image).items(), (4, 8, 16, 32)):
            target = labels[stride // 2 :: stride, stride // 2 :: stride]
            ys, xs = np.nonzero(target != _IGNORE)
            chosen = rng.permutation(len(ys))[:_CELLS_PER_IMAGE]
            ys, xs = ys[chosen], xs[chosen]
            samples[stage].append((value[:, ys, xs].T, torch.from_numpy(target[ys, xs].astype(np.int64))))
    return {s: (torch.cat([f for f, _ in v]), torch.cat([c for _, c in v])) for s, v in samples.items()}


def linear_probe(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], decay: float = 3e-3
) -> dict[str, float]:
    """Fit multinomial logistic regression with balanced classes on standardised features.

    Returns:
        "balanced": mean over the classes of val of the share found, in percent; "all": share of all samples.
    """
    x, y = train
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / std, (val[0] - mean) / std
    classes = int(max(y.max(), val[1].max())) + 1
    count = torch.bincount(y, minlength=classes).float()
    class_weight = torch.where(count > 0, len(y) / (count.clamp(min=1) * (count > 0).sum()), 0.0)
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y, class_weight) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        right = (z @ weight + bias).argmax(1) == val[1]
    per_class = [right[val[1] == c].float().mean() for c in val[1].unique()]
    return {"balanced": 100 * torch.stack(per_class).mean().item(), "all": 100 * right.float().mean().item()}


def probe(
    train: dict[str, tuple[Tensor, Tensor]], val: dict[str, tuple[Tensor, Tensor]], seeds: int
) -> dict[str, list[dict[str, float]]]:
    """One probe per stage and seed; each seed keeps another 80 % of the training samples."""
    results: dict[str, list[dict[str, float]]] = {}
    for stage, (features, classes) in train.items():
        for seed in range(seeds):
            order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
            keep = order[: round(0.8 * len(classes))]
            score = linear_probe((features[keep], classes[keep]), val[stage])
            results.setdefault(stage, []).append(score)
    return results


def networks(weights: str, seeds: int) -> Iterator[tuple[str, TimmBackbone]]:
    """The pretrained network, then random ones: as timm starts them, and as our pretraining starts."""
    if weights:
        yield "pretrained", create_timm_backbone(PICO_NAME, weights)
    for seed in range(seeds):
        torch.manual_seed(seed)
        yield f"random {seed}", create_timm_backbone(PICO_NAME)
        torch.manual_seed(seed)
        opened = create_timm_backbone(PICO_NAME)
        start_in_full(opened.network)
        whiten_patches(opened.network, SceneGenerator(seed))
        yield f"our start {seed}", opened


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", default="", help="as MODEL.TIMM.PRETRAINED; '' for the random networks alone"
    )
    parser.add_argument(
        "--coco", type=Path, help="folder with train/, val/, annotations/instances_{train,val}.json"
    )
    parser.add_argument(
        "--sem-seg", type=Path, help="folder with images/{train,val}, annotations/{train,val}"
    )
    parser.add_argument("--side", type=int, default=320, help="long side of the images, pixels")
    parser.add_argument("--networks", type=int, default=3, help="networks with random weights, of each kind")
    parser.add_argument("--seeds", type=int, default=3, help="probes per network")
    args = parser.parse_args(argv)
    for task, folder, sample in (
        ("objects", args.coco, object_samples),
        ("cells", args.sem_seg, cell_samples),
    ):
        if folder is None:
            continue
        for label, backbone in networks(args.weights, args.networks):
            backbone.eval()
            train, val = (sample(backbone, folder, split, args.side) for split in ("train", "val"))
            for stage, scores in probe(train, val, args.seeds).items():
                shown = "  ".join(
                    f"{kind} {np.mean(v):5.1f} ({min(v):.1f} .. {max(v):.1f})"
                    for kind, v in ((k, [score[k] for score in scores]) for k in ("balanced", "all"))
                )
                print(f"{task:8s} {label:16s} {stage}  {shown}", flush=True)


if __name__ == "__main__":
    main()
