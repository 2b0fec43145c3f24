"""Checkpoints that hold what was trained, and the fingerprint of the frozen backbone that it belongs to.

A file is ``{"model": tensors, "frozen": [{"prefix", "name", "sha256", "source"}], ...}`` plus what Detectron2 stores
(optimizer and scheduler inside "trainer", "iteration"). Loading it against another backbone is refused. What the
trainer adds makes the file enough for prediction: "config" (yaml), "classes" and "class_ids" (see tasks.Classes).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from d2_frozen.backbone import FrozenBackbone, frozen_parts
from d2_frozen.files import write_atomically, write_text
from d2_frozen.provider import embedded_part
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

# Seconds between looks at a folder that processes see differently.
_SEEN_AFTER_S = (5, 20, 40)

# The original's own reader of .pkl files runs whatever code is in them.
_reading = embedded_part("checkpoint.reading")
UnsafePickleError: type[Exception] = _reading.UnsafePickleError


class CheckpointMismatchError(RuntimeError):
    """A checkpoint does not belong to this model: another backbone, or tensors of other shapes."""


class FrozenCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, without the frozen tensors.

    Args:
        model: may hold any number of :class:`FrozenBackbone`; with none this is a plain checkpointer.
        save_dir: folder of the checkpoints.
        save_full_model: also store the frozen tensors, for people who need one file.
        strict: a missing or mis-shaped tensor is an error (evaluation, resuming), not only a warning (fine-tuning).
        extra: plain values stored with every checkpoint, e.g. ``{"seed": 1}``, or a function that gives them.
        checkpointables: as in Detectron2, e.g. ``trainer=...``.

    Attributes:
        facts: what stands beside tensors in the file that was loaded last, or began to be: "config", "classes", ...
        loading_from: that file, as it was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        save_full_model: bool = False,
        strict: bool = False,
        extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.save_full_model = save_full_model
        self.strict = strict
        self.extra = extra or {}
        # Where frozen weights came from when a checkpoint brought them (a zoo file, say), to find them again.
        self._frozen_source = ""
        self.loading_from = ""
        self.facts: dict[str, Any] = {}
        self._matching_asked_for = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``save_dir/name.pth`` and point ``last_checkpoint`` at it; a kill leaves the old file or the new one.

        Raises:
            OSError: the disk is full or not writable; the previous files are untouched then.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {**self.content(), **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda stream: torch.save(content, stream))
        tag = os.path.join(self.save_dir, "last_checkpoint")
        write_text(tag, os.path.basename(path))

    def content(self) -> dict[str, Any]:
        """What ``save`` writes."""
        return {
            "model": self._model_state(),
            **(self.extra() if callable(self.extra) else self.extra),
            "frozen": self._frozen_facts(),
            **{key: item.state_dict() for key, item in self.checkpointables.items()},
        }

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As in Detectron2: the last checkpoint of ``save_dir`` when resuming and there is one, else ``path``.

        What a run continues from, or what is evaluated, must fit in every tensor; a starting point need not.

        Raises:
            FileNotFoundError: ``last_checkpoint`` names a file that is gone.
            ValueError: that file, or ``last_checkpoint`` itself, is damaged; says what to resume from instead.
        """
        if resume and self.has_checkpoint():
            last = os.path.join(self.save_dir, _named_in_tag(self.save_dir))
            if not self.path_manager.isfile(last):
                raise FileNotFoundError(_gone(last))
            strict, self.strict = self.strict, True
            try:
                return self.load(last)
            except ValueError as err:
                raise ValueError(f"{err} To resume: {_other_checkpoints(last)}") from err
            finally:
                self.strict = strict
        return self.load(path, checkpointables=[])

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file of this project, of Detectron2, or of its model zoo.

        Args:
            path: .pth, .safetensors or .pkl (read without running what is inside); a path, an http(s) address,
                ``detectron2://``, ``catalog://``. ``?matching_heuristics=True`` after it matches names by their ends.
        Raises:
            FileNotFoundError: no such file, or it could not be fetched.
            CheckpointMismatchError: it belongs to another backbone, or does not fit (see ``strict``).
            UnsafePickleError: the file asks for more than tensors, arrays and plain values.
            ValueError: the file is damaged.
        """
        if not path:
            return super().load(path, checkpointables)
        location, matching = _reading.split_query(path)
        local = _reading.local_copy(location, self.path_manager)
        if not os.path.isfile(local):
            raise FileNotFoundError(
                f"no weights at {path}. Give an existing file in MODEL.WEIGHTS, or MODEL.WEIGHTS '' to start anew."
            )
        self.loading_from, self._matching_asked_for = path, matching
        try:
            return super().load(local, checkpointables)
        except ValueError as err:
            if not str(err).startswith("Unsupported type found in checkpoint"):  # fvcore's, without the file
                raise
            raise ValueError(
                f"{path} is no file of weights: beside tensors it has other values ({err})."
            ) from err

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = _reading.read_weights(filename)
        self.facts = {
            key: content[key] for key in ("config", "classes", "class_ids", "seed") if key in content
        }
        if self._matching_asked_for:
            content["matching_heuristics"] = True
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        facts = checkpoint.pop("frozen", None) or []
        if facts:
            self._check_backbones(
                [fact for fact in facts if not self._is_whole(fact["prefix"], checkpoint["model"])]
            )
        prefixes = tuple(f"{prefix}." for prefix in self._frozen_parts())
        frozen = {key: value for key, value in self.model.state_dict().items() if key.startswith(prefixes)}
        # What a heads-only file leaves out is in the model already. Left out, FrozenBatchNorm2d would take it for a
        # file of old and reset its statistics.
        left_out = {key: value for key, value in frozen.items() if facts and key not in checkpoint["model"]}
        checkpoint["model"].update(left_out)
        incompatible = super()._load_model(checkpoint)
        if incompatible is None:
            return None
        # Names in the file may be others (see matching_heuristics), so ask what the model got.
        missed = {
            *left_out,
            *incompatible.missing_keys,
            *(key for key, _, _ in incompatible.incorrect_shapes),
        }
        if frozen.keys() - missed:
            self._frozen_source = self.loading_from
        if self.strict:
            self._refuse_misfits(incompatible)
        return incompatible

    def _refuse_misfits(self, incompatible: Any) -> None:
        misshaped = {
            key: f"{key}: shape {tuple(found)} in the file, {tuple(wanted)} in the model"
            for key, found, wanted in incompatible.incorrect_shapes
        }
        # Detectron2 counts them among the missing ones too.
        missing = [key for key in incompatible.missing_keys if key not in misshaped]
        problems = [*misshaped.values(), *(f"{key}: not in the file" for key in missing)]
        if problems:
            shown = "\n  ".join(problems[:10])
            more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise CheckpointMismatchError(
                f"{self.loading_from} does not fit this model:\n  {shown}{more}\n"
                "Use the config it was trained with (config.yaml beside it), class count included."
            )

    def _model_state(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict()
        if self.save_full_model:
            return dict(state)
        prefixes = tuple(f"{prefix}." for prefix in self._frozen_parts())
        return {key: value for key, value in state.items() if not (prefixes and key.startswith(prefixes))}

    def _frozen_parts(self) -> dict[str, FrozenBackbone]:
        return frozen_parts(self.model)

    def _frozen_facts(self) -> list[dict[str, str]]:
        return [
            {"prefix": prefix, **part.fingerprint(), "source": self._frozen_source}
            for prefix, part in self._frozen_parts().items()
        ]

    def _is_whole(self, prefix: str, stored: Mapping[str, Any]) -> bool:
        """Has the file every tensor of this backbone (MODEL.FROZEN.SAVE_FULL_MODEL)? Then these count."""
        own = {key: value for key, value in self.model.state_dict().items() if key.startswith(f"{prefix}.")}
        return bool(own) and all(
            key in stored and tuple(stored[key].shape) == tuple(value.shape) for key, value in own.items()
        )

    def _check_backbones(self, facts: list[dict[str, str]]) -> None:
        """Compare fingerprints; where the file names the source of its backbone's weights, fetch them from there."""
        parts = self._frozen_parts()
        for fact in facts:
            part = parts.get(fact["prefix"])
            if part is None:
                has, advice = (
                    "no frozen part",
                    "Set MODEL.BACKBONE.FREEZE: all, or save with MODEL.FROZEN.SAVE_FULL_MODEL True",
                )
                if parts:
                    has = f"its own at '{', '.join(parts)}': it is a model of another kind"
                    advice = "Use the config it was trained with (config.yaml beside it)"
                raise CheckpointMismatchError(
                    f"{self.loading_from} was trained on the frozen backbone {fact['name']} at '{fact['prefix']}', "
                    f"but this model has {has}. {advice}."
                )
            if part.fingerprint()["sha256"] == fact["sha256"]:
                continue
            source = fact.get("source", "")
            if source:
                self._load_frozen_from(source, fact["prefix"])
            present = part.fingerprint()
            if present["sha256"] != fact["sha256"]:
                raise CheckpointMismatchError(
                    f"{self.loading_from} holds heads for the backbone {fact['name']} (sha256 {fact['sha256'][:16]}), "
                    f"but this model has {present['name']} (sha256 {present['sha256'][:16]})"
                    + (", other weights of the same name" if present["name"] == fact["name"] else "")
                    + (f". Its weights came from {source}" if source else "")
                    + f". Use the config it was trained with (config.yaml beside it), where {fact['name']} is "
                    "MODEL.FROZEN.BOTTOM_UP, or MODEL.TIMM.NAME with MODEL.TIMM.PRETRAINED."
                )

    def _load_frozen_from(self, source: str, prefix: str) -> None:
        logger.info("Frozen weights of %s come from %s", prefix, source)
        keep = self.loading_from
        try:
            loader = FrozenCheckpointer(self.model)
            loader.load(source, checkpointables=[])
        except FileNotFoundError as err:
            raise CheckpointMismatchError(
                f"{keep} holds heads only; the weights of its backbone came from {source}, which is not there any more."
            ) from err
        self._frozen_source = source


def save_after(checkpointer: Checkpointer, trainer: Any, iteration: int, name: str, **facts: Any) -> None:
    """A checkpoint as PeriodicCheckpointer writes it after ``iteration``, at another time.

    A trainer's state names the iteration that it is in, which is another one before a step and behind the last.
    """
    now, trainer.iter = trainer.iter, iteration
    try:
        checkpointer.save(name, iteration=iteration, **facts)
    finally:
        trainer.iter = now


def read_checkpoint(path: str) -> dict[str, Any]:
    """Everything in a file of weights, whatever its format, on the CPU: "model" and what stands beside it.

    Raises:
        As :meth:`FrozenCheckpointer.load`.
    """
    local = _reading.local_copy(_reading.split_query(path)[0], PathManager)
    if not os.path.isfile(local):
        raise FileNotFoundError(
            f"no weights at {path}. Give a checkpoint, such as OUTPUT_DIR/model_final.pth of a training."
        )
    return _reading.read_weights(local)


def look_into_checkpoint(path: str) -> dict[str, Any]:
    """As :func:`read_checkpoint`, for names and facts: tensors of a ``.pth`` stay in the file until they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        Exception
    ):  # another format or place, or whatever the bytes lead to: the reader of all weights says what
        return read_checkpoint(path)
    return content if isinstance(content, dict) and "model" in content else read_checkpoint(path)


def has_backbone(checkpoint: Mapping[str, Any]) -> bool:
    """Are the weights of the bottom-up network in the file too, trained ones or by MODEL.FROZEN.SAVE_FULL_MODEL?

    Args:
        checkpoint: of :func:`look_into_checkpoint`.
    """
    left_out = [f"{fact['prefix']}." for fact in checkpoint.get("frozen") or ()]
    return all(any(key.startswith(prefix) for key in checkpoint["model"]) for prefix in left_out)


def last_checkpoint(save_dir: str) -> str:
    """The file that ``last_checkpoint`` of a folder names; empty where there is none.

    Raises:
        ValueError: ``last_checkpoint`` is damaged.
    """
    if not os.path.isfile(os.path.join(save_dir, "last_checkpoint")):
        return ""
    path = os.path.join(save_dir, _named_in_tag(save_dir))
    return path if os.path.isfile(path) else ""


def saved_seed(save_dir: str) -> int | None:
    """The seed stored in the last checkpoint of a folder; None where there is none.

    Raises:
        ValueError: the checkpoint, or ``last_checkpoint``, is damaged.
    """
    path = last_checkpoint(save_dir)
    if not path:
        return None
    try:
        return look_into_checkpoint(path).get("seed")
    except ValueError as err:
        raise ValueError(f"{err} To resume: {_other_checkpoints(path)}") from err


def require_same_checkpoint(folder: str) -> None:
    """All processes call this before they resume; nothing happens in a single one.

    Each reads the folder for itself. Processes that went on from different iterations would train on, with different
    weights.

    Raises:
        RuntimeError: another process sees another last checkpoint there, or none: a folder of its own machine, say.
    """
    if comm.get_world_size() == 1:
        return
    # A network file system may show another machine for a minute what was there before.
    for seconds in (*_SEEN_AFTER_S, None):
        names = comm.all_gather(_last_seen(folder))
        if len(set(names)) == 1:
            return
        if seconds is not None:
            time.sleep(seconds)
    seen = "; ".join(f"process {rank}: {name or 'none'}" for rank, name in enumerate(names))
    raise RuntimeError(
        f"processes see different last checkpoints in {folder} ({seen}). To resume on several machines, OUTPUT_DIR "
        "must be one folder that all of them see; or copy last_checkpoint and the file that it names to each."
    )


def _last_seen(folder: str) -> str:
    if not os.path.isfile(os.path.join(folder, "last_checkpoint")):
        return ""
    name = _named_in_tag(folder)
    return name if os.path.isfile(os.path.join(folder, name)) else f"{name}, which is not there"


def _named_in_tag(folder: str) -> str:
    """The file that ``last_checkpoint`` names."""
    tag = os.path.join(folder, "last_checkpoint")
    with PathManager.open(tag, "rb") as stream:
        content = stream.read().strip()
    try:
        name = content.decode()
    except UnicodeDecodeError:
        name = ""
    if not name.isprintable() or not name:
        seen = "is empty" if not content else f"is damaged, it holds {content[:40]!r}"
        raise ValueError(f"{tag} {seen}. To resume: {_other_checkpoints(os.path.join(folder, ''))}")
    return name


def _gone(checkpoint: str) -> str:
    folder, name = os.path.split(checkpoint)
    tag = os.path.join(folder, "last_checkpoint")
    return f"{tag} names {name}, which is not there. Put that file back, or: {_other_checkpoints(checkpoint)}"


def _other_checkpoints(checkpoint: str) -> str:
    """What to do where this one cannot be resumed from."""
    folder, name = os.path.split(checkpoint)
    tag = os.path.join(folder, "last_checkpoint")
    others = sorted(file for file in os.listdir(folder) if file.endswith(".pth") and file != name)
    instead = f"write one of {', '.join(others)} into {tag}, or " if others else ""
    return f"{instead}remove {tag} to start anew."
