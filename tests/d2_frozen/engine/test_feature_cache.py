"""A feature cache changes nothing but the time: same losses with it, without it, after a resume; no false hits."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2_frozen.caching import spaces_in
from d2_frozen.engine import FrozenTrainer
from d2_frozen.engine.caching import space_of
from d2_frozen.train_net import setup
from detectron2.config import CfgNode

Flags = Callable[..., Namespace]
VIEWS = ("MODEL.FROZEN.CACHE.VIEWS", "2")


def train(args: Namespace, until: int | None = None, resume: bool = False) -> FrozenTrainer:
    trainer = FrozenTrainer(setup(args))
    trainer.resume_or_load(resume=resume)
    if until is not None:
        trainer.max_iter = until
    trainer.train()
    return trainer


def losses(folder: Path) -> list[dict[str, float]]:
    """Per iteration, all digits."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "loss" in key} for line in lines]


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_same_model(first: Path, second: Path) -> None:
    a, b = model_of(first), model_of(second)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_cached_training_equals_live_training_bit_for_bit(workers: str, flags: Flags, tmp_path: Path) -> None:
    """12 images, 2 views, batches of 2: a cache is complete after 12 iterations."""
    common = (*VIEWS, "SOLVER.MAX_ITER", "14", "DATALOADER.NUM_WORKERS", workers, "DATASETS.TEST", "()")
    cached = ("MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"))
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "live")))
    filling = train(flags(*common, *cached, "OUTPUT_DIR", str(tmp_path / "filling")))
    reading = train(flags(*common, *cached, "OUTPUT_DIR", str(tmp_path / "reading")))
    assert filling.feature_cache.statistics.written == 24
    assert reading.feature_cache.statistics.hit_rate() == 1
    assert reading.feature_cache.statistics.written == 0
    for name in ("filling", "reading"):
        assert_same_model(tmp_path / "live", tmp_path / name)
        assert losses(tmp_path / "live") == losses(tmp_path / name)


def test_images_and_backbone_stay_untouched_where_features_are_there(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"), "SOLVER.MAX_ITER", "12")
    train(flags(*common, "DATASETS.TEST", "()"))

    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("not needed")

    args = flags(*common, "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "again"))
    trainer = FrozenTrainer(setup(args))
    monkeypatch.setattr("detectron2.data.detection_utils.read_image", must_not_run)
    monkeypatch.setattr(type(trainer.model.frozen_backbone.inner), "forward", must_not_run)
    trainer.train()


def test_resumed_run_with_a_cache_equals_an_uninterrupted_one(flags: Flags, tmp_path: Path) -> None:
    common = (*VIEWS, "SOLVER.MAX_ITER", "8", "DATASETS.TEST", "()")
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "whole")))
    parts = (
        *common,
        "MODEL.FROZEN.CACHE.DIR",
        str(tmp_path / "cache"),
        "OUTPUT_DIR",
        str(tmp_path / "parts"),
    )
    train(flags(*parts), until=4)
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000003.pth")
    train(flags("--resume", *parts), resume=True)
    assert_same_model(tmp_path / "whole", tmp_path / "parts")


def test_features_in_low_precision_are_the_same_computed_or_read(flags: Flags, tmp_path: Path) -> None:
    common = (*VIEWS, "SOLVER.MAX_ITER", "8", "DATASETS.TEST", "()", "MODEL.FROZEN.CACHE.DTYPE", "bf16")
    common += ("MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"))
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "filling")))
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "reading")))
    assert_same_model(tmp_path / "filling", tmp_path / "reading")


@pytest.mark.parametrize(
    "change",
    [
        ("MODEL.TIMM.PRETRAINED", "d2_frozen://swinv2_pico_fdsl.safetensors"),
        ("MODEL.FROZEN.PRECISION", "bf16"),
        ("MODEL.FROZEN.CACHE.DTYPE", "fp16"),
        ("MODEL.PIXEL_MEAN", "(1.0, 2.0, 3.0)"),
        ("INPUT.FORMAT", "BGR"),
        ("FLOAT32_PRECISION", "highest"),  # of convolutions, "" leaves torch's TF32
        ("MODEL.NECK.NAME", "SimpleFeaturePyramid", "MODEL.TIMM.NAME", "vit_tiny_patch16_224"),
        (
            *(
                "MODEL.FPN.IN_FEATURES",
                "('res3', 'res4', 'res5')",
                "MODEL.RPN.IN_FEATURES",
                "('p3', 'p4', 'p5', 'p6')",
            ),
            *("MODEL.ROI_HEADS.IN_FEATURES", "('p3', 'p4', 'p5')"),
            *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [96]]"),
        ),
        ("INPUT.SCALE_CROP.TEST_RESIZE", "square"),
    ],
)
def test_features_of_another_kind_have_another_space(
    change: tuple[str, ...], flags: Flags, tmp_path: Path
) -> None:
    spaces = []
    for options in ((), change, ("SOLVER.BASE_LR", "0.1", "MODEL.BIFPN.NUM_LAYERS", "2", "SEED", "7")):
        cfg = setup(flags(*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"), *options))
        spaces.append(space_of(cfg, FrozenTrainer.build_model(cfg)))
    assert spaces[0].id != spaces[1].id
    assert spaces[0].id == spaces[2].id  # of the head nothing matters


def test_the_same_weights_in_another_network_have_another_space(flags: Flags, tmp_path: Path) -> None:
    cfg = setup(flags(*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache")))
    model = FrozenTrainer.build_model(cfg)
    other = cfg.clone()
    other.defrost()
    other.MODEL.TIMM.ARGS.window_size = 4
    assert space_of(cfg, model).id != space_of(other, model).id


def test_keys_of_ones_own_may_be_settings_of_a_network_of_ones_own(flags: Flags, tmp_path: Path) -> None:
    """A dilation, say: the same weights, other features. They had one space."""
    cfg = setup(flags(*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache")))
    model = FrozenTrainer.build_model(cfg)
    cfg.defrost()
    cfg.MODEL.BACKBONE.DILATION, cfg.MINE = 1, CfgNode({"WINDOW": 4})
    spaces = []
    for builder in ("build_timm_backbone", "build_mine"):
        cfg.MODEL.FROZEN.BOTTOM_UP = builder
        for dilation, window in ((1, 4), (2, 4), (1, 8)):
            cfg.MODEL.BACKBONE.DILATION, cfg.MINE.WINDOW = dilation, window
            spaces.append(space_of(cfg, model).id)
    assert len(set(spaces[:3])) == 1 and len(set(spaces[3:])) == 3


@pytest.mark.parametrize(
    "change",
    [("INPUT.SCALE_CROP.SIZE", "96"), ("MODEL.FROZEN.CACHE.SEED", "1"), ("MODEL.FROZEN.PRECISION", "bf16")],
)
def test_what_was_made_otherwise_never_hits(change: tuple[str, str], flags: Flags, tmp_path: Path) -> None:
    common = (*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"), "SOLVER.MAX_ITER", "6")
    common += ("DATASETS.TEST", "()")
    train(flags(*common))
    other = train(flags(*common, *change)).feature_cache.statistics
    assert (other.hits, other.misses, other.written) == (0, 12, 12)
    assert len(spaces_in(tmp_path / "cache")) == (2 if "PRECISION" in change[0] else 1)


def test_images_of_several_sizes(flags: Flags, tmp_path: Path) -> None:
    """Padded to the largest of their batch: features do not depend on the others in it."""
    common = (*VIEWS, "SOLVER.MAX_ITER", "12", "DATASETS.TEST", "()")
    common += ("INPUT.AUGMENTATION", "resize_shortest_edge", "INPUT.MIN_SIZE_TRAIN", "(40, 56, 72)")
    cached = ("MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"))
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "live")))
    other_order = (*common, *cached, "DATALOADER.ASPECT_RATIO_GROUPING", "False")
    train(flags(*other_order, "OUTPUT_DIR", str(tmp_path / "other_order")))
    reading = train(flags(*common, *cached, "OUTPUT_DIR", str(tmp_path / "reading")))
    assert reading.feature_cache.statistics.hits == 24
    assert_same_model(tmp_path / "live", tmp_path / "reading")


def test_a_changed_file_is_computed_again(flags: Flags, tmp_path: Path, tiny_world: Path) -> None:
    import os

    common = (*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"), "SOLVER.MAX_ITER", "6")
    common += ("DATASETS.TEST", "()")
    train(flags(*common))
    image = sorted((tiny_world / "train").glob("*.jpg"))[0]
    stat = image.stat()
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    statistics = train(flags(*common)).feature_cache.statistics
    assert (statistics.hits, statistics.misses) == (11, 1)


def test_a_damaged_or_deleted_shard_is_computed_again(
    flags: Flags, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    common = (*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(cache), "SOLVER.MAX_ITER", "6", "DATASETS.TEST", "()")
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "first")))
    (shard,) = cache.glob("*/shard-*.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    statistics = train(flags(*common, "OUTPUT_DIR", str(tmp_path / "second"))).feature_cache.statistics
    assert (statistics.hits, statistics.damaged, statistics.written) == (11, 1, 1)
    assert "damaged" in caplog.text and shard.name in caplog.text
    assert_same_model(tmp_path / "first", tmp_path / "second")


def test_a_shard_deleted_between_worker_and_model_is_computed_again(flags: Flags, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    common = (*VIEWS, "MODEL.FROZEN.CACHE.DIR", str(cache), "SOLVER.MAX_ITER", "6", "DATASETS.TEST", "()")
    train(flags(*common, "OUTPUT_DIR", str(tmp_path / "first")))
    trainer = FrozenTrainer(setup(flags(*common, "OUTPUT_DIR", str(tmp_path / "second"))))
    loader = trainer._batches(0)
    found = loader.dataset[next(loader.places())[0]]
    for file in cache.glob("*/shard-*"):
        file.unlink()
    assert (found.sample["image"] == 0).all()
    assert (loader._with_features(found)["image"] != 0).any()


def test_contradicting_settings(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="VIEWS is 0"):
        FrozenTrainer(setup(flags("MODEL.FROZEN.CACHE.DIR", str(tmp_path))))
    with pytest.raises(ValueError, match="FREEZE is 'none'"):
        FrozenTrainer(setup(flags(*VIEWS, "MODEL.BACKBONE.FREEZE", "none")))
    with pytest.raises(ValueError, match="DTYPE is 'int8'"):
        FrozenTrainer(setup(flags("MODEL.FROZEN.CACHE.DTYPE", "int8")))
    with pytest.raises(ValueError, match="may be negative"):
        FrozenTrainer(setup(flags("MODEL.FROZEN.CACHE.VIEWS", "-1")))
