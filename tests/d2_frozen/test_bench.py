"""The benchmark's arithmetic and its refusal to compare unequal work; nothing here is timed."""

import importlib.util
import os
import subprocess
import sys

import pytest

from d2_frozen.bench import COMPARISONS
from d2_frozen.benchmarks import engines
from d2_frozen.benchmarks.measuring import alternate, phase_table, with_ratio


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
