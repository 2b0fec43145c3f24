"""python -m d2_frozen.cache: build in parts, stop and go on, look, check, shrink."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from d2_frozen import cache
from d2_frozen.caching import Space, Store, spaces_in
from d2_frozen.engine import FrozenTrainer
from d2_frozen.train_net import argument_parser, setup


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """12 images with 2 views each: 24 entries."""
    return ["MODEL.FROZEN.CACHE.DIR", str(tmp_path / "cache"), "MODEL.FROZEN.CACHE.VIEWS", "2"]


def the_store(options: list[str]) -> Store:
    (space,) = spaces_in(options[1])
    return Store(space.folder)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cache.main([str(one) for one in arguments])
    return code, "".join(capsys.readouterr())


def test_build_then_train_then_build_again(
    tiny_config: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    build = ("build", "--config-file", tiny_config, *options)
    code, out = run(capsys, *build)
    assert code == 0 and "24 entries written" in out and "24/24 (100.0 %)" in out and "eta" in out
    code, out = run(capsys, *build)
    assert code == 0 and "0 entries written (0.0 MiB), 24 were there, of 24" in out
    flags = argument_parser().parse_args(
        ["--config-file", str(tiny_config), *options, "SOLVER.MAX_ITER", "13", "DATASETS.TEST", "()"]
    )
    trainer = FrozenTrainer(setup(flags))
    trainer.train()
    assert trainer.feature_cache.statistics.hit_rate() == 1


def test_build_computes_in_the_precision_of_a_training(
    tiny_config: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOAT32_PRECISION is part of what features are known by, and build did not set it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        for wanted, found in (
            ("high", ("high", True)),
            ("", ("high", True)),
            ("highest", ("highest", False)),
        ):
            cache._config(str(tiny_config), [*options, "FLOAT32_PRECISION", wanted])
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == found
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_parts_and_processes_share_the_work(
    tiny_config: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capsys, "build", "--config-file", tiny_config, "--part", "1/3", *options)
    assert code == 0 and "8 entries written" in out
    command = [sys.executable, "-m", "d2_frozen.cache", "build", "--config-file", str(tiny_config)]
    done = subprocess.run([*command, "--processes", "2", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {int(n) for n in re.findall(r"(\d+) were there, of 12", done.stdout)} == {4}
    store = the_store(options)
    assert len(store) == 24 and store.duplicates == 0


def test_killed_build_goes_on(
    tiny_config: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "d2_frozen.cache", "build", "--config-file", str(tiny_config), *options]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (
        Path(options[1]).is_dir() and spaces_in(options[1]) and len(the_store(options)) > 2
    ):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = the_store(options)
    assert len(left) > 2 and all(left.read(place) is not None for _, place in left.places())
    code, out = run(capsys, "build", "--config-file", tiny_config, *options)
    assert code == 0 and f"{len(left)} were there, of 24" in out
    assert len(the_store(options)) == 24 and the_store(options).duplicates == 0


def test_limit_is_told_before_and_kept(
    tiny_config: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = 0.0005  # GiB; an entry has 96,000 / 6.25 floats at 64 px: 60 KiB
    build = ("build", "--config-file", tiny_config, *options, "MODEL.FROZEN.CACHE.MAX_GB", limit)
    code, out = run(capsys, *build)
    assert code == 1
    assert re.search(r"WARNING: .* are still to be written, but there is room for .* \(MAX_GB\)", out)
    assert "Stopped:" in out
    used = sum(path.stat().st_size for path in Path(options[1]).rglob("*") if path.is_file())
    assert 0 < len(the_store(options)) < 24 and used <= limit * 2**30


def test_info_verify_repair(
    tiny_config: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "build", "--config-file", tiny_config, *options)
    (space,) = spaces_in(options[1])
    code, out = run(capsys, "info", options[1])
    assert code == 0 and space.id in out and re.search(rf"{space.id} +24 ", out)
    assert "backbone swinv2_pico_window8_256" in out and "dtype fp32" in out
    code, out = run(capsys, "verify", options[1])
    assert code == 0 and "24 entries" in out and "0 damaged" in out

    (shard,) = space.folder.glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    code, out = run(capsys, "verify", options[1])
    assert code == 1 and "1 damaged" in out and str(shard) in out
    code, out = run(capsys, "verify", options[1], "--repair")
    assert code == 0 and "will be computed again" in out and len(the_store(options)) == 0
    code, out = run(capsys, "build", "--config-file", tiny_config, *options)
    assert "24 entries written" in out


def test_prune(tiny_config: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "build", "--config-file", tiny_config, *options)
    other = [*options, "MODEL.FROZEN.PRECISION", "bf16"]
    run(capsys, "build", "--config-file", tiny_config, *other)
    root = Path(options[1])
    (root / "notes.txt").write_text("mine")
    old = next(space for space in spaces_in(root) if space.facts["dtype"] == "fp32")
    os.utime(old.folder / "space.json", (time.time() - 10 * 86400,) * 2)

    code, out = run(capsys, "prune", root)
    assert code == 2 and "say what to delete" in out
    code, out = run(capsys, "prune", root, "--unused-days", 5)
    assert code == 0 and f"would delete {old.id}" in out and len(spaces_in(root)) == 2
    code, out = run(capsys, "prune", root, "--unused-days", 5, "--yes")
    assert f"delete {old.id}" in out and not old.folder.exists()
    (left,) = spaces_in(root)
    run(capsys, "prune", root, "--max-gb", 0.0001, "--yes")
    assert sum(space.bytes() for space in spaces_in(root)) < 0.0001 * 2**30
    assert left.facts["dtype"] == "bf16" and (root / "notes.txt").read_text() == "mine"
    code, out = run(capsys, "prune", root, "--space", "abc")
    assert code == 2 and "no space abc" in out


def test_messages(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no cache folder at" in run(capsys, "info", tmp_path / "none")[1]
    assert "DIR is empty" in run(capsys, "build", "--config-file", tiny_config)[1]
    assert "--part is '3/3'" in run(capsys, "build", "--config-file", tiny_config, "--part", "3/3")[1]


def test_an_unknown_dataset_is_an_error_without_traceback(
    tiny_config: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(
        capsys, "build", "--config-file", tiny_config, *options, "DATASETS.TRAIN", "('shapes_trian',)"
    )
    assert code == 2 and "error: " in out and "shapes_trian" in out


def test_folders_that_are_no_cache(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """Empty, or with somebody else's files: it is said, and they stay."""
    root = tmp_path / "photos"
    (root / "album").mkdir(parents=True)
    for command in ("info", "verify"):
        assert "holds no features" in run(capsys, command, root)[1]
    for content in ("{half", "[1, 2]"):
        (root / "album" / "space.json").write_text(content)
        for command in (("info", root), ("verify", root), ("prune", root, "--max-gb", 0, "--yes")):
            code, _ = run(capsys, *command)
            assert code == 0 and (root / "album" / "space.json").read_text() == content
    (tmp_path / "file").touch()
    taken = ["MODEL.FROZEN.CACHE.DIR", str(tmp_path / "file"), "MODEL.FROZEN.CACHE.VIEWS", "1"]
    code, out = run(capsys, "build", "--config-file", tiny_config, *taken)
    assert code == 2 and "nothing can be written there" in out
    code, out = run(capsys, "build", "--config-file", tiny_config, *options, "MODEL.FROZEN.CACHE.VIEW", "2")
    assert code == 2 and "MODEL.FROZEN.CACHE.VIEW" in out


def test_numbers_below_zero_delete_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Space(tmp_path, {"dtype": "fp32"}).open()
    for flag in ("--max-gb", "--unused-days"):
        code, out = run(capsys, "prune", tmp_path, flag, "-1", "--yes")
        assert code == 2 and "0 or more" in out and len(spaces_in(tmp_path)) == 1


def test_time_left_counts_what_was_computed() -> None:
    """2 of 10 done in 4 s, one of them found: the other 8 take 4 s each."""
    clock = iter([0.0, 4.0])

    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    terminal = Terminal()
    cache.Progress(terminal, now=lambda: next(clock))(2, 10, "", skipped=1)
    assert "2/10 (20.0 %)" in terminal.text and "eta 0:00:32" in terminal.text
