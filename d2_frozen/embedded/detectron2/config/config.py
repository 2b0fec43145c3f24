"""CfgNode: a tree of typed settings that is read from yaml files and from KEY VALUE lists.

fvcore (``_BASE_``) and yacs (types, freezing) do the merging. Added here: `!!python` tags are refused, an
unknown key names its nearest neighbour and its file, and ``configurable`` builds objects from a config.
"""

from __future__ import annotations

import functools
import inspect
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, TypeVar

import yaml
from fvcore.common.config import CfgNode as _FvcoreCfgNode
from yacs.config import CfgNode as _YacsCfgNode

from detectron2.config.compat import guess_version, name_in_current_version, upgrade_file
from detectron2.config.suggest import did_you_mean, iter_entries
from detectron2.utils.file_io import PathManager

F = TypeVar("F", bound=Callable[..., Any])


class CfgNode(_FvcoreCfgNode):
    """Settings by attribute: ``cfg.MODEL.MASK_ON``. A leaf is a bool, int, float, str, None, list or
    tuple.
    """

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[Any]:
        # Not in the encoding of the locale: a config is UTF-8 wherever it is read.
        return io.TextIOWrapper(PathManager.open(filename, "rb"), encoding="utf-8")

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """The mapping of a yaml file merged over its ``_BASE_`` file or files.

        Args:
            filename: local path or URL; a relative ``_BASE_`` is relative to it.
            allow_unsafe: kept for compatibility; tags that run Python code are refused in either case.
        Raises:
            yaml.constructor.ConstructorError: the file uses a tag other than yaml's own, such as
            ``!!python/...``. FileNotFoundError, yaml.YAMLError, ValueError: no such file, no yaml, or no
            mapping.
        """
        loaded = _read_yaml(cls, filename)
        if "_BASE_" not in loaded:
            return loaded
        try:
            return super().load_yaml_with_base(filename, allow_unsafe=False)
        except RecursionError:
            raise ValueError(f"{filename}: its _BASE_ files lead back to itself.") from None

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = True) -> None:
        """Take over the values of a yaml file and of its ``_BASE_``.

        Nothing changes unless the whole file fits. Keys of a file of version 0 or 1 (``VERSION: 1``, or
        recognised by MODEL.WEIGHT) are read by the names they have now.

        Args:
            cfg_filename: path or URL.
            allow_unsafe: see ``load_yaml_with_base``.
        Raises:
            KeyError: a key is unknown; the message has the nearest known one.
            ValueError: a value has another type than its default.
            AssertionError: the file is of a newer config version.
        """
        name = str(cfg_filename)
        loaded = type(self)(self.load_yaml_with_base(name, allow_unsafe=allow_unsafe))
        if "VERSION" in self:
            version = guess_version(loaded, self.VERSION, name)
            if version < self.VERSION:
                upgrade_file(loaded, version, self.MODEL.META_ARCHITECTURE, name)
            loaded.VERSION = self.VERSION
        self._refuse_misfits(loaded, name)
        trial = self.clone()
        try:
            trial.merge_from_other_cfg(loaded)
        except ValueError as err:
            raise ValueError(f"{name}: {err}") from err
        self.merge_from_other_cfg(loaded)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Take over ``[key, value, key, value, ...]``; string values are read as Python literals where they
        can be.

        Raises:
            AssertionError: a key is unknown (the message has the nearest known one), or the list has odd
                length.
            ValueError: a value has another type than its default.
        """
        if len(cfg_list) % 2:
            raise AssertionError(
                f"expected KEY VALUE pairs, got {len(cfg_list)} items: {list(cfg_list)}. Does the last key "
                "lack its value, or does a value with spaces lack quotes?"
            )
        known = dict(iter_entries(self))
        for key in cfg_list[::2]:
            if key not in known and not self._has_own_message(key):
                raise AssertionError(f"unknown config key {key}{_hint(str(key), known)}")
        super().merge_from_list(list(cfg_list))

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The config as yaml text; further arguments go to ``yaml.safe_dump``."""
        return super().dump(*args, **kwargs)

    def _refuse_misfits(self, loaded: CfgNode, where: str) -> None:
        """KeyError for unknown keys; ValueError for a section without content, which would delete ours."""
        known = dict(iter_entries(self))
        for key, value in iter_entries(loaded):
            if key in known:
                if value is None and isinstance(known[key], CfgNode):
                    raise ValueError(
                        f"{where}: the section {key} is empty. Give it keys, or remove the line."
                    )
            elif not (self._has_own_message(key) or _takes_new_keys(self, key)):
                raise KeyError(f"{where}: unknown config key {key}{_hint(key, known)}")

    def _has_own_message(self, key: str) -> bool:
        """Reserved, renamed and deprecated keys: fvcore and yacs say what is to be said."""
        return key == "_BASE_" or self.key_is_renamed(key) or key in self.__dict__[self.DEPRECATED_KEYS]


def _hint(key: str, known: Mapping[str, Any]) -> str:
    """What the user may have meant by an unknown key, as the end of a message."""
    now = name_in_current_version(key)
    if now is None:
        return did_you_mean(key, known)
    return f", the name of an older config version; it is {now} now. A whole file may say VERSION: 1."


def _takes_new_keys(root: CfgNode, key: str) -> bool:
    """Does the innermost known node on the way to ``key`` allow new entries?"""
    node: Any = root
    for part in key.split("."):
        child = node.get(part)
        if not isinstance(child, CfgNode):
            break
        node = child
    return bool(node.is_new_allowed())


def _read_yaml(cls: type[CfgNode], filename: str) -> dict[str, Any]:
    with cls._open_cfg(filename) as file:
        text = file.read()
    try:
        loaded = yaml.safe_load(text)
    except yaml.constructor.ConstructorError as err:
        raise yaml.constructor.ConstructorError(
            err.context,
            err.context_mark,
            f"{filename}: {err.problem}. Configs hold plain values only: replace the tag by its value",
            err.problem_mark,
        ) from err
    except yaml.YAMLError as err:
        raise type(err)(f"{filename} is not valid yaml: {err}") from err
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{filename}: expected 'KEY: value' lines, found a {type(loaded).__name__}.")
    return loaded


# The config of the running program, for code that cannot be handed one; see set_global_cfg.
global_cfg = CfgNode()


def get_cfg() -> CfgNode:
    """A fresh copy of the defaults."""
    from detectron2.config.defaults import _C  # the table needs this module's CfgNode

    return _C.clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Make ``global_cfg`` hold the entries of ``cfg``, in place, so earlier imports of it see them."""
    global_cfg.clear()
    global_cfg.update(cfg)


def configurable(
    init_func: F | None = None, *, from_config: Callable[..., dict[str, Any]] | None = None
) -> Any:
    """Let a class or function with explicit arguments also be called with a config.

    On a class, decorate ``__init__`` and add a classmethod ``from_config(cls, cfg, ...)``; on a function,
    pass ``from_config=``. It returns the explicit arguments as a dict. A call counts as one with a config if
    its first positional argument, or the keyword argument ``cfg``, is a ``CfgNode`` (or a config of the
    library OmegaConf with the same entries). Arguments beyond the config go to ``from_config`` if it takes
    them, and otherwise override what it returned.

        class Head(nn.Module):
            @configurable
            def __init__(self, width: int): ...

            @classmethod
            def from_config(cls, cfg):
                return {"width": cfg.MODEL.FPN.OUT_CHANNELS}

    Raises (when called, with a config or not):
        AttributeError: the class has no ``from_config``.
        TypeError: ``from_config`` is no method, or ``cfg`` is not its first argument.
    """
    if init_func is not None:
        if not (inspect.isfunction(init_func) and init_func.__name__ == "__init__" and from_config is None):
            raise TypeError(
                "plain @configurable goes on __init__; a function needs @configurable(from_config=...)."
            )
        return _configurable_init(init_func)
    if from_config is None:
        return configurable
    if not inspect.isfunction(from_config):
        raise TypeError(f"from_config must be a function, got {from_config!r}.")
    return functools.partial(_configurable_function, from_config)


def _configurable_init(init: F) -> F:
    @functools.wraps(init)
    def init_or_configure(self: Any, *args: Any, **kwargs: Any) -> None:
        # Looked for in either case, so that a class without it fails at its first use, not at the first config.
        builder = getattr(type(self), "from_config", None)
        name = type(self).__name__
        if builder is None:
            raise AttributeError(
                f"{name} is @configurable; it needs a classmethod from_config(cls, cfg, ...)."
            )
        if not inspect.ismethod(builder):
            raise TypeError(f"{name}.from_config must be a classmethod.")
        if _has_config(args, kwargs):
            kwargs, args = _explicit_arguments(builder, args, kwargs), ()
        init(self, *args, **kwargs)

    return init_or_configure  # type: ignore[return-value]


def _configurable_function(from_config: Callable[..., dict[str, Any]], function: F) -> F:
    @functools.wraps(function)
    def call_or_configure(*args: Any, **kwargs: Any) -> Any:
        if _has_config(args, kwargs):
            return function(**_explicit_arguments(from_config, args, kwargs))
        return function(*args, **kwargs)

    call_or_configure.from_config = from_config  # type: ignore[attr-defined]
    return call_or_configure  # type: ignore[return-value]


def _has_config(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    config_types = (_YacsCfgNode, *_omegaconf_types())
    return any(isinstance(value, config_types) for value in (*args[:1], kwargs.get("cfg")))


def _omegaconf_types() -> tuple[type, ...]:
    """OmegaConf's mapping, if the program uses OmegaConf; it is no requirement here."""
    omegaconf = sys.modules.get("omegaconf")
    return () if omegaconf is None else (omegaconf.DictConfig,)


def _explicit_arguments(
    builder: Callable[..., dict[str, Any]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``builder`` makes of the config, overridden by the arguments that it does not take itself."""
    parameters = inspect.signature(builder).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"{getattr(builder, '__qualname__', builder)}: 'cfg' must be the first argument.")
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.VAR_KEYWORD in kinds:
        return builder(*args, **kwargs)
    own = {name: value for name, value in kwargs.items() if name in parameters}
    overrides = {name: value for name, value in kwargs.items() if name not in parameters}
    return {**builder(*args, **own), **overrides}
