"""What is one run of a study, and how far is it?

A job is a config, options and a seed; everything about it lies in a folder of its own: what ``train_net`` writes,
then ``result.json`` when it has finished, or ``failed.json``. Nothing else says what state a job is in, so a queue
may be killed at any moment, copied to another machine, and continued.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from d2_frozen import tasks
from d2_frozen.files import by_the_way, write_text
from d2_frozen.study.pretraining import facts_of_file
from detectron2.config import CfgNode

logger = logging.getLogger("d2_frozen.study")

# Options that may differ between the runs of a table.
NOT_COMPARED = {"SEED", *tasks.NOT_PART_OF_RESULT}
SETTINGS_FILE, FAILURE_FILE = "settings.json", "failed.json"


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
        result = read_json(self.folder(root) / "result.json")
        if result is not None:
            self.check_settings(root)
        return result

    def failure(self, root: str | Path) -> dict[str, Any] | None:
        """What ``failed.json`` holds: {"error", "traceback"} of the last try; None if there was none."""
        return read_json(self.folder(root) / FAILURE_FILE)

    def why_failed(self, root: str | Path, unsaid: str) -> str:
        """The error of the last try; ``unsaid``, which is noted, where its process had no time to write one."""
        failure = self.failure(root)
        if failure is None:
            failure = {"error": unsaid, "traceback": ""}
            with by_the_way(f"Why {self.name} failed is not written"):  # on a full disk others may still end
                write_json(self.folder(root) / FAILURE_FILE, failure)
        return str(failure["error"])

    def config(self) -> CfgNode:
        """The complete one.

        Raises:
            ValueError, FileNotFoundError: it has none; names the file.
        """
        try:
            return tasks.read_config(self.config_file, self.options)
        except (AssertionError, KeyError) as err:  # unknown keys, and options that are no pairs
            raise ValueError(f"{self.config_file}: {err.args[0] if err.args else err!r}") from err
        except yaml.YAMLError as err:
            raise ValueError(f"{self.config_file}, or a _BASE_ of it, is no yaml: {err}") from err

    def settings(self) -> dict[str, Any]:
        """Every key of the complete config and its value, without those that do not change the result.

        Of a small backbone of the mini scale also what its file's name does not say.
        """
        cfg = self.config()
        settings = {key: value for key, value in tasks.leaves(cfg) if key not in tasks.NOT_PART_OF_RESULT}
        if facts := facts_of_file(cfg.MODEL.TIMM.PRETRAINED):
            settings["the backbone's pretraining"] = facts
        return settings

    def check_settings(self, root: str | Path) -> None:
        """Is what lies in the job's folder of this config? Keys that are new since then do not matter.

        Raises:
            ValueError: another one; names the keys that differ.
        """
        path = self.folder(root) / SETTINGS_FILE
        found = read_json(path)
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
        if read_json(path) is None:
            write_json(path, self.settings())


def compared_options(result: Mapping[str, Any]) -> tuple[str, ...]:
    """KEY VALUE ... that a run had, without those that may differ between the runs of a table."""
    options = result.get("options", [])
    values = dict(zip(options[::2], options[1::2]))
    return tuple(text for pair in values.items() if pair[0] not in NOT_COMPARED for text in pair)


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """None if there is no such file, or nothing that can be read in it: that is said, and it counts as missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as err:
        logger.warning("%s cannot be read (%s); taken as missing.", path, err)
        return None
