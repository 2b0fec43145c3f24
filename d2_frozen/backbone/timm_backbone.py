"""Any timm network with a feature pyramid, or a plain ViT, as a Detectron2 backbone.

In: a timm model name, and weights if wanted.  Out: {"res2": (B, C2, H/4, W/4), .., "res5": (B, C5, H/32,
W/32)}, channels first whatever the network computes in; of a plain ViT one map, see plain_vit.py.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.func import functional_call

from d2_frozen.backbone import swin_v2_giant  # noqa: F401  (registers its names in timm)
from d2_frozen.backbone.plain_vit import PlainViT, is_plain, plain_vit_arguments
from d2_frozen.backbone.swin_v2 import (
    keep_position_units,
    pad_before_shift,
    unchanged_window_arguments,
)
from d2_frozen.backbone.weight_files import WeightFiles
from d2_frozen.backbone.weights import load_weights
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

# Detectron2's name of the map at each stride, in pixels per cell.
STRIDE_NAMES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
# Where timm's networks have the norm in front of their classifier.
_FINAL_NORMS = ("norm", "head_norm", "head.norm")
# Sides in pixels that networks of one image size are built for; tried where timm's record of the size does not run.
_USUAL_SIDES = (224, 256, 384, 448, 512)
logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """Feature pyramid of a timm network.

    Args:
        network: a timm model with ``feature_info`` and ``forward_intermediates``. Its parts behind the last
            map that is asked for (classifier, final norm) are removed; parameters keep timm's names, behind
            ``network.``.
        out_features: of res2, res3, res4, res5 (strides 4, 8, 16, 32 pixels).
        name: what :meth:`FrozenBackbone.fingerprint` and messages call it.
        size_divisibility: height and width of images must be multiples of this, in pixels.
        final_norm: res5 passes through the network's own norm (see :func:`final_norm_of`), kept as ``final_norm``,
            where it has one.
    Raises:
        ValueError: the network has no map at the stride of a feature, or a feature's name is not known.
    """

    network: Any  # nn.Module does not declare what timm's models have beside forward
    final_norm: nn.Module | None

    def __init__(
        self,
        network: nn.Module,
        out_features: Sequence[str] = tuple(STRIDE_NAMES.values()),
        name: str = "",
        size_divisibility: int = 32,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.name = name or type(network).__name__
        self._size_divisibility = size_divisibility
        channels, index_of = _pyramid(network, self.name)
        unknown = [feature for feature in out_features if feature not in STRIDE_NAMES.values()]
        if unknown or not out_features or len(set(out_features)) < len(out_features):
            raise ValueError(
                f"MODEL.TIMM.OUT_FEATURES is {list(out_features)}; it must name some of "
                f"{', '.join(STRIDE_NAMES.values())}, each once."
            )
        self._out_features = [feature for feature in STRIDE_NAMES.values() if feature in out_features]
        self._out_feature_channels = {f: channels[f] for f in self._out_features}
        self._out_feature_strides = {f: s for s, f in STRIDE_NAMES.items() if f in self._out_features}
        self._indices = [index_of[f] for f in self._out_features]
        # Maps that are not asked for tell their stages too, as long as nothing of them is removed.
        self._stage_indices = [i for i in sorted(index_of.values()) if i <= max(self._indices)]
        self._stage_names = _grouped_parameters(network, by_block=False)
        self._layer_names = _grouped_parameters(network, by_block=True)
        if final_norm and "res5" not in out_features:
            raise ValueError(
                f"MODEL.TIMM.FINAL_NORM is for res5, but MODEL.TIMM.OUT_FEATURES is {list(out_features)}. Set it to "
                "False."
            )
        found = final_norm_of(network, channels["res5"])[1] if final_norm else None
        if final_norm and found is None:
            logger.info("MODEL.TIMM.FINAL_NORM: %s has none; res5 is taken as it is.", self.name)
        self.network = network
        self.network.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        self.final_norm = found

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised images -> {name: (B, C, H / stride, W / stride)}.

        Raises:
            ValueError: the network is built for one image size, and these have another.
        """
        maps = self._maps(images)
        if self.final_norm is not None:
            maps = [*maps[:-1], _normalised(maps[-1], self.final_norm)]
        return dict(zip(self._out_features, maps))

    def _maps(self, images: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling():  # compilers before torch 2.7 do not follow every try
            return _intermediates(self.network, images, self._indices)
        try:
            return _intermediates(self.network, images, self._indices)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as err:
            # Not asked when it is built: at its own size such a network runs, and the images' size is not known there.
            own = _one_size_of(self.network, self._indices, images)
            if own is None:
                raise
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels do not fit MODEL.TIMM.NAME {self.name}, which "
                f"is built for its own image size alone, {own[0]}x{own[1]} pixels (timm: {err or type(err).__name__}). "
                "Take a network for any size, such as swinv2_*, swin_*, convnext_*, resnet*, regnet* or a plain vit_*, "
                "or let all images have that size, in training and in testing."
            ) from err

    @property
    def map_indices(self) -> dict[str, int]:
        """Which of timm's feature maps each feature is."""
        return dict(zip(self._out_features, self._indices))

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f: ShapeSpec(channels=self._out_feature_channels[f], stride=self._out_feature_strides[f])
            for f in self._out_features
        }

    def parameters_by_stage(self, stages: int | None = None) -> list[list[str]]:
        """Names of the parameters of the stem and of each remaining stage, in the order of the forward pass.

        Up to res_k there is what the map res_k depends on, and nothing behind: timm's groups where they are that, else
        the parameters in the order of the modules.

        Args:
            stages: so many parts are asked for; those behind need not be separable. By default all are.
        Raises:
            ValueError: timm does not say what the stem is, or a stage that is asked for cannot be separated.
        """
        stem, *groups = self._remaining(self._stage_names)
        count = len(self._stage_indices)
        parts = [stem, *groups[: count - 1], [name for part in groups[count - 1 :] for name in part]]
        if stages is not None and stages < 2:
            return parts
        asked = count if stages is None else min(stages - 1, count)
        seen = self._seen_by_maps()
        if seen and _end_with_maps(parts, seen, asked):
            return parts
        parts = self._in_order(stem, seen, asked) if seen else []
        if parts and _end_with_maps(parts, seen, asked):
            return parts
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE cannot be {list(STRIDE_NAMES.values())[asked - 1]!r} for MODEL.TIMM.NAME "
            f"{self.name}: what of it lies up to the end of that stage, and what behind, cannot be told apart, as in "
            "networks that fuse their branches. Set it to 'all', 'none' or 'stem', or take another network, such as "
            "swinv2_*, swin_*, convnext_*, resnet* or regnet*."
        )

    def _seen_by_maps(self) -> list[set[str]]:
        """Of each map, fine to coarse, the parameters that it depends on, by autograd; [] where that is not known."""
        first = next((m for m in self.network.modules() if isinstance(m, nn.Conv2d)), None)
        # Two images: batch norms in training need more than one cell.
        shape, dtype = (2, first.in_channels if first else 3), next(self.parameters()).dtype
        run = _first_dry_run(self.network, self._stage_indices, shape, dtype)
        if run is None:
            return []
        names, parameters = list(run.parameters), list(run.parameters.values())
        seen = []
        for one in run.maps:
            slopes = torch.autograd.grad(one.sum(), parameters, allow_unused=True, retain_graph=True)
            seen.append({name for name, slope in zip(names, slopes) if slope is not None})
        return seen

    def _in_order(self, stem: list[str], seen: list[set[str]], count: int) -> list[list[str]]:
        """Stem, the stages of ``count`` maps, and the rest, cut from the parameters in the order of the modules."""
        names = [name for name, _ in self.named_parameters() if name.startswith("network.")]
        used = [name for name in names if any(name in one for one in seen)]
        ends = [len(set(stem) & set(used)), *(len(one) for one in seen[:count])]
        parts = [used[begin:end] for begin, end in zip([0, *ends], ends)]
        in_parts = {name for part in parts for name in part}
        rest = [name for name in names if name not in in_parts]  # behind them, or of no map
        return [*parts, rest] if count < len(seen) else [*parts[:-1], parts[-1] + rest]

    def parameters_by_layer(self) -> list[list[str]]:
        """Names of the parameters of the stem and of each remaining block; merging counts with the block behind it."""
        return self._remaining(self._layer_names)

    def _remaining(self, groups: list[list[str]]) -> list[list[str]]:
        if not groups:
            raise ValueError(
                f"timm gives no stages for {self.name}; set MODEL.BACKBONE.FREEZE to 'all' or 'none', and "
                "SOLVER.LAYER_DECAY to 1.0."
            )
        present = {name for name, _ in self.named_parameters()}
        parts = [[f"network.{name}" for name in part if f"network.{name}" in present] for part in groups]
        return [part for part in parts if part]


def create_timm_backbone(
    name: str,
    pretrained: str = "",
    out_features: Sequence[str] = tuple(STRIDE_NAMES.values()),
    drop_path_rate: float = 0.0,
    in_channels: int = 3,
    arguments: Mapping[str, Any] | None = None,
    final_norm: bool = False,
) -> TimmBackbone | PlainViT:
    """Build a timm network by name, load its weights, and take its feature pyramid, or the last map of a plain ViT.

    Args:
        name: as ``timm.list_models()`` gives it; a tag may follow (``NAME.TAG``).
        pretrained: "" (random), "hub" (timm's weights, downloaded), or files as in :class:`WeightFiles`.
        drop_path_rate: stochastic depth; acts in training mode only, so never in a frozen part.
        arguments: more of ``timm.create_model``, such as ``embed_dim``.
        final_norm: see :class:`TimmBackbone`; a plain ViT always has its own.
    Raises:
        ValueError: unknown name (the nearest ones are listed), no pyramid, or weights that do not fit.
        FileNotFoundError: no weights at ``pretrained``, or none that could be downloaded.
    """
    if not timm.is_model(name):
        known, asked_name = timm.list_models(), name.split(".")[0]
        near = [one for one in known if one.startswith(f"{asked_name}_")][:3]
        near = near or difflib.get_close_matches(asked_name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know. "
            f"{'Nearest: ' + ', '.join(near) + '. ' if near else ''}timm.list_models() lists all."
        )
    asked = {
        **unchanged_window_arguments(name),
        **plain_vit_arguments(name),
        **_checked_arguments(arguments or {}),
    }
    if drop_path_rate:
        asked["drop_path_rate"] = drop_path_rate
    if in_channels != 3:
        asked["in_chans"] = in_channels
    files = None if pretrained in ("", "hub") else WeightFiles(pretrained)
    # Shards are for networks that should not be in memory twice: built without memory, then filled.
    sharded = files is not None and len(files.shards) > 1
    try:
        with torch.device("meta") if sharded else contextlib.nullcontext():
            network = timm.create_model(name, pretrained=pretrained == "hub", num_classes=0, **asked)
    except TypeError as err:
        raise ValueError(
            f"timm's {name} does not take one of {sorted(asked)}: {err}. With MODEL.TIMM.DROP_PATH_RATE 0.0, "
            "MODEL.TIMM.ARGS {} and three image channels nothing special is asked of it."
        ) from err
    except (OSError, RuntimeError) as err:
        if pretrained != "hub":
            raise
        cause = next(iter(str(err).splitlines()), "")
        homeless = isinstance(err, PermissionError) or "home directory" in cause  # a container's user, say
        place = "Set HF_HOME to a folder that can be written to. " if homeless else ""
        raise FileNotFoundError(
            f"MODEL.TIMM.PRETRAINED is 'hub', but timm has got no weights of {name}: {type(err).__name__}: {cause} "
            f"{place}Without internet, give a file of them (docs/own_data.md, 'Backbones without internet'); '' is "
            "random weights. What ships with d2_frozen: NAME swinv2_pico_window8_256, PRETRAINED "
            "d2_frozen://swinv2_pico_fdsl.safetensors."
        ) from err
    plain = is_plain(network)
    if plain and list(out_features) != list(STRIDE_NAMES.values()):
        raise ValueError(
            f"MODEL.TIMM.OUT_FEATURES is {list(out_features)}, but {name} is a plain ViT with one map. Leave it at its "
            "default, and choose the levels of the neck by MODEL.FPN.IN_FEATURES."
        )
    if not plain:
        _pyramid(network, name)
        pad_before_shift(network)
        keep_position_units(network)
    if files is not None:
        load_weights(network, files, ignore=_head_prefixes(network, final_norm=not (plain or final_norm)))
    backbone = (
        PlainViT(network, name)
        if plain
        else TimmBackbone(network, out_features, name=name, final_norm=final_norm)
    )
    assert not sharded or not any(p.is_meta for p in backbone.parameters())
    return backbone


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone | PlainViT:
    """MODEL.TIMM as a bottom-up network without neck."""
    options = cfg.MODEL.TIMM
    backbone = create_timm_backbone(
        options.NAME,
        options.PRETRAINED,
        options.OUT_FEATURES,
        options.DROP_PATH_RATE,
        input_shape.channels,
        options.ARGS,
        options.FINAL_NORM,
    )
    _tell_of_other_pixels(cfg, getattr(backbone.network, "pretrained_cfg", None) or {})
    return backbone


def _tell_of_other_pixels(cfg: CfgNode, made_with: Mapping[str, Any]) -> None:
    """Log it where weights saw other pixels than they will get: nothing else would ever show.

    Networks of timm take RGB, where Detectron2's default is BGR. Mean and deviation are known of the weights that timm
    downloads, of those that ship here, and of a name with a tag, which stands for one set of weights.

    Args:
        made_with: timm's record of them: "mean" and "std" in 0..1.
    """
    options, own = cfg.MODEL.TIMM, cfg.MODEL
    if not options.PRETRAINED or len(own.PIXEL_MEAN) != 3:
        return
    wanted: dict[str, tuple[Any, Any]] = {"INPUT.FORMAT": ("RGB", cfg.INPUT.FORMAT)}
    if options.PRETRAINED.startswith(("hub", "d2_frozen://")) or "." in options.NAME:
        for key, name in (("PIXEL_MEAN", "mean"), ("PIXEL_STD", "std")):
            values = [round(255 * value, 3) for value in made_with.get(name, ())]
            # A level or less is another rounding of the same statistics.
            if values and any(abs(a - b) > 1 for a, b in zip(values, own[key])):
                wanted[f"MODEL.{key}"] = values, list(own[key])
    wrong = {key: pair for key, pair in wanted.items() if pair[0] != pair[1]}
    if wrong:
        logger.warning(
            "MODEL.TIMM.NAME %s: its weights were made with %s, but the config has %s. Set them so, or the features "
            "are not those that the network has learned.",
            options.NAME,
            ", ".join(f"{key} {value}" for key, (value, _) in wrong.items()),
            ", ".join(f"{value}" for _, value in wrong.values()),
        )


def final_norm_of(network: nn.Module, channels: int) -> tuple[str, nn.Module | None]:
    """(name, module) of a timm network's norm in front of its classifier, if it is for maps of so many channels.

    Some apply it before pooling (Swin), some after (ConvNeXt); either way it acts on vectors of channels, so on cells.
    ``("", None)`` where there is none (ResNet, RegNet), or where it is a part of the last stage (PVT).
    """
    modules = dict(network.named_modules())
    for name in _FINAL_NORMS:
        norm = modules.get(name)
        weight = getattr(norm, "weight", None)
        if weight is not None and tuple(weight.shape) == (channels,):
            return name, norm
    return "", None


class _DryRun(NamedTuple):
    size: tuple[int, int]  # height and width of the images, in pixels
    parameters: dict[str, Tensor]  # by the names that they have in TimmBackbone
    maps: list[Tensor]


class _Maps(nn.Module):
    """A timm network whose forward gives maps."""

    def __init__(self, network: nn.Module, indices: list[int]) -> None:
        super().__init__()
        self.network, self.indices = network, indices

    def forward(self, images: Tensor) -> list[Tensor]:
        return _intermediates(self.network, images, self.indices)


def _intermediates(network: Any, images: Tensor, indices: list[int]) -> list[Tensor]:
    return network.forward_intermediates(
        images, indices=indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


def _dry_run(
    network: nn.Module, indices: list[int], shape: Sequence[int], dtype: torch.dtype
) -> _DryRun | None:
    """Maps and graph of autograd without memory or arithmetic, for images of (B, C, H, W); None where timm fails."""
    module = _Maps(network, indices)
    parameters = {
        n: torch.empty_like(p, device="meta", requires_grad=True) for n, p in module.named_parameters()
    }
    buffers = {n: torch.empty_like(b, device="meta") for n, b in module.named_buffers()}
    try:
        with torch.enable_grad():
            images = torch.empty(tuple(shape), dtype=dtype, device="meta")
            maps = functional_call(module, {**parameters, **buffers}, (images,))
    except Exception:
        return None
    return _DryRun((shape[-2], shape[-1]), parameters, maps)


def _first_dry_run(
    network: Any, indices: list[int], shape: Sequence[int], dtype: torch.dtype
) -> _DryRun | None:
    """Of images (B, C, ...) with the size of timm's record, or a usual one: MODEL.TIMM.ARGS may ask for another."""
    record = getattr(network, "pretrained_cfg", None) or {}
    recorded = tuple(record.get("input_size") or ())[-2:]
    for size in (recorded, *((side, side) for side in _USUAL_SIDES)):
        if len(size) == 2 and (run := _dry_run(network, indices, (*shape[:2], *size), dtype)):
            return run
    return None


def _one_size_of(network: Any, indices: list[int], images: Tensor) -> tuple[int, int] | None:
    """(height, width) that a network runs on where it is their size that keeps it from these images; else None."""
    if images.dim() != 4 or _dry_run(network, indices, images.shape, images.dtype):
        return None
    run = _first_dry_run(network, indices, images.shape, images.dtype)
    return run.size if run else None


def _end_with_maps(parts: list[list[str]], seen: list[set[str]], count: int) -> bool:
    """Do the stages of the first ``count`` maps end where these do? What no map depends on may be anywhere."""
    used = set().union(*seen)
    so_far = set(parts[0])
    for part, one in zip(parts[1 : count + 1], seen):
        so_far |= set(part)
        if so_far & used != one:
            return False
    return len(parts) > count


def _normalised(feature: Tensor, norm: nn.Module) -> Tensor:
    """(B, C, h, w) -> the same shape."""
    if isinstance(norm, nn.GroupNorm) or type(norm).__name__.endswith(
        "2d"
    ):  # timm's, too: LayerNorm2d, RmsNorm2d
        return norm(feature)
    return norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def _pyramid(network: nn.Module, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Channels and index among timm's feature maps, by res2..res5."""
    info = getattr(network, "feature_info", None)
    maps = list(info) if isinstance(info, list) else (info.get_dicts() if info is not None else [])
    channels, index_of = {}, {}
    for index, one in enumerate(maps):
        feature = STRIDE_NAMES.get(one["reduction"])
        if feature is not None:  # where several maps share a stride, the deepest counts
            channels[feature], index_of[feature] = one["num_chs"], index
    lacking = [f"{stride} ({f})" for stride, f in STRIDE_NAMES.items() if f not in channels]
    if lacking or not hasattr(network, "forward_intermediates"):
        strides = sorted({one["reduction"] for one in maps})
        raise ValueError(
            f"MODEL.TIMM.NAME {name} has no feature pyramid: its maps have strides {strides or 'unknown'}, "
            f"strides {', '.join(lacking) or 'are there, but no forward_intermediates'} are missing. "
            "Use a hierarchical network such as swinv2_*, swin_*, convnext_* or resnet*, or a plain ViT of timm's "
            "vision_transformer, deit or eva (vit_*, deit*, eva*)."
        )
    return channels, index_of


def _checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """MODEL.TIMM.ARGS with tuples for lists, as timm's models have them."""
    elsewhere = {
        "pretrained": "MODEL.TIMM.PRETRAINED",
        "drop_path_rate": "MODEL.TIMM.DROP_PATH_RATE",
        "in_chans": "INPUT.FORMAT",
        "out_indices": "MODEL.TIMM.OUT_FEATURES",
        "num_classes": "nothing, as the classifier is not used",
        "features_only": "nothing, as the feature pyramid is always taken",
    }
    wrong = [f"{key} (set by {elsewhere[key]})" for key in arguments if key in elsewhere]
    if wrong:
        raise ValueError(f"MODEL.TIMM.ARGS may not hold {', '.join(wrong)}.")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def _head_prefixes(network: nn.Module, final_norm: bool = True) -> tuple[str, ...]:
    """Names of what is not used: the classifier, and with ``final_norm`` the norm in front of it."""
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = [classifier] if isinstance(classifier, str) else list(classifier)
    norms = ("norm.", "head_norm.") if final_norm else ()
    head = getattr(network, "head", None)
    heads = {"head."}
    if not final_norm and isinstance(getattr(head, "norm", None), nn.Module):
        assert isinstance(head, nn.Module)
        heads = {f"head.{name}." for name, _ in head.named_children() if name != "norm"}
    return tuple({*(f"{c}." for c in classifiers), *heads, "fc.", *norms})


def _grouped_parameters(network: Any, by_block: bool) -> list[list[str]]:
    """Stem, then one group per stage or block, as timm's groups of layer-wise learning rates have it."""
    if not hasattr(network, "group_matcher"):
        return []
    try:
        groups = group_parameters(network, network.group_matcher(coarse=not by_block))
    except AssertionError:  # RDNet has no coarse ones
        return []
    head = _head_prefixes(network)
    parts = [[n for n in groups[key] if not n.startswith(head)] for key in sorted(groups)]
    return [part for part in parts if part]
