"""Config options may follow a list directly; argparse alone would make them its values."""

from __future__ import annotations

import argparse

import pytest

from d2_frozen.benchmarks.arguments import one_of, parse_with_lists


def parse(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", nargs="+", default=[1, 2])
    parser.add_argument("--parts", nargs="+", default=["a"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    return parse_with_lists(parser, line, workers=int, parts=one_of(["a", "b"]))


def test_a_list_ends_where_config_options_begin() -> None:
    args = parse("--workers", "0", "4", "SEED", "3", "INPUT.FORMAT", "BGR")
    assert args.workers == [0, 4] and args.opts == ["SEED", "3", "INPUT.FORMAT", "BGR"]
    args = parse("--parts", "b", "a", "SEED", "-1")
    assert args.parts == ["b", "a"] and args.opts == ["SEED", "-1"]


def test_lists_elsewhere_on_the_line_and_defaults() -> None:
    args = parse("--workers", "3", "--parts", "b", "--rounds", "7", "SEED", "3")
    assert (args.workers, args.parts, args.rounds, args.opts) == ([3], ["b"], 7, ["SEED", "3"])
    args = parse("SEED", "3")
    assert (args.workers, args.parts, args.opts) == ([1, 2], ["a"], ["SEED", "3"])


def test_a_list_without_a_value_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--workers", "SEED", "3")
    assert "--workers: 'SEED' is no value for it" in capsys.readouterr().err
