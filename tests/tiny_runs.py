"""Configs that build, train and predict in seconds on a CPU, and runs of them: what tests of several rooms share.

path = write_config(tmp_path / "tiny.yaml", DETECTION, trained_on(coco_entries(world), iterations=6), {"SEED": 1})
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from d2_frozen import bench, tasks
from d2_frozen.train_net import argument_parser, main, setup

ROOT = Path(__file__).resolve().parents[1]
Part = Mapping[str, Any]
# ``flags("--resume", "SOLVER.MAX_ITER", "3")`` gives the parsed flags of train_net for the tiny config of a room.
Flags = Callable[..., Namespace]

# The backbones have random weights; files of weights have tests of their own.
DETECTION: Part = {
    "_BASE_": f"{ROOT}/configs/quickstart/detection.yaml",
    "MODEL": {
        "DEVICE": "cpu",
        "TIMM": {"PRETRAINED": ""},
        "FPN": {"OUT_CHANNELS": 64},
        "BIFPN": {"NUM_LAYERS": 1},
        "ROI_BOX_HEAD": {"FC_DIM": 32},
        "ROI_MASK_HEAD": {"NUM_CONV": 1, "CONV_DIM": 16},
        "RPN": {"BATCH_SIZE_PER_IMAGE": 32, "POST_NMS_TOPK_TRAIN": 32, "POST_NMS_TOPK_TEST": 16},
        "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 16},
    },
    "INPUT": {"SCALE_CROP": {"SIZE": 64}},
}
SEGMENTATION: Part = {
    "_BASE_": f"{ROOT}/configs/quickstart/segmentation.yaml",
    "MODEL": {
        "DEVICE": "cpu",
        "TIMM": {"PRETRAINED": ""},
        "SEM_SEG_HEAD": {"CONVS_DIM": 32, "MASK_DIM": 16},
        "MASK_FORMER": {
            "DEC_LAYERS": 2,
            "HIDDEN_DIM": 32,
            "DIM_FEEDFORWARD": 32,
            "NUM_OBJECT_QUERIES": 8,
            "TRAIN_NUM_POINTS": 64,
        },
    },
    "INPUT": {"MIN_SIZE_TRAIN": [48, 64], "MIN_SIZE_TEST": 48, "CROP": {"SIZE": [48, 48]}},
}
VIDEO: Part = {
    "_BASE_": f"{ROOT}/configs/Base-Frozen-Video.yaml",
    "MODEL": {
        "DEVICE": "cpu",
        "TIMM": {"NAME": "swinv2_pico_window8_256", "PRETRAINED": ""},
        "VIDEO_HEAD": {"WIDTH": 16, "NUM_HEADS": 2, "NUM_BLOCKS": 2},
    },
    "VIDEO": {"NUM_FRAMES": 4, "STRIDE": 2, "SHORT_SIDE": 40, "CROP_SIZE": 32},
    "DATALOADER": {"NUM_WORKERS": 0},
}


def trained_on(entries: list[Part], iterations: int) -> Part:
    """Batches of 2, a checkpoint after every second one, on the first entry; the second, if there is one, tests."""
    names = [entry["name"] for entry in entries]
    return {
        "DATASETS": {"REGISTER": entries, "TRAIN": names[:1], "TEST": names[1:]},
        "SOLVER": {
            "IMS_PER_BATCH": 2,
            "MAX_ITER": iterations,
            "WARMUP_ITERS": 0,
            "CHECKPOINT_PERIOD": 2,
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "TEST": {"PICTURES": 1},
        "SEED": 7,
    }


def coco_entries(world: Path, name: str = "tiny") -> list[Part]:
    """Of a generated world: NAME_train and NAME_val."""
    return [
        {
            "name": f"{name}_{part}",
            "type": "coco_instances",
            "json": f"{world}/{part}.json",
            "images": f"{world}/{part}",
        }
        for part in ("train", "val")
    ]


def sem_seg_entries(world: Path, name: str = "tiny_seg") -> list[Part]:
    """The same world with its label maps."""
    return [
        {
            "name": f"{name}_{part}",
            "type": "sem_seg",
            "images": f"{world}/{part}",
            "labels": f"{world}/labels/{part}",
        }
        for part in ("train", "val")
    ]


def video_entries(
    clips: Path, name: str = "tiny_video", parts: tuple[str, ...] = ("train", "val")
) -> list[Part]:
    """Of generated clips: NAME_train and NAME_val."""
    return [{"name": f"{name}_{part}", "type": "video_list", "list": f"{clips}/{part}.txt"} for part in parts]


def write_config(path: Path, *parts: Part) -> Path:
    """The parts as one yaml, key by key: what stands in a later one holds."""
    path.write_text(yaml.safe_dump(_merged(parts)))
    return path


def flags_for(config: Path) -> Flags:
    """See :data:`Flags`."""
    return lambda *arguments: argument_parser().parse_args(["--config-file", str(config), *arguments])


def train(args: Namespace) -> Any:
    """Train with these flags; the trainer afterwards."""
    trainer = loaded_trainer(args)
    trainer.train()
    return trainer


def loaded_trainer(args: Namespace) -> Any:
    """Before the first iteration."""
    cfg = setup(args)
    trainer = tasks.task_of(cfg).trainer()(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has written in the end."""
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def losses(folder: Path) -> list[dict[str, float]]:
    """Per line of metrics.json, all digits."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "loss" in key} for line in lines]


def assert_same_weights(first: Path, second: Path) -> None:
    """Of two runs, bit for bit."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def assert_resumed_equals_uninterrupted(whole: Path, flags: Flags, folder: Path) -> None:
    """Train in two parts; the frozen backbone stays as it is, and the end is that of the run in ``whole``."""
    trainer = loaded_trainer(flags("OUTPUT_DIR", str(folder)))
    before = {key: value.clone() for key, value in trainer.model.backbone.state_dict().items()}
    trainer.max_iter = 2
    trainer.train()
    after = trainer.model.backbone.state_dict()
    assert before and all(torch.equal(before[key], after[key]) for key in before)
    (folder / "model_final.pth").unlink(missing_ok=True)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    main(flags("--resume", "OUTPUT_DIR", str(folder)))
    assert_same_weights(whole, folder)


def assert_accuracy_of_two_modes(flags: Flags, config: Path, folder: Path, task: str, metric: str) -> None:
    """``bench accuracy`` of a head that an iteration has trained: fp32 is what --eval-only finds, bf16 is near.

    Args:
        config: yaml of what ``flags`` trains, in ``folder``.
        task, metric: one of 0 to 100 in the results of the evaluation.
    """
    main(flags("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"))
    head = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    result = bench.main(["accuracy", "--config-file", str(config), "--modes", "fp32", "bf16", *head])
    exact, low = result["modes"].values()
    assert all(0 <= error < 1e-5 for error in exact["error"].values())
    assert all(1e-4 < error < 0.05 for error in low["error"].values())
    again = main(flags("--eval-only", *head))
    assert 0 <= exact["metrics"][f"{task}/{metric}"] == again[task][metric]
    assert 0 <= low["metrics"][f"{task}/{metric}"] <= 100


def _merged(parts: tuple[Part, ...]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = whole.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            whole[key] = _merged((old, value)) if both else value
    return whole
