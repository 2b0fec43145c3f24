"""From files of heads to models ready to predict, those with equal backbones on one of them."""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from d2_frozen import tasks
from d2_frozen.backbone import share_equal_backbones
from d2_frozen.data.draws import start_values
from d2_frozen.engine import FrozenCheckpointer, has_backbone, look_into_checkpoint
from d2_frozen.engine.caching import network_settings
from d2_frozen.files import write_text
from d2_frozen.tasks import Classes, ClipPrediction, Prediction
from detectron2.config import CfgNode
from detectron2.modeling import build_model

logger = logging.getLogger(__name__)

# Folders that results have beside those of heads, or that are none.
_NO_NAMES = ("", ".", "..", "pictures")
# What of a config says how a backbone computes, besides its weights.
_NO_MATTER = ("PRETRAINED", "DROP_PATH_RATE", "SAVE_FULL_MODEL", "CACHE")


@dataclass
class Head:
    """One trained head, on its backbone, ready to predict.

    Attributes:
        name: unique among the heads of a run; names its folder of results.
        file: it was read from.
        task: in words: "detection".
        cfg: complete.
        classes: names and the data's ids; None for files that do not tell.
        model: in evaluation mode; ``prediction.testing_model`` of it for pictures.
        prediction: what to give the model, and what to do with its results.
    """

    name: str
    file: str
    task: str
    cfg: CfgNode
    classes: Classes | None
    model: nn.Module
    prediction: Prediction | ClipPrediction

    @property
    def takes_clips(self) -> bool:
        """Videos instead of pictures?"""
        return hasattr(self.prediction, "clips")


def load_heads(
    files: Sequence[str | Path],
    config_files: Sequence[str | Path] = (),
    device: str | None = None,
    options: Sequence[str] = (),
) -> list[Head]:
    """Read heads, each NAME=FILE or FILE; equal frozen backbones become one.

    Args:
        files: checkpoints. A name is by default that of the file; of its folder for ``model_final.pth``.
        config_files: one per file; by default what the checkpoint says, else ``config.yaml`` beside it.
        device: "cpu", "cuda:0", ...; by default that of the config where it is there, else a GPU, else the CPU.
        options: KEY VALUE, over the config of every head that has the key.
    Raises:
        FileNotFoundError: no such file, or no config for it.
        ValueError: two heads of one name, a name that is no folder's, another number of configs than of files, a config
            without class count, a device that is not there, or an option that no head has.
        CheckpointMismatchError: file and config do not belong together.
    """
    if not files:
        raise ValueError("no heads: give at least one checkpoint.")
    if config_files and len(config_files) != len(files):
        raise ValueError(
            f"{len(files)} heads, but {len(config_files)} config files: give one for each, or none."
        )
    check_device(device)
    if len(options) % 2:
        raise ValueError(f"options are KEY VALUE pairs; {list(options)} has a key without value.")
    named = [_name_and_file(str(file)) for file in files]
    names = distinct_names([name for name, _ in named])
    for name in names:
        if name in _NO_NAMES:
            raise ValueError(
                f"a head cannot be called {name!r}: its results get a folder. Name it: NAME=FILE."
            )
    configs = [str(config) for config in config_files] or [""] * len(files)
    heads: list[Head] = []
    keys_of_all: set[str] = set()
    for name, (_, file), config in zip(names, named, configs):
        checkpoint = look_into_checkpoint(file)
        needs_no_other = has_backbone(checkpoint)
        facts = {key: value for key, value in checkpoint.items() if key != "model"}
        del checkpoint
        keys = _keys(_config(file, config, facts, []))
        keys_of_all |= keys
        own = [
            text for key, value in zip(options[::2], options[1::2]) if key in keys for text in (key, value)
        ]
        cfg = _config(file, config, facts, own)
        if needs_no_other:
            cfg.MODEL.TIMM.PRETRAINED = ""
        classes = _classes_in(facts) or _built_in_classes(cfg)
        heads.append(build_head(name, cfg, classes, device=device, file=file))
        # One after the other, so that never more than two copies of a backbone are in memory.
        share_backbones(heads)
    for key in options[::2]:
        if key not in keys_of_all:
            near = difflib.get_close_matches(key, keys_of_all, n=1)
            raise ValueError(
                f"no head has the config key {key}" + (f"; did you mean {near[0]}?" if near else ".")
            )
    return heads


def check_device(device: str | None) -> None:
    """
    Raises:
        ValueError: no such device, or not on this machine.
    """
    if device is None:
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as err:
        raise ValueError(f"device {device!r} is not known; give cpu, cuda, or cuda:0 and so on.") from err
    count = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ValueError(f"device {device!r}: torch sees {count} GPUs here. Give another, or cpu.")


def device_here(trained_on: str) -> str:
    """MODEL.DEVICE of a head that may have been trained on another machine, as load_heads says."""
    if not trained_on.startswith("cuda"):
        return trained_on
    if not torch.cuda.is_available():
        return "cpu"
    return trained_on if (torch.device(trained_on).index or 0) < torch.cuda.device_count() else "cuda"


def build_head(
    name: str, cfg: CfgNode, classes: Classes | None = None, *, device: str | None = None, file: str = ""
) -> Head:
    """The model of a config, with the weights of ``file`` where one is given (else new ones), ready to predict.

    Args:
        cfg: not frozen; its class count and device are filled in.
    Raises:
        ValueError: a part that is not registered, and see ``load_heads``.
    """
    task = tasks.task_of(cfg)
    prediction = task.prediction(cfg, classes)
    cfg.MODEL.DEVICE = device or device_here(cfg.MODEL.DEVICE)
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ValueError(f"{name}: INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; prediction has RGB and BGR.")
    cfg.MODEL.WEIGHTS = file
    cfg.freeze()
    # A backbone of random weights is that of training again.
    with start_values(cfg.SEED) if cfg.SEED >= 0 else contextlib.nullcontext():
        try:
            model = build_model(cfg)
        except KeyError as err:  # a part that is not registered: one's own, say, whose module nobody imported
            raise ValueError(f"{name}: {err.args[0]}") from err
    if file:
        if classes is None:
            logger.warning("%s does not name its classes; they are called by number.", file)
        FrozenCheckpointer(model, strict=True).load(file, checkpointables=[])
    model.eval()
    return Head(name, file, task.name, cfg, classes, model, prediction)


def share_backbones(heads: Sequence[Head]) -> list[list[int]]:
    """See :func:`share_equal_backbones`."""
    return share_equal_backbones(
        [head.model for head in heads], [backbone_settings(head.cfg) for head in heads]
    )


def backbone_settings(cfg: CfgNode) -> Hashable:
    """What of a config, besides the weights, decides what its frozen network computes."""
    model = cfg.MODEL
    parts = [model.FROZEN, model.TIMM, model.BACKBONE, model.RESNETS]
    texts = [str(_without(part)) for part in parts]
    return *texts, network_settings(cfg)  # which knows of keys of one's own


def _without(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without(value) for key, value in sorted(node.items()) if key not in _NO_MATTER}
    return node


def _keys(node: CfgNode, above: str = "") -> set[str]:
    """Full names of all keys of a config, sections included."""
    found = set()
    for key, value in node.items():
        found.add(above + key)
        if isinstance(value, CfgNode):
            found |= _keys(value, f"{above}{key}.")
    return found


def _config(file: str, config_file: str, facts: dict[str, Any], options: list[str]) -> CfgNode:
    beside = Path(file).with_name("config.yaml")
    if not config_file and isinstance(facts.get("config"), str):
        return _read_text(file, facts["config"], options)
    if not config_file and not beside.is_file():
        raise FileNotFoundError(
            f"no config for {file}: it holds none, and there is no {beside}. Training writes config.yaml into "
            "OUTPUT_DIR; put it beside the file, or name it with --config-files."
        )
    return tasks.read_config(config_file or str(beside), options)


def _read_text(file: str, text: str, options: list[str]) -> CfgNode:
    """A config that was dumped into a checkpoint, perhaps a downloaded one: plain values only, no other files."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ValueError(
            f"{file} holds a config that is no plain yaml: {err}. Give another with --config-files."
        ) from err
    if not isinstance(content, dict) or "_BASE_" in content:
        raise ValueError(f"{file} holds a config that is not complete. Give another with --config-files.")
    with tempfile.TemporaryDirectory() as folder:
        beside = write_text(Path(folder, "config.yaml"), text)
        try:
            return tasks.read_config(beside, options)
        except KeyError as err:
            what = str(err.args[0]).removeprefix(f"{beside}: ")
            raise ValueError(
                f"the config in {file} has a key that is not known here: {what.rstrip('.')}. Keys of a project's own "
                "are known once the module that registers them is imported (docs/library.md, parts of your own); a "
                "newer d2_frozen may have others too."
            ) from err


def _classes_in(facts: dict[str, Any]) -> Classes | None:
    names = facts.get("classes")
    if not names:
        return None
    ids = [number if isinstance(number, str) else int(number) for number in facts["class_ids"]]
    return Classes([str(name) for name in names], ids)


def _built_in_classes(cfg: CfgNode) -> Classes | None:
    """Of data that is known by name, such as COCO, whether its files are here or not; for the model zoo's heads."""
    try:
        classes = tasks.task_of(cfg).classes(cfg)
    except (OSError, KeyError):
        return None
    counts = (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    return classes if classes is not None and len(classes.names) in counts else None


def _name_and_file(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", name) and "?" not in name:
        return name, file
    path = Path(text.partition("?")[0])
    plain = re.fullmatch(r"model_(final|\d+)", path.stem)
    return (path.resolve().parent.name if plain and path.resolve().parent.name else path.stem), text


def distinct_names(names: Sequence[str]) -> list[str]:
    """The second "det" becomes "det_2"."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    if len(set(result)) != len(result):
        raise ValueError(f"names of heads are not distinct: {', '.join(result)}. Name them: NAME=FILE.")
    return result
