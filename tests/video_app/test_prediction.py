"""A video head predicts whole videos as the evaluation does, and clip after clip."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import VIDEO as VIDEO_MODEL
from tiny_runs import write_config

from d2_frozen import tasks
from d2_frozen.engine import FrozenCheckpointer
from d2_frozen.predict import Predictor, main
from d2_frozen.prediction.heads import load_heads
from d2_frozen.prediction.inputs import find_items
from d2_frozen.prediction.outputs import OutputFolder, read_lines
from d2_frozen.prediction.video_file import VideoReader
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from video_app.clips.mapper import ClipMapper
from video_app.clips.sampling import SamplingPlan
from video_app.data.lists import VIDEOS as VIDEO_FILES
from video_app.prediction import VideoPrediction, clip_plans

VIDEO = ["MODEL.META_ARCHITECTURE", "FrozenVideoClassifier", "MODEL.VIDEO_HEAD.NUM_CLASSES", "3"]
NAMES = tasks.Classes(["open", "close", "turn"], [0, 1, 2])


@pytest.fixture
def head(tmp_path: Path) -> Path:
    changes = {
        "MODEL": {"VIDEO_HEAD": {"NAME": "LinearVideoHead"}},
        "VIDEO": {"STRIDE": 4, "SHORT_SIDE": 64, "CROP_SIZE": 64, "TEST": {"CLIPS": 2, "CROPS": 1}},
    }
    cfg = tasks.read_config(write_config(tmp_path / "action.yaml", VIDEO_MODEL, changes, {"SEED": 3}))
    tasks.task_of(cfg).prediction(cfg, NAMES)
    seed_all_rng(3)
    facts = {"config": cfg.dump(), "classes": NAMES.names, "class_ids": NAMES.ids}
    FrozenCheckpointer(build_model(cfg), str(tmp_path), extra=facts).save("action")
    return tmp_path / "action.pth"


def test_files_that_train_as_videos_are_predicted_as_such(tmp_path: Path) -> None:
    """A GIF too, if it has more than one frame."""
    frames = [Image.new("L", (16, 16), grey) for grey in (0, 90, 180)]
    for suffix in VIDEO_FILES:
        (tmp_path / f"a{suffix}").touch()
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "one.gif")
    (tmp_path / "broken.gif").touch()
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[:8])
    (tmp_path / "huge.gif").write_bytes(whole[:6] + b"\xff\xff\xff\xff" + whole[10:])
    taken = {item.name for item in find_items([tmp_path]) if item.is_video}
    assert taken == {f"a{suffix}" for suffix in VIDEO_FILES}
    reader = VideoReader(tmp_path / "a.gif")
    assert reader.rate == 10 and [frame[0, 0, 0] for _, frame in reader] == [0, 90, 180]


def test_clips_follow_each_other_and_the_last_ends_with_the_video() -> None:
    plan = SamplingPlan("dense", frames=4, stride=2)  # a clip spans 8 frames, and shows 7 of them
    plans = dict(clip_plans(plan, 20))
    assert list(plans) == [0, 8, 13]
    times = np.arange(20) / 10
    assert [placed.indices(times)[0].tolist() for placed in plans.values()] == [
        [0, 2, 4, 6],
        [8, 10, 12, 14],
        [13, 15, 17, 19],
    ]
    assert not list(clip_plans(plan, 8)) and not list(clip_plans(SamplingPlan("uniform", 4), 20))


def test_the_whole_video_is_seen_as_in_evaluation(video: Path) -> None:
    cfg = tasks.read_config("", [*VIDEO, "VIDEO.NUM_FRAMES", "4", "VIDEO.CROP_SIZE", "64"])
    clips = list(VideoPrediction(cfg, NAMES).clips(video))
    seen = ClipMapper.from_config(cfg, is_train=False)({"file_name": str(video), "label": 0, "video_id": 0})
    assert torch.equal(clips[0][2]["video"], seen["video"])
    assert clips[0][:2] == (0.0, pytest.approx(1.6))  # 40 frames at 25 per second
    # 16 frames a clip: from 0, 16, and the last possible place
    assert [start for start, _, _ in clips[1:]] == pytest.approx([0, 0.64, 27 / 25])


def test_records_name_the_likeliest_classes() -> None:
    cfg = tasks.read_config("", VIDEO)
    prediction = VideoPrediction(cfg, NAMES)
    record = prediction.record({"scores": torch.tensor([0.1, 0.7, 0.2])}, {"whole": True})
    assert record["class"] == "close" and record["class_id"] == 1
    assert record["top"] == [["close", 0.7], ["turn", 0.2], ["open", 0.1]]
    picture = np.zeros((60, 80, 3), np.uint8)
    drawn = prediction.draw(picture, record, min_score=0.5)
    assert drawn.shape == picture.shape and drawn.max() > 200 and picture.max() == 0


def test_a_run_writes_a_line_per_clip_and_the_video(head: Path, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    inputs = [str(video), str(tmp_path / "bad.mp4")]
    summary = main(["--heads", str(head), *inputs, "--output", str(out)])
    assert summary.inputs == 1 and list(summary.failed) == ["bad.mp4"]
    lines = list(read_lines(out / "action" / "predictions.jsonl"))
    assert [line["whole"] for line in lines] == [True, False, False, False]
    assert all(line["class"] in NAMES.names and line["file"] == video.name for line in lines)
    assert len(list(VideoReader(out / "pictures" / f"{video.stem}.mp4"))) == 40
    quick = main(["--heads", str(head), *inputs, "--output", str(tmp_path / "quick"), "--no-pictures"])
    assert quick.inputs == 1 and not (tmp_path / "quick" / "pictures").exists()


def test_clips_of_other_lengths_are_not_mixed(head: Path, tmp_path: Path) -> None:
    """Sections of the head's own task count too; how long a file may take to be read does not."""

    def begin(*options: str) -> None:
        OutputFolder(tmp_path / "out", load_heads([head], options=options), {}).close()

    begin()
    begin("VIDEO.TIMEOUT", "90.0")
    with pytest.raises(ValueError, match="another run"):
        begin("VIDEO.STRIDE", "1")


def test_from_python_by_any_number_of_threads(head: Path, video: Path) -> None:
    predictor = Predictor([head])
    (one,) = predictor.clip_heads

    def results() -> list[tuple[float, float, list[float]]]:
        return [
            (start, end, predictor.clip(one, clip)["scores"].tolist())
            for start, end, clip in one.prediction.clips(video)
        ]

    alone = results()
    assert [start for start, _, _ in alone] == pytest.approx([0, 0, 0.64, 27 / 25])
    with ThreadPoolExecutor(3) as threads:
        assert all(one == alone for one in threads.map(lambda _: results(), range(6)))
    with pytest.raises(ValueError, match="action takes no pictures but videos, clip by clip"):
        predictor([np.zeros((8, 8, 3), np.uint8)])
