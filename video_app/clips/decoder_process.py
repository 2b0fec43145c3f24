"""The process that decodes: requests on stdin, answers on stdout, one video at a time. Made to be killed.

A message is 12 bytes (length of the JSON, uint32, and of the pixels, uint64; little-endian), the JSON, the pixels.
``decoder.py`` is the other side. FFmpeg may crash, hang or leak here without harm to training.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

import cv2
import numpy as np

from video_app.clips.reader import ClipError, FewerFrames, OtherReader, ReaderMissing, open_clip
from video_app.clips.sampling import SamplingPlan

HEADER = struct.Struct("<IQ")
# A decoder whose parent is gone and which hangs ends itself this much after the time limit; loading a reader may take
# that long.
_GRACE_S = 90


def main() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # Libraries that print would break the protocol.
    os.dup2(2, 1)
    cv2.setNumThreads(0)
    # Ctrl-C, and what a cluster sends to all processes of a job, are for the parent, which closes our stdin.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    while header := requests.read(HEADER.size):
        length, _ = HEADER.unpack(header)
        request = json.loads(requests.read(length))
        # The kernel ends us if C code hangs: nothing here needs to run for that.
        signal.alarm(int(request["timeout_s"]) + _GRACE_S)
        answer, pixels = _answer(request)
        signal.alarm(0)
        _send(answers, answer, pixels)


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    try:
        return _read(request)
    except ReaderMissing as err:
        return {"error": str(err), "kind": "reader"}, None
    except OtherReader as err:
        return {"error": str(err), "kind": "other"}, None
    except ClipError as err:
        return {"error": str(err), "kind": "clip"}, None
    except Exception as err:  # whatever a reader raises about this file, the next one is not affected
        return {"error": f"{type(err).__name__}: {err}", "kind": "clip"}, None


def _read(request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    plan = SamplingPlan(**{**request["plan"], "draws": tuple(request["plan"]["draws"])})
    with open_clip(request["path"], request["reader"], request["folder_fps"]) as clip:
        held = len(clip)
        indices = plan.indices(clip.times_s)
        try:
            frames = clip.read(indices.ravel().tolist(), request["short_side_px"])
        except FewerFrames as fewer:
            # The container claims too much: the clip is placed anew in what there is.
            held = fewer.held
            indices = plan.indices(clip.times_s[:held])
            frames = clip.read(indices.ravel().tolist(), request["short_side_px"])
        answer = {
            "shape": [*indices.shape, *frames.shape[1:]],
            "indices": indices.tolist(),
            "claimed": len(clip),
            "held": held,
            "fps": clip.fps,
            "duration_s": clip.duration_s,
            "rotation_deg": clip.rotation_deg,
            "reader": clip.reader,
        }
    return answer, np.ascontiguousarray(frames)


def _send(answers: BinaryIO, answer: dict[str, Any], pixels: np.ndarray | None) -> None:
    text = json.dumps(answer).encode()
    answers.write(HEADER.pack(len(text), 0 if pixels is None else pixels.nbytes) + text)
    if pixels is not None:
        answers.write(pixels.reshape(-1).data)
    answers.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)
