"""Two video heads in one run decode each clip once, and end as if each had been alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from d2_frozen import joint, train_net
from d2_frozen.engine.joint import JointTraining


def test_video_heads_share_clips_and_pass(
    tiny_config: Path, flags: Callable[..., Namespace], tmp_path: Path
) -> None:
    changed = tmp_path / "wide.yaml"
    changed.write_text(f"_BASE_: {tiny_config}\nMODEL: {{VIDEO_HEAD: {{WIDTH: 32}}}}\n")
    files = ["--config-files", str(tiny_config), str(changed), "--output", str(tmp_path / "joint")]
    heads = joint.build_heads(joint.parse(files))
    run = JointTraining(heads)
    results = run()
    assert (run.memory.passes, run.memory.reused) == (4, 4)
    for name, more in (("tiny", ()), ("wide", ("MODEL.VIDEO_HEAD.WIDTH", "32"))):
        with joint.OwnNames().active():
            expected = train_net.main(flags("OUTPUT_DIR", str(tmp_path / name), *more))
        assert str(results[name]) == str(expected)
        a, b = (torch.load(tmp_path / where / name / "model_final.pth", weights_only=True)["model"]
                for where in ("joint", "."))  # fmt: skip
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
