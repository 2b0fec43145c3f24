"""Versions of the config keys. Only the current one, 2, can be read; older files are refused with a
reason.
"""

from __future__ import annotations

from typing import Any

from detectron2._outside import outside_message

CURRENT_VERSION = 2


def check_version(version: Any, latest: int, where: str) -> None:
    """Refuse config files whose keys have other names than ours.

    Args:
        version: VERSION as the file gives it; files without one are taken as current.
        latest: VERSION of the config that is merged into.
        where: the file, for the message.
    Raises:
        NotImplementedError: an older version; translating it needs Detectron2.
        ValueError: a newer one, or no integer at all.
    """
    if version == latest:
        return
    if isinstance(version, int) and version < latest:
        raise NotImplementedError(
            f"{where} says VERSION: {version}, this config is version {latest}. "
            + outside_message(f"upgrading config files of version {version}")
        )
    raise ValueError(f"{where}: VERSION is {version!r}, but the newest known version is {latest}.")


def upgrade_config(cfg: Any, to_version: int | None = None) -> Any:
    """A copy of ``cfg`` in version ``to_version`` (default: the current one); raises for any real upgrade."""
    check_version(cfg.VERSION, CURRENT_VERSION if to_version is None else to_version, "the config")
    return cfg.clone()


def downgrade_config(cfg: Any, to_version: int) -> Any:
    """A copy of ``cfg`` in version ``to_version``; raises NotImplementedError unless it has it already."""
    if to_version != cfg.VERSION:
        raise NotImplementedError(outside_message(f"downgrading a config to version {to_version}"))
    return cfg.clone()
