"""PathManager: local paths, http(s) URLs and ``detectron2://`` opened alike; downloads are cached.

The cache folder is ``$FVCORE_CACHE``, else ``~/.torch/iopath_cache``.
"""

from __future__ import annotations

from typing import IO, Any

from iopath.common.file_io import HTTPURLHandler, OneDrivePathHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

__all__ = ["PathHandler", "PathManager"]


class Detectron2Handler(PathHandler):
    """``detectron2://X`` is X in Detectron2's public store of weights."""

    PREFIX = "detectron2://"
    S3_DETECTRON2_PREFIX = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _url(self, path: str) -> str:
        return self.S3_DETECTRON2_PREFIX + path.removeprefix(self.PREFIX)

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return PathManager.get_local_path(self._url(path), **kwargs)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> IO[Any]:
        return PathManager.open(self._url(path), mode, **kwargs)


# Detectron2's own manager: handlers that a project registers here do not leak into other libraries.
PathManager = PathManagerBase()
for _handler in (HTTPURLHandler(), OneDrivePathHandler(), Detectron2Handler()):
    PathManager.register_handler(_handler)
