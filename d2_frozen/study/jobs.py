"""What is one run of a study, and how far is it?

A job is a config, options and a seed; everything about it lies in a folder of its own: what ``train_net`` writes,
then ``result.json`` when it has finished, or ``failed.json``. Nothing else says what state a job is in, so a queue
may be killed at any moment, copied to another machine, and continued.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2_frozen import tasks
from detectron2.config import CfgNode

# Values that say where and how fast a job runs, not what comes out of it.
_NOT_PART_OF_RESULT = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINTS_KEPT",
)
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Job:
    """One training, or one evaluation of what another job has trained.

    Args:
        name: its folder below that of the study, e.g. ``table2/detection/bifpn_mask_frozen/seed1``.
        config_file: yaml.
        options: KEY VALUE ... over the yaml, the seed among them.
        evaluates: name of the job whose ``model_final.pth`` this one evaluates; None for a training.
    """

    name: str
    config_file: str
    options: tuple[str, ...] = ()
    evaluates: str | None = None

    def folder(self, root: str | Path) -> Path:
        return Path(root) / self.name

    def result(self, root: str | Path) -> dict[str, Any] | None:
        """What ``result.json`` holds; None if the job has not finished.

        Raises:
            ValueError: see ``check_settings``.
        """
        result = _read(self.folder(root) / "result.json")
        if result is not None:
            self.check_settings(root)
        return result

    def failure(self, root: str | Path) -> dict[str, Any] | None:
        """What ``failed.json`` holds: {"error", "traceback"} of the last try; None if there was none."""
        return _read(self.folder(root) / "failed.json")

    def settings(self) -> dict[str, Any]:
        """Every key of the complete config and its value, without those that do not change the result."""
        cfg = tasks.read_config(self.config_file, self.options)
        return {key: value for key, value in _leaves(cfg) if key not in _NOT_PART_OF_RESULT}

    def check_settings(self, root: str | Path) -> None:
        """Is what lies in the job's folder of this config? Keys that are new since then do not matter.

        Raises:
            ValueError: another one; names the keys that differ.
        """
        path = self.folder(root) / SETTINGS_FILE
        found = _read(path)
        if found is None:
            return
        own = json.loads(json.dumps(self.settings()))
        differing = sorted(key for key in found.keys() & own.keys() if found[key] != own[key])
        if differing:
            shown = ", ".join(f"{key} ({found[key]!r}, now {own[key]!r})" for key in differing[:4])
            raise ValueError(
                f"{self.folder(root)} is of another config than {self.config_file} {' '.join(self.options)}: {shown}"
                f"{', ...' if len(differing) > 4 else ''}. Remove that folder to run the job again, or choose another "
                "--output."
            )

    def write_settings(self, root: str | Path) -> None:
        """For ``check_settings``; what is there stays, as its run goes on."""
        path = self.folder(root) / SETTINGS_FILE
        if not path.exists():
            write_json(path, self.settings())


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
