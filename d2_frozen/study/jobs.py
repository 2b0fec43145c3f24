"""What is one run of a study, and how far is it?

A job is a config, options and a seed; everything about it lies in a folder of its own: what ``train_net`` writes,
then ``result.json`` when it has finished, or ``failed.json``. Nothing else says what state a job is in, so a queue
may be killed at any moment, copied to another machine, and continued.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2_frozen import tasks

# Values that say where and how fast a job runs, not what comes out of it.
_NOT_PART_OF_RESULT = (
    ("OUTPUT_DIR",),
    ("MODEL", "DEVICE"),
    ("DATALOADER", "NUM_WORKERS"),
    ("MODEL", "WEIGHTS"),
)


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
            ValueError: the result is that of another config than this job's.
        """
        result = _read(self.folder(root) / "result.json")
        if result is not None and result["config_sha256"] != self.config_sha256():
            raise ValueError(
                f"{self.folder(root)} holds the result of another config than {self.config_file} "
                f"{' '.join(self.options)} gives now. Remove that folder to run the job again, "
                "or choose another --output."
            )
        return result

    def failure(self, root: str | Path) -> dict[str, Any] | None:
        """What ``failed.json`` holds: {"error", "traceback"} of the last try; None if there was none."""
        return _read(self.folder(root) / "failed.json")

    def config_sha256(self) -> str:
        """Of the complete config, without what does not change the result."""
        cfg = tasks.read_config(self.config_file, self.options)
        for path in _NOT_PART_OF_RESULT:
            node = cfg
            for key in path[:-1]:
                node = node[key]
            node.pop(path[-1])
        return hashlib.sha256(cfg.dump().encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
