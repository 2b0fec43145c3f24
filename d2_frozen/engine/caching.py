"""MODEL.FROZEN.CACHE for a model and its loader: which space of the cache is theirs, and who tells whom."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.backbone.by_sample import FeatureService
from d2_frozen.backbone.swin_v2 import windows_of_positions
from d2_frozen.caching import FeatureCache, Space
from d2_frozen.caching.features import DTYPES
from d2_frozen.caching.keys import canonical
from d2_frozen.caching.store import gib
from d2_frozen.data.loader import TrainLoader
from d2_frozen.tasks import task_of
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

# Builders of Detectron2 that MODEL.RESNETS shapes.
_RESNETS = ("build_resnet_backbone",)


def check_cache_settings(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: a value of MODEL.FROZEN.CACHE that cannot be, or one that another key contradicts.
    """
    settings = cfg.MODEL.FROZEN.CACHE
    if settings.VIEWS < 0 or settings.SEED < 0 or settings.MAX_GB < 0:
        raise ValueError(
            f"MODEL.FROZEN.CACHE: VIEWS {settings.VIEWS}, SEED {settings.SEED}, MAX_GB {settings.MAX_GB}; none may be "
            "negative."
        )
    if settings.DTYPE != "auto" and settings.DTYPE not in DTYPES:
        raise ValueError(
            f"MODEL.FROZEN.CACHE.DTYPE is {settings.DTYPE!r}; choose one of auto, {', '.join(DTYPES)}."
        )
    if settings.DIR and not settings.VIEWS:
        raise ValueError(
            "MODEL.FROZEN.CACHE.DIR is set, but VIEWS is 0: each pass would augment anew, and nothing stored would be "
            "used again. Set MODEL.FROZEN.CACHE.VIEWS to the number of augmented views per image (8, say; 1 without "
            "random augmentation)."
        )
    if settings.VIEWS and cfg.MODEL.BACKBONE.FREEZE != "all":
        raise ValueError(
            f"MODEL.FROZEN.CACHE.VIEWS is {settings.VIEWS}, but FREEZE is {cfg.MODEL.BACKBONE.FREEZE!r}; "
            "only the features of a wholly frozen backbone stay the same. Set FREEZE: all, or VIEWS: 0 and DIR: ''."
        )


def open_cache(cfg: CfgNode, model: nn.Module) -> FeatureCache | None:
    """The cache of MODEL.FROZEN.CACHE.DIR for this model, None if DIR is empty.

    The weights must be in the model: their fingerprint is part of what features are known by.

    Raises:
        ValueError: DIR is no folder, or one that cannot be written to and has nothing for this model.
    """
    settings = cfg.MODEL.FROZEN.CACHE
    if not settings.DIR:
        return None
    space = space_of(cfg, model)
    try:
        store = space.open(int(settings.MAX_GB * 2**30))
    except OSError as err:
        raise ValueError(
            f"MODEL.FROZEN.CACHE.DIR is {settings.DIR!r}; it holds no features of this backbone, and nothing can be "
            f"written there: {err}. Choose a folder that can be written to, or DIR '' to train without a cache."
        ) from err
    # Pictures of the training input want pixels.
    cache = FeatureCache(store, space.facts["dtype"], space.facts["maps"], wants_pixels=cfg.VIS_PERIOD > 0)
    logger.info(
        "Feature cache: %s, %d entries, %s; %s.",
        space.folder,
        len(store),
        gib(space.bytes()),
        store.room()[1],
    )
    return cache


def space_of(cfg: CfgNode, model: nn.Module) -> Space:
    """Everything that reaches the features of a model beside file and draw."""
    frozen = frozen_backbone_of(model)
    settings = cfg.MODEL.FROZEN.CACHE
    dtype = settings.DTYPE
    if dtype == "auto":
        dtype = frozen.precision if frozen.precision in DTYPES else "bf16"
    backbone: Any = model.backbone
    facts = {
        "backbone": frozen.name,
        "sha256": frozen.fingerprint()["sha256"],
        "arithmetic": arithmetic_of(cfg),
        "network": network_settings(cfg),
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "input_format": cfg.INPUT.FORMAT,
        "padding": {
            "divisibility": int(getattr(model, "size_divisibility", 0) or backbone.size_divisibility),
            "square": int(getattr(model, "square", 0)),
            **{key: int(value) for key, value in backbone.padding_constraints.items()},
        },
        "maps": maps_used(model),
        "dtype": dtype,
    }
    # They change features, not weights: nothing else tells what was stored before positions were measured by them.
    if windows := windows_of_positions(frozen):
        facts["windows_of_positions"] = windows
    return Space(Path(settings.DIR), facts)


def arithmetic_of(cfg: CfgNode) -> str:
    """All of the config that decides how the frozen forward computes, as text."""
    others = ("CACHE", "SAVE_FULL_MODEL", "BOTTOM_UP")
    settings = {key: value for key, value in cfg.MODEL.FROZEN.items() if key not in others}
    # "highest" too: "" leaves torch's own setting, by which convolutions on GPUs are in TF32.
    if precision := cfg.get("FLOAT32_PRECISION", ""):
        settings["FLOAT32_PRECISION"] = precision
    return canonical(settings)


def maps_used(model: nn.Module) -> list[str]:
    """The maps of the bottom-up network that the neck, or a video model, takes; else all of them."""
    frozen = frozen_backbone_of(model)
    names = list(frozen.output_shape())
    wanted = getattr(model, "features", None) or getattr(model.backbone, "in_features", None) or names
    # With a plain ViT, a neck's inputs are branches on the one map that is stored.
    return [name for name in names if name in wanted] or names


def compute_features(service: FeatureService, sample: dict[str, Any]) -> None:
    """Run the frozen backbone for a sample, by which its features go into the cache; nothing else of the model."""
    model: Any = service.model
    with service.serving([sample]):
        if "video" in sample:
            model.maps(sample["video"])
        else:
            service.frozen(model.preprocess_image([sample]).tensor)


def frozen_backbone_of(model: nn.Module) -> FrozenBackbone:
    """
    Raises:
        ValueError: there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, FrozenBackbone)]
    if len(found) != 1:
        raise ValueError(
            f"MODEL.FROZEN.CACHE.VIEWS is above 0, but the model has {len(found)} wholly frozen backbones; it must be "
            "one. Set MODEL.BACKBONE.NAME: build_frozen_backbone and FREEZE: all, or VIEWS: 0."
        )
    return found[0]


def serve_features(cfg: CfgNode, model: nn.Module, loader: Iterable[Any]) -> FeatureService | None:
    """Let a model take features from the cache and fill it, by what the samples of ``loader`` say.

    With VIEWS above 0 and no DIR, the backbone only runs sample by sample. None without VIEWS. A service that the model
    had before ends.

    Raises:
        ValueError: see :func:`check_cache_settings`; a loader or mapper that does not know of caches.
    """
    check_cache_settings(cfg)
    if not cfg.MODEL.FROZEN.CACHE.VIEWS:
        return None
    frozen = frozen_backbone_of(model)
    cache = open_cache(cfg, model)
    if cache is not None:
        if not isinstance(loader, TrainLoader):
            raise ValueError(
                f"MODEL.FROZEN.CACHE.DIR is set, but the training loader is a {type(loader).__name__}; a cache needs "
                "that of d2_frozen.data.build_train_loader."
            )
        loader.use_cache(cache)
    before = model.__dict__.get("feature_service")
    if before is not None:
        before.remove()
    service = FeatureService(model, frozen, cache, maps_used(model))
    model.__dict__["feature_service"] = service
    return service


class CacheReport(HookBase):
    """``cache/hit_rate`` in the metrics, and at the end all is written to the disk and summed up in the log.

    Args:
        cache: gives the cache, or None, once training has begun.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._seen = (0, 0)

    def after_step(self) -> None:
        cache: FeatureCache | None = self._cache()
        if cache is None:
            return
        seen = cache.statistics
        hits, others = seen.hits - self._seen[0], seen.misses + seen.not_keyable - self._seen[1]
        self._seen = (seen.hits, seen.misses + seen.not_keyable)
        if hits + others:
            self.trainer.storage.put_scalar("cache/hit_rate", hits / (hits + others))

    def after_train(self) -> None:
        cache: FeatureCache | None = self._cache()
        if cache is None:
            return
        cache.close()
        seen = cache.statistics
        logger.info(
            "Feature cache, rank %d: %d of %d samples had their features stored (%.1f %%); %d written, %s%s.",
            comm.get_rank(), seen.hits, seen.hits + seen.misses + seen.not_keyable, 100 * seen.hit_rate(),
            seen.written, gib(seen.written_bytes), f"; {seen.damaged} damaged" if seen.damaged else "",
        )  # fmt: skip


def network_settings(cfg: CfgNode) -> str:
    """What shapes a bottom-up network without being among its weights."""
    builder = cfg.MODEL.FROZEN.BOTTOM_UP
    timm = {
        key: value for key, value in cfg.MODEL.TIMM.items() if key not in ("PRETRAINED", "DROP_PATH_RATE")
    }
    if builder == "build_timm_backbone":
        node = timm
    elif builder in _RESNETS:
        node = dict(cfg.MODEL.RESNETS)
    else:  # of a network of the user's own, keys that are the user's own may be settings
        known = task_of(cfg).add_config(get_cfg())
        node = {"TIMM": timm, "RESNETS": dict(cfg.MODEL.RESNETS), "others": _keys_beside(cfg, known)}
    return f"{builder} {canonical(node)}"


def _keys_beside(node: CfgNode, known: CfgNode) -> dict[str, Any]:
    """What ``node`` has and ``known`` has not, with the names of the nodes that it is in."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key not in known:
            found[key] = value
        elif isinstance(value, CfgNode) and isinstance(known[key], CfgNode):
            found |= {f"{key}.{name}": one for name, one in _keys_beside(value, known[key]).items()}
    return found
