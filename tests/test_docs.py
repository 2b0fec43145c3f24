"""What the documents name exists: files, links and their anchors, commands with their flags, config keys."""

from __future__ import annotations

import argparse
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from d2_frozen import tasks
from detectron2.config import CfgNode, get_cfg

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# Where a wheel has the configs.
IN_THE_WHEEL = "d2_frozen/configs"
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@EVERY_DOCUMENT
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(document.read_text())):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def anchors(path: Path) -> set[str]:
    """Of the headings of a markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_blocks(text: str) -> str:
    """A markdown text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@EVERY_DOCUMENT
def test_configs_and_files_of_the_repository_exist(document: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:configs|d2_frozen|seg_app|video_app|tests|docs)/[\w./{},*-]*[\w}*])",
        document.read_text(),
    )
    named = [
        name for name in named if not re.search(r"\b[A-Z]+\b", name) and not name.startswith(IN_THE_WHEEL)
    ]
    missing = [name for name in named if not all(found(one) for one in without_braces(name))]
    assert not missing


def found(name: str) -> bool:
    return bool(list(ROOT.glob(name))) if "*" in name else (ROOT / name).exists()


def without_braces(name: str) -> list[str]:
    """``a/{b,c}`` -> ``a/b``, ``a/c``."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(choice) for choice in itertools.product(*parts)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # modules that are imported already
@EVERY_DOCUMENT
def test_commands_have_these_flags(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ParsedError(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(*arguments: object, **named: object) -> None:
        parse_args(*arguments, **named)  # type: ignore[call-overload]
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    wrong = []
    for module, arguments in commands(document):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__")
        except ParsedError:
            continue
        except (SystemExit, ImportError) as err:
            wrong.append(f"{module} {shlex.join(arguments)}: {err!r}")
    assert not wrong


def commands(document: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of our commands that can be typed as they are."""
    text = document.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in re.findall(r"^ {4,}(.+)$", text, re.MULTILINE)]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        if "..." in line or not (
            command := re.search(r"\bpython (?:-m ([\w.]+)|(train_net)\.py)( .*|$)", line)
        ):
            continue
        module, script, rest = command.groups()
        arguments = shlex.split(rest, comments=True)
        module = module or f"d2_frozen.{script}"
        ours = module.startswith(("d2_frozen", "seg_app", "video_app"))
        if ours and arguments and not {"|", "N", "NAME"} & set(arguments) and "[" not in rest:
            yield module, arguments


@cache
def keys() -> set[str]:
    """Of every task: ``MODEL.NECK.NAME`` and ``MODEL.NECK``."""
    names: set[str] = set()

    def add(node: CfgNode, prefix: str) -> None:
        for key, value in node.items():
            names.add(prefix + key)
            if isinstance(value, CfgNode):
                add(value, f"{prefix}{key}.")

    for app in (tasks.DETECTION, *sorted(set(tasks.APPS.values()))):
        add(tasks._load(app).add_config(get_cfg()), "")
    return names


@EVERY_DOCUMENT
def test_config_keys_exist(document: Path) -> None:
    """Written in full (``MODEL.NECK.NAME``), or without their beginning (``NECK.NAME``)."""
    text = document.read_text()
    code = " ".join([*re.findall(r"`([^`]+)`", text), *re.findall(r"^ {4,}(.+)$", text, re.MULTILINE)])
    named = set(re.findall(r"(?<![\w./$-])([A-Z][A-Z0-9_]*(?:\.[A-Z][A-Z0-9_]*)+)(?![\w.]|\.[a-z])", code))
    endings = {".".join(key.split(".")[k:]) for key in keys() for k in range(key.count("."))} | keys()
    assert named - endings == set()


@EVERY_DOCUMENT
def test_configs_in_the_text_have_keys_that_exist(document: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        content = yaml.safe_load(block)
        if isinstance(content, dict):  # not entries of DATASETS.REGISTER
            assert set(leaves(content)) <= keys() | {"_BASE_"}


def leaves(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and prefix + key not in ("MODEL.TIMM.ARGS",):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key
