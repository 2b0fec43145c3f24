"""Which feature maps belong into one heatmap? The paper's comparisons by name, and any two globs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2_frozen.study.cka.names import INPUT, matcher, matching

# A cell of a heatmap: which map of ``x`` with which of ``y``; None for no comparison.
Pair = tuple[str, str] | None


@dataclass
class Panel:
    """One heatmap.

    Args:
        title: what is compared.
        rows, columns: labels.
        pairs: names of feature maps, (rows, columns).
    """

    title: str
    rows: list[str]
    columns: list[str]
    pairs: list[list[Pair]]

    @classmethod
    def all_pairs(cls, title: str, rows: dict[str, str], columns: dict[str, str]) -> Panel:
        """Every one of ``rows`` with every one of ``columns``, both feature map -> label."""
        pairs: list[list[Pair]] = [[(x, y) for y in columns] for x in rows]
        return cls(title, list(rows.values()), list(columns.values()), pairs)


@dataclass(frozen=True)
class Comparison:
    """What ``study cka`` measures.

    Args:
        wanted_x, wanted_y: is this feature map part of it?
        panels: (names of all maps of the model for x, of that for y) -> the heatmaps.
            Raises ValueError if there are none.
    """

    wanted_x: Callable[[str], bool]
    wanted_y: Callable[[str], bool]
    panels: Callable[[Sequence[str], Sequence[str]], list[Panel]]


@dataclass(frozen=True)
class Preset:
    """A comparison by name.

    Args:
        about: what it compares, for --help.
        pattern: of all its feature maps.
        panels: (names found) -> heatmaps; empty if the model has no such part.
        two_models: does it compare the same maps of two models?
    """

    about: str
    pattern: str
    panels: Callable[[Sequence[str]], list[Panel]]
    two_models: bool = False

    def comparison(self) -> Comparison:
        fits = re.compile(self.pattern).fullmatch

        def wanted(name: str) -> bool:
            return fits(name) is not None

        def panels(x: Sequence[str], y: Sequence[str]) -> list[Panel]:
            of_both = set(y)
            found = self.panels([name for name in x if wanted(name) and name in of_both])
            if not found:
                raise ValueError(
                    f"the model has nothing that this preset compares: {self.about}. `study cka --list` prints the "
                    "names of its feature maps, which --x and --y take."
                )
            return found

        return Comparison(wanted, wanted, panels)


def of_globs(x: str, y: str) -> Comparison:
    """All maps that fit ``x`` with all that fit ``y``."""

    def panels(names_x: Sequence[str], names_y: Sequence[str]) -> list[Panel]:
        rows, columns = matching(x, names_x), matching(y, names_y)
        labels_x, labels_y = dict(zip(rows, rows)), dict(zip(columns, columns))
        return [Panel.all_pairs(f"{x}  and  {y}", labels_x, labels_y)]

    return Comparison(matcher(x), matcher(y), panels)


def _bifpn(names: Sequence[str]) -> list[Panel]:
    levels = _found(r"backbone\.layers\.0:input\[(\d+)\]", names)
    outputs = [name.removeprefix("backbone[")[:-1] for name in _found(r"backbone\[(.+)\]", names).values()]
    if not levels or len(outputs) != len(levels):
        return []
    layers = sorted({int(key[0]) for key in _found(r"backbone\.layers\.(\d+)\[\d+\]", names)})
    pairs: list[list[Pair]] = [
        [(x, f"backbone.layers.{layer}[{level}]") for layer in layers] for (level,), x in levels.items()
    ]
    blocks = [f"layer {layer + 1}" for layer in layers]
    return [Panel("BiFPN: input of a level with outputs of the layers", outputs, blocks, pairs)]


def _residual_fpn(names: Sequence[str]) -> list[Panel]:
    inputs = _found(r"backbone\.residual\.(\w+)\.0:input", names)
    blocks = sorted({int(key[1]) for key in _found(r"backbone\.residual\.(\w+)\.(\d+)", names)})
    if not inputs:
        return []
    pairs: list[list[Pair]] = [
        [(x, f"backbone.residual.{level}.{block}") for block in blocks] for (level,), x in inputs.items()
    ]
    columns = [f"block {block + 1}" for block in blocks]
    levels = [level for (level,) in inputs]
    return [Panel("FPN with residual blocks: level with outputs of its blocks", levels, columns, pairs)]


def _cascade(names: Sequence[str]) -> list[Panel]:
    panels = []
    for part, first, layer in (
        ("box", "", r"(?:conv|fc_relu)\d+"),
        ("mask", r"\.mask_fcn1", r"mask_fcn\d+"),
    ):
        head = rf"roi_heads\.{part}_head(?:\.(\d+))?"
        inputs = _found(head + first + INPUT, names)
        hidden = _found(rf"{head}\.({layer})", names)
        if inputs and hidden:
            rows = {name: f"{_stage(key[0])}input" for key, name in inputs.items()}
            columns = {
                name: f"{_stage(key[0])}{key[1].replace('fc_relu', 'fc').replace('mask_fcn', 'conv')}"
                for key, name in hidden.items()
            }
            panels.append(
                Panel.all_pairs(
                    f"{part.capitalize()} heads: input of a stage with hidden layers", rows, columns
                )
            )
    return panels


def _stage(number: str) -> str:
    return f"stage {int(number) + 1} " if number else ""


def _pixel_decoder(names: Sequence[str]) -> list[Panel]:
    decoder = r"sem_seg_head\.pixel_decoder"
    layers = {
        name: f"layer {int(key[0]) + 1}"
        for key, name in _found(decoder + r"\.transformer\.encoder\.layers\.(\d+)", names).items()
    }
    first = _found(decoder + r"\.transformer\.encoder\.layers\.0:input\[0\]", names)
    inputs = _found(decoder + r"\.input_proj\.(\d+)", names)
    outputs = _found(decoder + r"\[1\]\[(\d+)\]", names)
    panels = []
    if layers and first:
        rows = {**dict.fromkeys(first.values(), "input"), **layers}
        panels.append(Panel.all_pairs("Pixel decoder: encoder layers, cells of all maps", rows, layers))
    if inputs and outputs:
        rows = {name: f"input {_coarseness(key[0])}" for key, name in inputs.items()}
        columns = {name: f"output {_coarseness(key[0])}" for key, name in outputs.items()}
        panels.append(Panel.all_pairs("Pixel decoder: map by map", rows, columns))
    return panels


def _coarseness(position: str) -> str:
    return f"{int(position) + 1}" + (" (coarsest)" if position == "0" else "")


def _transformer_decoder(names: Sequence[str]) -> list[Panel]:
    maps = {
        name: f"map {_coarseness(key[0])}"
        for key, name in _found(r"sem_seg_head\.pixel_decoder\[1\]\[(\d+)\]", names).items()
    }
    masks = dict.fromkeys(_found(r"sem_seg_head\.pixel_decoder\[0\]", names).values(), "mask features")
    layers = {
        name: f"layer {int(key[0]) + 1}"
        for key, name in _found(r"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)", names).items()
    }
    if not layers:
        return []
    title = "Transformer decoder: its input and queries with queries after the layers"
    return [Panel.all_pairs(title, {**maps, **masks, **layers}, layers)]


def _video_blocks(names: Sequence[str]) -> list[Panel]:
    blocks = _found(r"(heads?(?:\.\w+)?)\.blocks\.(\d+)", names)
    panels = []
    for head in dict.fromkeys(key[0] for key in blocks):
        layers = {name: f"block {int(key[1]) + 1}" for key, name in blocks.items() if key[0] == head}
        layers |= {f"{head}.pooling": "query"} if f"{head}.pooling" in names else {}
        rows = {f"{head}.blocks.0{INPUT}": "input", **layers}
        panels.append(Panel.all_pairs(f"Video blocks ({head})", rows, layers))
    return panels


# Blocks of timm's and Detectron2's networks, and the maps that they give.
_BLOCK = (
    r"backbone((?:\.bottom_up)*)\.(?:network\.)?"
    r"((?:.+\.)?(?:blocks\.\d+|layer\d\.\d+|stages[._]\d\.\d+|res[2-5]\.\d+))"
)
_MAP = r"backbone((?:\.bottom_up)*)\[(\w+)\]"


def _backbone(names: Sequence[str]) -> list[Panel]:
    for pattern in (_BLOCK, _MAP):
        found = _in_order(pattern, names)
        # The innermost network: what stands on it may have such names too.
        inner = max((prefix for prefix, _ in found), key=len, default="")
        layers = {name: label for (prefix, label), name in found.items() if prefix == inner}
        if layers:
            same: list[list[Pair]] = [[(name, name) for name in layers]]
            labels = list(layers.values())
            return [
                Panel("Backbone: the same layer of two models", ["same layer"], labels, same),
                Panel.all_pairs(
                    "Backbone: layers of the first model (rows) and of the other", layers, layers
                ),
            ]
    return []


def _found(pattern: str, names: Sequence[str]) -> dict[tuple[str, ...], str]:
    """What the groups of ``pattern`` hold -> the name; numbers in their order, not as text."""
    found = _in_order(pattern, names)
    order = sorted(found, key=lambda groups: [_number(text) for text in groups])
    return {groups: found[groups] for groups in order}


def _in_order(pattern: str, names: Sequence[str]) -> dict[tuple[str, ...], str]:
    fits = re.compile(pattern).fullmatch
    return {match.groups(default=""): name for name in names if (match := fits(name))}


def _number(text: str) -> tuple[str, int]:
    letters = text.rstrip("0123456789")
    return (letters, int(text[len(letters) :] or 0))


PRESETS = {
    "bifpn": Preset(
        "input of each level of a BiFPN with the output of each of its layers",
        r"backbone\.layers\.(0:input\[\d+\]|\d+\[\d+\])|backbone\[\w+\]",
        _bifpn,
    ),
    "residual_fpn": Preset(
        "each level of an FPN with the output of each residual block on it",
        r"backbone\.residual\.\w+\.(0:input|\d+)",
        _residual_fpn,
    ),
    "cascade": Preset(
        "RoI input of each stage of box and mask heads (Cascade, HTC, or only one) with each hidden layer",
        r"roi_heads\.(box|mask)_head.*",
        _cascade,
    ),
    "pixel_decoder": Preset(
        "encoder layers of Mask2Former's pixel decoder with its input and each other",
        r"sem_seg_head\.pixel_decoder(\.input_proj\.\d+|\.transformer\.encoder\.layers\.(0:input\[0\]|\d+)|\[1\]\[\d\])",
        _pixel_decoder,
    ),
    "transformer_decoder": Preset(
        "queries of Mask2Former's decoder after each layer with its input maps and each other",
        r"sem_seg_head\.(pixel_decoder(\[0\]|\[1\]\[\d\])|predictor\.transformer_ffn_layers\.\d+)",
        _transformer_decoder,
    ),
    "video_blocks": Preset(
        "blocks of a video head with their input and each other",
        r"heads?(\.\w+)?\.(blocks\.(0:input|\d+)|pooling)",
        _video_blocks,
    ),
    "backbone": Preset(
        "the same layers of two models, for instance frozen and fine-tuned",
        f"{_BLOCK}|{_MAP}",
        _backbone,
        two_models=True,
    ),
}
