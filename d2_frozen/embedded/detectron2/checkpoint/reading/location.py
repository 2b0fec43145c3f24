"""Where a file of weights is: a path or an address, perhaps with a request after "?". Downloads are kept in iopath's
cache; without a net, the error says what to do.
"""

from __future__ import annotations

import logging
import os
import tempfile
from urllib.parse import parse_qs, urlsplit, urlunsplit

from iopath.common.file_io import PathManager as PathManagerBase
from iopath.common.file_io import get_cache_dir

from detectron2.checkpoint.catalog import ModelCatalog, ModelCatalogHandler
from detectron2.utils.file_io import Detectron2Handler, PathManager

logger = logging.getLogger(__name__)

_WEB = ("http", "https", "ftp")


def split_query(path: str) -> tuple[str, bool]:
    """ "a/b.pkl?matching_heuristics=True" -> ("a/b.pkl", True).

    Raises:
        ValueError: another request than this one.
    """
    if os.path.isfile(path):  # a file may well have "?" in its name
        return path, False
    url = urlsplit(path)
    options = parse_qs(url.query)
    asked = options.pop("matching_heuristics", ["False"])
    if options or asked not in (["True"], ["False"]):
        raise ValueError(
            f"cannot understand the part after '?' in {path}; only matching_heuristics=True is known."
        )
    return urlunsplit(url._replace(query="")), asked == ["True"]


def local_copy(path: str, path_manager: PathManagerBase = PathManager) -> str:
    """Local path of a file; one from the net is fetched unless the cache has it.

    Args:
        path: a local path, or any address that ``path_manager`` knows (Detectron2's, if none is given).
    Raises:
        FileNotFoundError: it could not be fetched; says from where, and where to put it by hand.
        OSError: another handler than that of web addresses failed.
    """
    address = _web_address(path) if "://" in path else ""
    url = urlsplit(address)
    from_web = url.scheme in _WEB
    if from_web and not _has_locks(get_cache_dir()):
        cached = os.path.join(get_cache_dir(), *url.path.split("/"))
        if os.path.isfile(cached):
            return cached
        instead = os.path.join(tempfile.gettempdir(), "iopath_cache")
        logger.warning(
            "%s, where downloads are kept, is on a file system without locks; keeping them in %s. The variable "
            "FVCORE_CACHE names another folder.",
            get_cache_dir(),
            instead,
        )
        os.environ["FVCORE_CACHE"] = instead
    try:
        return path_manager.get_local_path(path)
    except OSError as err:
        if not from_web:
            raise
        cached = os.path.join(get_cache_dir(), *url.path.split("/"))
        named = path if path == address else f"{path} ({address})"
        raise FileNotFoundError(
            f"{named} could not be fetched: {err}. Without a connection, download {address} elsewhere; put it at "
            f"{cached} (the cache; the variable FVCORE_CACHE moves it), or anywhere and give that path "
            "instead of the address (MODEL.WEIGHTS, MODEL.TIMM.PRETRAINED)."
        ) from err


def _has_locks(folder: str) -> bool:
    """iopath locks what it downloads; on Lustre without ``flock``, say, that fails, or hangs (old portalocker)."""
    try:
        import fcntl
    except ImportError:  # Windows has others
        return True
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _web_address(path: str) -> str:
    for prefix, address in (
        (Detectron2Handler.PREFIX, lambda rest: Detectron2Handler.S3_DETECTRON2_PREFIX + rest),
        (ModelCatalogHandler.PREFIX, ModelCatalog.get),
    ):
        if path.startswith(prefix):
            return address(path.removeprefix(prefix))
    return path
