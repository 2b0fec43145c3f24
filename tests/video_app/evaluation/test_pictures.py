"""The contact sheet shows the frames of a clip in order, and a row for a file without frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from d2_frozen.data import register_from_config
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from video_app.config import add_video_config
from video_app.evaluation.pictures import clip_strip, prediction_line, write_contact_sheet

FRAME = 96
GREY, GREEN, RED = [60, 60, 60], [20, 120, 40], [180, 30, 30]


def darkest(band: np.ndarray) -> list[int]:
    """The colour of the text."""
    return band.reshape(-1, 3)[band.sum(axis=2).argmin()].tolist()


def test_frames_are_spread_over_the_clip_and_colour_says_right_or_wrong() -> None:
    frames = torch.arange(11, dtype=torch.uint8).mul(20)[:, None, None, None].expand(11, 3, 32, 32)
    classes, scores = ["run", "jump"], torch.tensor([0.1, 0.9])
    right = clip_strip("jump", frames, *prediction_line(classes, 1, scores))
    assert right.shape == (40 + FRAME, 6 * FRAME, 3)
    assert [int(right[60, k * FRAME + 5, 0]) for k in range(6)] == [0, 40, 80, 120, 160, 200]
    wrong = clip_strip("run", frames, *prediction_line(classes, 0, scores))
    bad = clip_strip("run", None, *prediction_line(classes, 0, None, "the file is empty"))
    assert darkest(right[:20]) == GREY
    assert (darkest(right[20:40]), darkest(wrong[20:40]), darkest(bad[20:40])) == (GREEN, RED, RED)
    assert (bad[40:] == 225).all()
    one = clip_strip("run", frames[10:])
    assert (one[20:40] == 255).all()
    assert (one[40:, :FRAME] == 200).all() and (one[40:, FRAME:] == 225).all()


class Reddest(nn.Module):
    """Class 1 where the first channel that it is given is bright."""

    def forward(self, batch: list[dict]) -> list[dict]:
        assert not self.training
        return [{"scores": self._scores(item)} for item in batch]

    def _scores(self, item: dict) -> torch.Tensor | None:
        if "video" not in item:
            return None
        share = item["video"][:, :, 0].float().mean() / 255
        return torch.stack([1 - share, share])


@pytest.fixture
def cfg(tmp_path: Path, write_picture_folders: Callable[[Path], None]) -> Iterator[CfgNode]:
    cfg = add_video_config(get_cfg())
    write_picture_folders(tmp_path)
    (tmp_path / "list.txt").write_text("blue 0\nred 1\nbroken.mp4 1\n")
    (tmp_path / "classes.txt").write_text("blue\nred\n")
    cfg.DATASETS.REGISTER = [{"name": "t_sheet", "type": "video_list", "list": str(tmp_path / "list.txt")}]
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.merge_from_list(
        ["VIDEO.NUM_FRAMES", 4, "VIDEO.STRIDE", 1, "VIDEO.CROP_SIZE", 32, "DATALOADER.NUM_WORKERS", 0]
    )
    register_from_config(cfg)
    yield cfg
    DatasetCatalog.remove("t_sheet")
    MetadataCatalog.remove("t_sheet")


@pytest.fixture
def write_picture_folders() -> Callable[[Path], None]:
    """Videos as folders of pictures: "red", "blue"; "broken.mp4" is text."""

    def write(root: Path) -> None:
        for name, bgr in (("red", (0, 0, 255)), ("blue", (255, 0, 0))):
            (root / name).mkdir()
            for k in range(6):
                cv2.imwrite(str(root / name / f"{k}.png"), np.full((40, 60, 3), bgr, np.uint8))
        (root / "broken.mp4").write_text("not a video")

    return write


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_sheet_of_a_dataset(cfg: CfgNode, channels: str) -> None:
    """Colours are those of the video, whatever order the model is given them in."""
    cfg.INPUT.FORMAT = channels
    model = Reddest().train()
    assert write_contact_sheet(cfg, model, "t_sheet", 0) is None
    path = write_contact_sheet(cfg, model, "t_sheet", 9)
    assert model.training
    assert path == Path(cfg.OUTPUT_DIR, "inference/predictions_t_sheet.jpg")
    sheet = cv2.imread(str(path))[..., ::-1].astype(int)
    middles = [sheet[8 + 40 + FRAME // 2, 8 + column * (6 * FRAME + 16) + FRAME // 2] for column in range(3)]
    for found, wanted in zip(middles, ([0, 0, 255], [255, 0, 0], [225, 225, 225])):
        assert np.abs(found - wanted).max() < 12
