"""The benchmark's arithmetic and its refusal to compare unequal work; nothing here is timed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from d2_frozen import bench
from d2_frozen.bench import COMPARISONS
from d2_frozen.benchmarks import engines, step
from d2_frozen.benchmarks.measuring import (
    Clock,
    alternate,
    memory_in_child,
    phase_table,
    source_commit,
    with_ratio,
)
from d2_frozen.benchmarks.timed_step import MixedPrecision


def test_subjects_take_turns_and_the_warmup_does_not_count():
    order = []
    times = {"a": iter([100.0, 1.0, 3.0, 2.0]), "b": iter([100.0, 4.0, 4.0, 4.0])}

    def subject(name):
        def run():
            order.append(name)
            return {"step": next(times[name])}

        return run

    measured = alternate({name: subject(name) for name in times}, rounds=3, warmup=1)
    assert "".join(order) == "abababab"
    assert measured == {"a": {"step": 2.0}, "b": {"step": 4.0}}
    rows = with_ratio(measured)
    assert rows["a / b"] == {"step": 0.5}
    assert "0.50" in phase_table("seconds", rows, ["step"])


def test_an_interrupted_measurement_keeps_its_whole_rounds():
    """Ctrl-C in the third round, after A had run: two rounds of each count."""
    kept = []
    times = iter([1.0, 4.0, 3.0, 4.0, 100.0])

    def subject():
        try:
            return {"step": next(times)}
        except StopIteration:
            raise KeyboardInterrupt from None

    measured = alternate({"a": subject, "b": subject}, 5, 0, lambda medians, rounds: kept.append(rounds))
    assert measured == {"a": {"step": 2.0}, "b": {"step": 4.0}}
    assert kept == [1, 2]


def test_nothing_measured_is_no_result():
    def subject():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="before the first measured round"):
        alternate({"a": subject}, rounds=1, warmup=0)


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (-1, 0), (1, -1)])
def test_no_round_to_measure_is_refused(rounds, warmup):
    """There is no median of nothing, and a warmup of -1 would leave out a round."""
    with pytest.raises(ValueError, match=f"--rounds {rounds} --warmup {warmup}: at least one round"):
        alternate({"a": lambda: {"step": 1.0}}, rounds, warmup)


def test_the_commit_is_that_of_the_start_and_says_if_files_differ_from_it(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit_now():
        source_commit.cache_clear()
        return source_commit(tmp_path)

    git("init", "-q")
    assert commit_now() == "unknown"
    (tmp_path / "code.py").write_text("1")
    assert commit_now() == "unknown"  # a repository, but not that of this file
    git("add", ".")
    git("commit", "-qm", "one")
    first = commit_now()
    assert first == git("rev-parse", "--short", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert source_commit(tmp_path) == first  # remembered
    assert commit_now() == f"{first}-dirty"
    git("commit", "-qam", "two")
    assert commit_now() not in (first, f"{first}-dirty")
    source_commit.cache_clear()


def test_the_bench_asks_for_the_commit_before_it_measures(monkeypatch):
    order = []
    monkeypatch.setattr(bench, "source_commit", lambda: order.append("commit"))
    monkeypatch.setattr(step, "main", lambda arguments: order.append("measured"))
    bench.main(["step"])
    assert order == ["commit", "measured"]


def test_memory_of_a_failing_process_is_unknown_and_said(capfd):
    answer = "print('a line'); print('{\"peak\": 3.5}')"
    assert memory_in_child([sys.executable, "-c", answer]) == 3.5
    assert memory_in_child([sys.executable, "-c", "raise SystemExit('no room')"]) is None
    assert "no room" in capfd.readouterr().err
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert memory_in_child([sys.executable, "-c", kill]) is None
    assert "enough memory" in capfd.readouterr().err


def test_step_reports_ratios_to_the_first_subject_and_to_full_fine_tuning():
    phases = ("backbone", "neck+heads", "backward+update", "step")
    seconds = {"naive": 2.0, "bf16+amp": 1.0, "full+amp": 4.0}
    result = {
        "config": "c",
        "options": [],
        "batch": 1,
        "size": 64,
        "machine": {},
        "unit": "seconds",
        "rounds": 3,
    }
    result["step"] = {name: dict.fromkeys(phases, value) for name, value in seconds.items()}
    result["peak memory MiB"] = {"naive": 200.0, "bf16+amp": 100.0, "full+amp": None}
    rows = {line.split("  ")[0]: line.split() for line in step.report(result).splitlines()}
    assert rows["bf16+amp / naive"][-1] == "0.50"
    assert rows["bf16+amp / full+amp"][-1] == "0.25"
    assert rows["full+amp / naive"][-1] == "2.00"
    assert rows["bf16+amp"][1:] == ["100", "0.50"]
    assert rows["full+amp"][1] == "failed"


@pytest.mark.parametrize(
    "name", ["naive", "full+amp", "bf16+compile+amp", "fp32", "naive@detectron2", "bf16+amp@embedded"]
)
def test_subjects_of_a_step(name):
    assert step.subject_name(name) == name


@pytest.mark.parametrize(
    "name", ["bf17", "naive+compile", "bf16+amp+amp", "bf16+", "", "naive@", "naive@torch", "@embedded"]
)
def test_subjects_that_there_are_not(name):
    with pytest.raises(ValueError, match="is no subject"):
        step.subject_name(name)


def test_steps_here_and_in_a_process_of_their_own(capsys, tmp_path):
    """A tiny model frozen in two ways, one of them on a named engine; the json has what the table shows."""
    tiny = [
        "MODEL.TIMM.NAME",
        "swinv2_pico_window8_256",
        "MODEL.FPN.OUT_CHANNELS",
        "32",
        "MODEL.BIFPN.NUM_LAYERS",
        "1",
    ]
    tiny += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]
    flags = ["--subjects", "bf16", "naive+amp@embedded", "--size", "128", "--batch", "1"]
    file = tmp_path / "step.json"
    result = step.main([*flags, "--rounds", "1", "--warmup", "0", "--json", str(file), *tiny])
    assert json.loads(file.read_text()) == result
    assert all(seconds["step"] > 0 for seconds in result["step"].values())
    assert result["rounds"] == 1
    assert "naive+amp@embedded / bf16" in capsys.readouterr().out


def test_peak_memory_of_what_cannot_run_is_said(capsys):
    settings = {"config": step.DEFAULT_CONFIG, "options": [], "size": 64, "batch": 0, "cpu_time": True}
    settings["options"] = ["MODEL.TIMM.NAME", "no_such_network"]
    assert step._peak_memory("bf16", settings, Clock()) is None
    assert "no_such_network" in capsys.readouterr().err


def test_mixed_precision_of_the_bench_is_that_of_training():
    """On CPU bfloat16 without scaling: the update equals that of the plain loop inside autocast."""
    layers = [torch.nn.Linear(4, 1) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(8, 4)
    kept = []
    for layer, enabled in zip(layers, (True, False)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        precision = MixedPrecision(enabled)
        with precision.forward():
            out = layer(x)
        kept.append(out.dtype)
        precision.backward_and_update(out.float().sum(), optimizer)
    assert kept == [torch.bfloat16, torch.float32]
    assert torch.allclose(layers[0].weight, layers[1].weight, atol=1e-2)
    assert not torch.equal(layers[0].weight, layers[1].weight)


def test_equal_work_is_checked_relative_to_the_number():
    assert engines.largest_difference("x", [{"loss": 2.0}], [{"loss": 2.0 + 1e-6}]) == pytest.approx(5e-7)
    assert engines.largest_difference("x", [{}], [{}]) == 0


@pytest.mark.parametrize("other", [{"loss": 2.001}, {}, {"loss": float("nan")}])
def test_unequal_work_is_not_compared(other):
    with pytest.raises(RuntimeError, match="x, turn 1: loss is 2.0 on embedded"):
        engines.largest_difference("x", [{"loss": 1.0}, {"loss": 2.0}], [{"loss": 1.0}, other])


def test_without_detectron2_the_message_says_what_is_missing(tmp_path):
    """An empty folder as PYTHONPATH of the isolated child: no real Detectron2 there."""
    code = (
        "import importlib.util, sys\n"
        "from d2_frozen.benchmarks import engines\n"
        "try: engines.EngineProcess('detectron2', {'cpu_time': False}).close()\n"
        "except RuntimeError as err: print(err)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "D2_FROZEN_ENGINE")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if not done.stdout:
        pytest.skip("Detectron2 is installed in this environment")
    assert "Detectron2 itself must be importable" in done.stdout
    assert "no Detectron2 is installed" in done.stdout


def test_a_process_that_was_killed_between_two_turns_is_said():
    """The pipe to it is broken then, which says nothing to a user."""
    worker = engines.EngineProcess("embedded", {"cpu_time": True})
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(
        RuntimeError, match="the embedded engine failed. It was killed: was there enough memory?"
    ):
        worker.run("build", 0)
    worker.close()


def test_comparisons_of_apps_are_found_by_name():
    """None is imported by importing the bench; every name leads to a module."""
    code = "import sys, d2_frozen.bench; print([m for m in sys.modules if m.split('.')[0].endswith('_app')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert COMPARISONS and all(importlib.util.find_spec(module) for module in COMPARISONS.values())


def test_both_engines_can_do_the_tasks():
    """The worker on the embedded engine alone: a smaller model, one turn of each task."""
    settings = {
        "config": engines.DEFAULT_CONFIG,
        "options": ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16],
        "size": 64,
        "batch": 1,
        "images": 2,
        "cpu_time": True,
    }
    settings["options"] += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
    settings["options"] += ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
    worker = engines.EngineProcess("embedded", settings)
    try:
        answers = {section: worker.run(section, 0) for section in engines.SECTIONS}
    finally:
        worker.close()
    assert set(answers["training step"]["check"]) >= {"loss_cls", "loss_mask", "loss_rpn_loc"}
    assert answers["training step"]["seconds"]["step"] > 0
    assert set(answers["inference"]["check"]) == {"detections", "sum of scores"}
    assert answers["build"]["peak MiB"] > 0
    assert set(answers["evaluation"]["seconds"]) == {"read truth", "process", "evaluate", "evaluation"}
    assert {"bbox/AP", "segm/AP75"} <= set(answers["evaluation"]["check"])
