"""DetectionCheckpointer: what fvcore's does, for more file formats, safely, and with files that are never
half.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.checkpoint.atomic import write_atomically
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.checkpoint.reading import local_copy, read_weights, split_query
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

# Buffers that files may lack (they come from the config) or have in excess (older versions stored them).
_FROM_CONFIG = ("pixel_mean", "pixel_std")
_NOT_STORED = "anchor_generator.cell_anchors"


class DetectionCheckpointer(Checkpointer):
    """Loads and saves a model and whatever else has a ``state_dict``.

    Loads ``.pth``, ``.safetensors``, and the ``.pkl`` files of Detectron and Detectron2, from paths, URLs,
    ``detectron2://`` and ``catalog://``. ``PATH?matching_heuristics=True`` matches names by their ends.

    Args:
        model: a DistributedDataParallel wrapper is looked through.
        save_dir: folder for ``save`` and ``resume_or_load``; "" saves nothing.
        save_to_disk: default: only in the main process.
        checkpointables: saved and restored with the model, e.g. ``optimizer=...``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        writes = comm.is_main_process() if save_to_disk is None else save_to_disk
        super().__init__(model, save_dir, save_to_disk=writes, **checkpointables)
        self.path_manager = PathManager
        self._heuristics_asked_for = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``save_dir/name.pth`` and point ``last_checkpoint`` at it.

        Args:
            kwargs: plain values and tensors to store too, e.g. ``iteration=9``.
        Raises:
            OSError: the disk is full or not writable; the previous file and ``last_checkpoint`` are
                untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content.update((key, item.state_dict()) for key, item in self.checkpointables.items())
        content.update(kwargs)
        file = f"{name}.pth"
        if os.path.basename(file) != file:
            raise ValueError(f"{name!r} is no plain file name; the folder is save_dir.")
        self.logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, file))
        self._write(file, lambda stream: torch.save(content, stream))
        self.tag_last_checkpoint(file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make ``last_checkpoint`` name this file."""
        self._write("last_checkpoint", lambda stream: stream.write(last_filename_basename.encode()))

    def _write(self, file: str, write: Any) -> None:
        path = os.path.join(self.save_dir, file)
        if "://" in path:
            # A remote store replaces objects as a whole by itself.
            with self.path_manager.open(path, "wb") as stream:
                write(stream)
        else:
            write_atomically(path, write)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights into the model, and the states of ``checkpointables`` (default: all).

        What does not fit is logged: missing, unexpected and mis-shaped names.

        Args:
            path: file or URL; "" leaves the model as it is.
        Returns:
            What else the file holds, e.g. {"iteration": 9}.
        Raises:
            AssertionError: no such file.
            FileNotFoundError: an address could not be fetched.
            ValueError: the file is damaged, or the query after "?" is unknown.
            pickle.UnpicklingError: the file asks for Python objects that are no weights.
        """
        if not path:
            return super().load(path, checkpointables)
        location, self._heuristics_asked_for = split_query(path)
        local = local_copy(location, self.path_manager)
        self._check_exists(local, path)
        try:
            return super().load(local, checkpointables)
        finally:
            self._heuristics_asked_for = False

    def _check_exists(self, local: str, path: str) -> None:
        found = comm.all_gather(os.path.isfile(local))
        if not any(found):
            raise AssertionError(
                f"no checkpoint file {path} (working directory: {os.getcwd()}). Give an existing file in "
                "MODEL.WEIGHTS, or '' to start from random weights."
            )
        if not all(found):
            missing = [rank for rank, there in enumerate(found) if not there]
            raise AssertionError(
                f"processes {missing} do not see the checkpoint file {path}, others do. Put it where every "
                "machine can read it."
            )

    def _load_file(self, f: str) -> dict[str, Any]:
        content = read_weights(f)
        if self._heuristics_asked_for:
            content["matching_heuristics"] = True
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if checkpoint.get("matching_heuristics"):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(),
                checkpoint["model"],
                c2_conversion=checkpoint.get("__author__") == "Caffe2",
            )
        incompatible = super()._load_model(checkpoint)
        own_buffers = {name for name, _ in self.model.named_buffers(recurse=False)}
        expected = own_buffers.intersection(_FROM_CONFIG)
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in expected]
        incompatible.unexpected_keys[:] = [
            key for key in incompatible.unexpected_keys if _NOT_STORED not in key
        ]
        return incompatible
