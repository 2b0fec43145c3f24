"""Hanging and crashing files cost their time limit and nothing else."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from d2_frozen.data import loader
from d2_frozen.data.loader import DrawnDataset, Place
from video_app.clips import decoder as decoder_module
from video_app.clips.bad_clips import BadClips, read_bad_clips
from video_app.clips.crops import TrainCrop
from video_app.clips.decoder import BadClip, ClipDecoder, DecodedClip, VideoReading
from video_app.clips.decoder_process import HEADER
from video_app.clips.mapper import ClipMapper
from video_app.clips.reader import installed_readers
from video_app.clips.sampling import SamplingPlan

PLAN = SamplingPlan("uniform", frames=4)
needs_two_readers = pytest.mark.skipif(len(installed_readers()) < 2, reason="one reader is installed")


def pid_of(decoder: ClipDecoder) -> int:
    assert decoder._child is not None
    return decoder._child._process.pid


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_threads_take_turns_and_get_their_own_clips(video: Path) -> None:
    """Two that wrote into one pipe waited for ever, or for each other's frames."""
    decoder = ClipDecoder(VideoReading(timeout_s=10))
    plans = [SamplingPlan("uniform", frames=count) for count in (1, 2, 3, 4)]
    alone = [decoder.read(str(video), plan).frames for plan in plans]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda k: decoder.read(str(video), plans[k % 4]).frames, range(16)))
    assert all(np.array_equal(frames, alone[k % 4]) for k, frames in enumerate(together))
    decoder.close()


@needs_two_readers
@pytest.mark.parametrize(
    "blow, told", [(signal.SIGSTOP, "took longer than 1 s"), (signal.SIGSEGV, "by signal 11")]
)
def test_the_other_reader_steps_in(
    video: Path, blow: signal.Signals, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process stands for a hang in C code, a signal for a crash, in each process that has the file."""
    decoder = ClipDecoder(VideoReading(timeout_s=1))
    expected = decoder.read(str(video), PLAN).frames
    first = pid_of(decoder)
    if blow == signal.SIGSTOP:
        os.kill(first, blow)
    else:
        ask = decoder_module._Child.ask

        def crashing(self, request, timeout_s):
            if request["reader"] == decoder.readers[0]:
                self._process.send_signal(blow)
                self._process.wait()
            return ask(self, request, timeout_s)

        monkeypatch.setattr(decoder_module._Child, "ask", crashing)
    clip = decoder.read(str(video), PLAN)
    assert clip.reader == decoder.readers[1] and told in clip.fault
    assert np.array_equal(clip.frames, expected)
    assert gone(first)
    monkeypatch.undo()
    assert decoder.read(str(video), PLAN).fault == ""
    decoder.close()


def test_a_process_that_was_killed_between_two_videos_is_not_the_files_fault(video: Path) -> None:
    """By the kernel for want of memory, say: with one reader, a good file would stay on the bad list for ever."""
    decoder = ClipDecoder(VideoReading("pyav"))
    decoder.readers = ["pyav"]
    expected = decoder.read(str(video), PLAN).frames
    first = pid_of(decoder)
    os.kill(first, signal.SIGKILL)
    clip = decoder.read(str(video), PLAN)
    assert clip.fault == "" and np.array_equal(clip.frames, expected) and pid_of(decoder) != first
    decoder.close()


def test_lengths_of_messages_have_room_for_long_clips_of_large_frames() -> None:
    """32 frames x 4 clips of 7680 x 4320 pixels, at VIDEO.SHORT_SIDE 0, are more than 4 GiB."""
    assert HEADER.unpack(HEADER.pack(100, 32 * 4 * 7680 * 4320 * 3)) == (100, 12740198400)


def test_a_file_that_hangs_every_reader(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "_START_S", 0.0)
    monkeypatch.setattr(
        decoder_module._Child,
        "_receive",
        lambda self, *a: (_ for _ in ()).throw(decoder_module._Died("slow")),
    )
    decoder = ClipDecoder(VideoReading())
    with pytest.raises(BadClip, match=f"{decoder.readers[-1]}: slow"):
        decoder.read(str(video), PLAN)
    assert decoder._child is None


def test_one_process_serves_until_it_is_recycled(video: Path) -> None:
    decoder = ClipDecoder(VideoReading("pyav", recycle_after=2))
    pids = []
    for _ in range(4):
        decoder.read(str(video), PLAN)
        pids.append(pid_of(decoder))
    assert pids[0] == pids[1] != pids[2] == pids[3]
    assert pickle.loads(pickle.dumps(decoder))._child is None
    decoder.close()
    assert gone(pids[-1])


def test_the_process_ends_with_its_parent(video: Path) -> None:
    """Also if the parent is killed and can close nothing."""
    code = (
        "import os, signal\n"
        "from video_app.clips.decoder import *\n"
        "d = ClipDecoder(VideoReading('pyav'))\n"
        f"d.read({str(video)!r}, SamplingPlan())\n"
        "print(d._child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=decoder_module._ROOT
    )
    pid = int(done.stdout)
    for _ in range(100):
        # Without a parent that collects it, it may stay in the table of processes as a zombie.
        if gone(pid) or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            return
        time.sleep(0.05)
    raise AssertionError("the decoding process outlived its parent")


def test_the_process_does_not_load_torch() -> None:
    """It would cost seconds and hundreds of megabytes per loader worker."""
    code = "import sys, video_app.clips.decoder_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=decoder_module._ROOT).returncode == 0


def make_mapper(tmp_path: Path, train: bool = True, **options: object) -> ClipMapper:
    return ClipMapper(
        VideoReading("pyav", short_side_px=48),
        SamplingPlan("dense", 4, 2, clips=1 if train else 2),
        BadClips(str(tmp_path)),
        size_px=32,
        train_crop=TrainCrop("random_resized", 32) if train else None,
        num_crops=3,
        **options,  # type: ignore[arg-type]
    )


def record(path: Path | str, video_id: int = 0) -> dict:
    return {"file_name": str(path), "label": 5, "video_id": video_id}


class Seeded(Dataset):
    """As the loader of d2_frozen does: numpy's state is a function of the position."""

    def __init__(self, mapper: ClipMapper, path: Path):
        self.mapper, self.path = mapper, path

    def __len__(self) -> int:
        return 4

    def __getitem__(self, position: int) -> torch.Tensor:
        np.random.seed(position)
        sample = self.mapper(record(self.path))
        assert sample is not None
        return sample["video"]


def test_samples_do_not_depend_on_workers(video: Path, tmp_path: Path) -> None:
    """And decoding works inside loader workers, which are daemons."""
    data = Seeded(make_mapper(tmp_path), video)
    alone, shared = (list(DataLoader(data, num_workers=n, batch_size=None)) for n in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, shared))
    assert not torch.equal(alone[0], alone[1])
    assert alone[0].shape == (1, 4, 3, 32, 32) and alone[0].dtype == torch.uint8
    data.mapper.decoder.close()


def test_views_at_test(video: Path, tmp_path: Path) -> None:
    """Clips x crops, the crops of a clip side by side; no draws."""
    mapper = make_mapper(tmp_path, train=False)
    sample = mapper(record(video, 7))
    assert sample is not None
    assert sample["video"].shape == (6, 4, 3, 32, 32)
    assert sample["frame_indices"] == [[8, 10, 12, 14], [25, 27, 29, 31]]
    assert (sample["label"], sample["video_id"]) == (5, 7)
    bgr = make_mapper(tmp_path, train=False, bgr=True)(record(video))
    assert bgr is not None and torch.equal(bgr["video"], sample["video"].flip(2))


def test_bad_clips_are_noted_once_and_replaced(tmp_path: Path) -> None:
    broken = tmp_path / "with space.mp4"
    broken.write_text("not a video")
    train, test = make_mapper(tmp_path), make_mapper(tmp_path, train=False)
    assert train(record(broken)) is None
    assert train(record(broken)) is None
    listed = read_bad_clips(tmp_path / "bad_clips.txt")
    assert list(listed) == [str(broken)] and "Invalid data" in listed[str(broken)]
    # The test mapper began before; a resumed run reads the list, and does not try again.
    sample = test(record(broken))
    assert sample is not None and "video" not in sample and "Invalid data" in sample["bad"]
    again = make_mapper(tmp_path)
    assert len(again.bad_clips) == 1 and again(record(broken)) is None and again.decoder._child is None
    with pytest.raises(BadClip, match="VIDEO.STRICT"):
        make_mapper(tmp_path, strict=True)(record(broken))
    error = DrawnDataset([record(broken)], make_mapper(tmp_path, strict=True), 0, skip_bad=False)[
        Place(0, 0)
    ].error
    assert "set VIDEO.STRICT False" in error and "SKIP_BAD" not in error


def test_a_file_server_that_is_away_makes_no_clip_a_bad_one(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was noted, and never tried again, also in later runs."""
    waits: list[float] = []
    monkeypatch.setattr("d2_frozen.data.loader.time", SimpleNamespace(sleep=waits.append))

    def away(path: str, mode: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    mapper = make_mapper(tmp_path)
    read = mapper.decoder.read

    def fails_once(path: str, plan: SamplingPlan) -> DecodedClip:
        if not waits:
            raise BadClip("pyav: Stale file handle")
        monkeypatch.delattr(loader, "open")
        return read(path, plan)

    monkeypatch.setattr(loader, "open", away, raising=False)
    monkeypatch.setattr(mapper.decoder, "read", fails_once)
    sample = DrawnDataset([record(video)], mapper, 0, skip_bad=False)[Place(0, 0)].sample
    assert sample["video"].shape[1] == 4 and waits == [1] and not mapper.bad_clips


def test_a_list_of_bad_clips_that_cannot_be_written_ends_no_training(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    bad = BadClips(str(tmp_path / "file" / "out"))
    bad.add("a.mp4", "broken")
    assert bad.reason("a.mp4") == "broken" and "a.mp4 (broken) is not noted in" in caplog.text
