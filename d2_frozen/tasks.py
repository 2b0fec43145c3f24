"""Which task is a config of? MODEL.META_ARCHITECTURE says it; the app of that task is imported only then.

An app is a package with a module ``task`` in which an object ``TASK`` has the attributes of :class:`Task`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn

from d2_frozen.config import add_keys_of_others
from detectron2.config import CfgNode, get_cfg

# Meta-architecture -> package of the app. All others are detection's (R-CNNs, Detectron2's own models).
APPS = {
    "FrozenSegmentor": "seg_app",
    "FrozenVideoClassifier": "video_app",
    "FrozenVideoSweep": "video_app",
}
DETECTION = "d2_frozen.detection"
# Keys that change where, how fast and with how many files a run goes, not what comes out.
NOT_PART_OF_RESULT = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.FROZEN.CACHE.DIR",
    "MODEL.FROZEN.CACHE.MAX_GB",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINTS_KEPT",
    "SOLVER.BEST_CHECKPOINT",
    "TEST.PICTURES",
)


class Classes(NamedTuple):
    """What a head tells apart, in the order of its class ids.

    names: for people. ids: the data's own numbers for them (COCO's category ids, values in label maps); COCO files in
    the wild have text there too.
    """

    names: list[str]
    ids: Sequence[int | str]


class Task(Protocol):
    """What ``train_net`` and ``predict`` need to know of a task. Nothing of it is imported before it is used."""

    # In words, for messages: "detection".
    name: str

    def add_config(self, cfg: CfgNode) -> CfgNode:
        """Add the keys of the task to Detectron2's, in place, and register its models; returns ``cfg``."""

    def prepare_datasets(self, cfg: CfgNode, train: bool) -> None:
        """Register and check the data that ``cfg`` uses, and fill in what is taken from it (class counts)."""

    def trainer(self) -> Any:
        """The trainer's class: :class:`d2_frozen.engine.FrozenTrainer` or one derived from it."""

    def write_pictures(self, cfg: CfgNode, model: nn.Module, dataset_name: str) -> Path | None:
        """Predictions beside the truth, as one picture; None where the config asks for none."""

    def classes(self, cfg: CfgNode) -> Classes | None:
        """Of the registered data that ``cfg`` trains on; None where it does not name them. Goes into checkpoints."""

    def generated_batch(self, cfg: CfgNode, count: int) -> list[dict[str, Any]]:
        """``count`` training samples without data, as large as those of training: for measuring how long steps take.

        ``cfg`` has a class count.
        """

    def data_view(self, cfg: CfgNode) -> DataView:
        """How the prepared data of ``cfg`` looks."""

    def prediction(self, cfg: CfgNode, classes: Classes | None) -> Prediction | ClipPrediction:
        """How a head with this config predicts, without its data; lacking ``classes``, they are called by number.

        A class count of -1 is filled in, in place; ValueError where there are no classes to count.
        """


class DataView(Protocol):
    """Pictures, (h, w, 3) uint8 RGB, and numbers of what trains: for people, before a training."""

    def labelled(self, dataset_name: str, count: int) -> list[np.ndarray]:
        """Images spread over a registered dataset, with what is labelled on them."""

    def sample(self, sample: dict[str, Any]) -> list[np.ndarray]:
        """A training sample as the model gets it."""

    def dataset_facts(self, dataset_name: str) -> str:
        """How many images, objects, ... of which class; lines of text."""

    def sample_facts(self, samples: Sequence[dict[str, Any]]) -> str:
        """What augmentation makes of them: sizes, shares; lines of text."""


class Prediction(Protocol):
    """A head that predicts pictures: what it wants of them, and what becomes of its results."""

    def testing_model(self, model: nn.Module) -> nn.Module:
        """What is called to test: the model, or a wrapper of it."""

    def compact_model(self, model: nn.Module) -> nn.Module:
        """What is called where compact results are all that is wanted: ``compact`` takes what it gives."""

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels to which a picture of this size is resized."""

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the results that the testing model is asked for; may be smaller, to save memory."""

    def compact(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result of either model, on the CPU and without what is not needed any more; of a compact one, itself."""

    def record(
        self, result: dict[str, Any], height: int, width: int, folder: Path, name: str
    ) -> dict[str, Any]:
        """What to store of a result, as plain values.

        What is no text goes into files of ``folder``, named by ``name``: the picture's, without suffix, perhaps with /.
        """

    def draw(self, picture: np.ndarray, result: dict[str, Any], min_score: float) -> np.ndarray:
        """A result on its picture, (H, W, 3) uint8 RGB, without what scores lower; a new array."""

    def collect(self, records: Iterable[dict[str, Any]], folder: Path) -> Path | None:
        """All records of a run in the file format of the task; None where the records are all there is.

        Each is what ``record`` gave, with "file", "height", "width", and in videos "frame" and "seconds".
        """


class ClipPrediction(Protocol):
    """A head that predicts videos, clip by clip."""

    def clips(self, path: Path) -> Iterator[tuple[float, float, dict[str, Any]]]:
        """(start, end) in seconds and the model's input, of every clip of a video; the later of two holds."""

    def record(self, result: dict[str, Any], model_input: dict[str, Any]) -> dict[str, Any]:
        """What to store of the model's result for this input, as plain values."""

    def draw(self, picture: np.ndarray, record: dict[str, Any], min_score: float) -> np.ndarray:
        """A clip's record on one of its frames, (H, W, 3) uint8 RGB, without what scores lower; a new array."""


def fill_class_count(heads: CfgNode, classes: Classes | None, key: str) -> int:
    """``heads.NUM_CLASSES``, taken from ``classes`` where it is -1; ``key`` is its full name, for the error.

    Raises:
        ValueError: -1 and no classes, or another number than there are names.
    """
    if heads.NUM_CLASSES < 0 and classes is None:
        raise ValueError(
            f"{key} is -1 (take it from the data), and the file of the head does not name its classes. Give the "
            "config.yaml that training wrote (--config-files), or set the number."
        )
    if classes is not None and heads.NUM_CLASSES not in (-1, len(classes.names)):
        raise ValueError(
            f"{key} is {heads.NUM_CLASSES}, but the file of the head names {len(classes.names)} classes. Give the "
            "config it was trained with."
        )
    if heads.NUM_CLASSES < 0:
        assert classes is not None
        heads.NUM_CLASSES = len(classes.names)
    return int(heads.NUM_CLASSES)


def task_of(cfg: CfgNode) -> Task:
    """The task of a complete config."""
    return _load(APPS.get(cfg.MODEL.META_ARCHITECTURE, DETECTION))


def read_config(config_file: str | Path, options: Iterable[str] = ()) -> CfgNode:
    """A yaml file ("" for none) and KEY VALUE options over the defaults of their task; ~ is the home folder.

    Defaults include those of :func:`d2_frozen.register_config`.

    Raises:
        KeyError, AssertionError: unknown key in the file / in the options, or options that are no pairs.
        ValueError: a value of another type than the default.
        FileNotFoundError: no such file, or none that its _BASE_ names.
    """
    options = list(options)
    _check_pairs(options)
    try:
        task = _load(APPS.get(_meta_architecture(config_file, options) or "", DETECTION))
        cfg = add_keys_of_others(task.add_config(get_cfg()))
        if config_file:
            cfg.merge_from_file(str(config_file))
        cfg.merge_from_list(options)
    except FileNotFoundError as err:
        raise _missing(Path(err.filename or config_file), Path(config_file)) from err
    except UnicodeDecodeError as err:
        # The original reads in the encoding of the locale.
        advice = (
            "Save it as UTF-8" if err.encoding.startswith("utf") else "Set PYTHONUTF8=1 before the command"
        )
        raise ValueError(
            f"{config_file}, or a _BASE_ of it, is no text in {err.encoding.upper()}: {err}. {advice}."
        ) from err
    except ValueError as err:
        advice = _how_to_write(str(err))
        if not advice:
            raise
        raise ValueError(f"{err}. {advice}") from err
    # A shell expands ~ where it begins a word, but nobody does in a yaml: a folder of that name would be made.
    for node, key in (
        (cfg, "OUTPUT_DIR"),
        (cfg.MODEL, "WEIGHTS"),
        (cfg.MODEL.TIMM, "PRETRAINED"),
        (cfg.MODEL.FROZEN.CACHE, "DIR"),
    ):
        path = os.path.expanduser(node[key])
        if path == "~" or path.startswith("~/"):
            raise ValueError(
                f"{key} is {path!r}, but this user has no home folder, as in some containers. Set HOME, or write the "
                "path from / on."
            )
        node[key] = path
    return cfg


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in a config, or in the mappings that its yaml holds."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _how_to_write(error: str) -> str:
    """Advice on a value that yacs takes for one of another type; "" for none."""
    kinds = re.search(
        r"Type mismatch \(<class '([\w.]+)'> vs. <class '(\w+)'>\) with values \(.* vs. (.*)\)", error
    )
    wanted, seen, value = kinds.groups() if kinds else ("", "", "")
    if wanted in ("tuple", "list") and seen in ("str", "int", "float"):
        how = "KEY \"('a', 'b')\", or \"('a',)\" for one: with quotes around what a shell would take apart"
        return f"A list is written as {how}."
    if (wanted, seen) == ("float", "int"):
        return f"A number with a point is wanted: {value}.0"
    if wanted == "bool":
        return "Write True or False."
    if (wanted, seen) == ("str", "int"):
        return (
            f"Text that looks like a number is written '{value}' in a yaml, \"'{value}'\" on a command line."
        )
    return ""


def _check_pairs(options: list[str]) -> None:
    """Refuse what is often written instead of KEY VALUE, with advice; what else is wrong is Detectron2's to say."""
    flags = [text for text in map(str, options) if text.startswith("--")]
    if flags:
        raise AssertionError(
            f"{flags[0]} stands behind KEY VALUE options; flags come before the first of them. Options: {options}"
        )
    joined = [text for text in map(str, options[::2]) if re.match(r"[A-Z][A-Z0-9_.]*=", text)]
    if joined:
        key, value = joined[0].split("=", 1)
        raise AssertionError(f"{joined[0]} is no pair of KEY VALUE. Write: {key} {value or repr('')}")


def _missing(path: Path, config_file: Path) -> FileNotFoundError:
    of = "" if path == config_file else f", which is a _BASE_ of {config_file}"
    beside = [other.name for other in path.parent.glob("*.y*ml")]
    near = difflib.get_close_matches(path.name, beside, n=3)
    meant = f" Beside it there is {', '.join(near)}." if near else ""
    seen = "" if path.is_absolute() else f", seen from {Path.cwd()}"
    return FileNotFoundError(f"no config file {path}{of}{seen}.{meant}")


def _meta_architecture(config_file: str | Path, options: list[str]) -> str | None:
    """As the options or the file with its bases say it; the keys that they may have depend on it."""
    named = dict(zip(options[::2], options[1::2])).get("MODEL.META_ARCHITECTURE")
    if named is None and config_file:
        model = CfgNode.load_yaml_with_base(str(config_file)).get("MODEL")
        named = model.get("META_ARCHITECTURE") if isinstance(model, Mapping) else None
    return named


def _load(app: str) -> Task:
    return importlib.import_module(f"{app}.task").TASK
