"""What a run writes, what it does with bad inputs, and how it goes on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from d2_frozen.claims import CLAIM_FILE, InUseError
from d2_frozen.predict import main, parse
from d2_frozen.prediction.heads import device_here, load_heads
from d2_frozen.prediction.inputs import Item, find_items
from d2_frozen.prediction.outputs import OutputFolder, read_lines
from d2_frozen.prediction.run import BadInputError, OutputError, PredictionRun, Settings
from d2_frozen.prediction.video_file import VideoReader, VideoWriter

SaveHead = Callable[..., Path]


@pytest.fixture
def heads(save_head: SaveHead) -> list[str]:
    return ["--heads", str(save_head("det")), str(save_head("seg"))]


def lines(path: Path) -> list[dict]:
    return list(read_lines(path))


def write_film(path: Path, frames: int = 5) -> None:
    with VideoWriter(path, Fraction(10)) as film:
        for k in range(frames):
            film.add(np.full((48, 64, 3), 40 * k, np.uint8))


def test_every_head_gets_files_of_its_kind(heads: list[str], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = main([*heads, str(pictures), "--output", str(out), "--batch", "2"])
    assert (summary.inputs, summary.pictures, summary.failed) == (3, 3, {})
    for head in ("det", "seg"):
        assert sorted(line["file"] for line in lines(out / head / "predictions.jsonl")) == [
            "a.png",
            "b.png",
            "sub/c.jpg",
        ]
    coco = COCO(str(out / "det" / "coco.json"))
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == {3: "nut", 7: "bolt"}
    assert [image["file_name"] for image in coco.dataset["images"]] == ["a.png", "b.png", "sub/c.jpg"]
    assert coco.dataset["annotations"] and all(
        a["category_id"] in (3, 7) for a in coco.dataset["annotations"]
    )
    assert len(coco.loadRes(coco.dataset["annotations"]).anns) == len(coco.anns)
    for stem, size in {"a": (48, 64), "b": (64, 48), "sub/c": (48, 64)}.items():
        labels = cv2.imread(str(out / "seg" / "labels" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert labels.shape == size and labels.max() <= 2
        assert cv2.imread(str(out / "pictures" / f"{stem}.jpg")).shape == (*size, 3)
    (line,) = (x for x in lines(out / "seg" / "predictions.jsonl") if x["file"] == "sub/c.jpg")
    assert line["labels"] == "labels/sub/c.png" and sum(line["pixels"].values()) == pytest.approx(1, abs=1e-4)


def test_one_bad_picture_is_reported_and_the_others_are_done(
    heads: list[str], pictures: Path, tmp_path: Path
) -> None:
    (pictures / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    summary = main([*heads, str(pictures), "--output", str(out), "--no-pictures"])
    assert summary.inputs == 3 and list(summary.failed) == ["broken.jpg"]
    assert "broken.jpg" in {line["file"] for line in lines(out / "done.jsonl") if "error" in line}
    assert not (out / "pictures").exists()
    with pytest.raises(BadInputError, match=r"broken\.jpg"):
        main([*heads, str(pictures), "--output", str(out), "--no-pictures", "--strict"])


def test_a_run_goes_on_where_it_was_stopped(
    heads: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    call = [*heads, str(pictures), "--output", str(out)]
    whole = tmp_path / "whole"
    main([*heads, str(pictures), "--output", str(whole)])

    from d2_frozen.prediction import run

    read = run.read_picture

    def stopped(path: Path) -> np.ndarray:
        if path.name == "c.jpg":
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(run, "read_picture", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(call)
    assert {line["file"] for line in lines(out / "done.jsonl")} <= {"a.png", "b.png"}
    assert (out / "det" / "coco.json").is_file()  # of what is finished
    with open(out / "det" / "predictions.jsonl", "a") as file:
        file.write('{"file": "sub/c.jpg", "instances"')  # as a kill leaves it
    left = 3 - len(lines(out / "done.jsonl"))
    assert main(call).inputs == left
    for name in ("det/coco.json", "seg/labels/sub/c.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert main(call).inputs == 0


def test_another_file_under_the_same_name_is_predicted_again(
    heads: list[str], pictures: Path, tmp_path: Path
) -> None:
    call = [*heads, str(pictures), "--output", str(tmp_path / "out")]
    main(call)
    cv2.imwrite(str(pictures / "a.png"), np.zeros((32, 40, 3), np.uint8))
    assert main(call).inputs == 1
    sizes = {x["file"]: (x["height"], x["width"]) for x in lines(tmp_path / "out/det/predictions.jsonl")}
    assert sizes == {"a.png": (32, 40), "b.png": (64, 48), "sub/c.jpg": (48, 64)}


def test_a_file_of_another_folder_does_not_replace_the_results_of_one_with_its_name(tmp_path: Path) -> None:
    first, second = (tmp_path / name / "cam" for name in ("monday", "tuesday"))
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(folder.parent.name.encode())
    output = OutputFolder(tmp_path / "out", [], {})
    output.finish(*find_items([first]))
    with pytest.raises(ValueError, match=r"holds results of .*monday/cam/1\.jpg under the name 1\.jpg"):
        output.drop_stale(find_items([second]))
    output.drop_stale(find_items([first, second]))
    # The first folder was moved.
    first.rename(tmp_path / "archive")
    output.drop_stale(find_items([second]))
    assert not output.has(*find_items([second]))
    output.close()


def test_pictures_are_not_left_as_another_command_drew_them(
    heads: list[str], pictures: Path, tmp_path: Path
) -> None:
    """What is finished is not drawn again, so --min-score would do nothing, and after --no-pictures none would come."""
    drawn, without = (
        [*heads, str(pictures), "--output", str(tmp_path / name)] for name in ("drawn", "without")
    )
    main(drawn)
    with pytest.raises(ValueError, match=r"differing: min_score in run\.json"):
        main([*drawn, "--min-score", "0.2"])
    main([*without, "--no-pictures"])
    with pytest.raises(ValueError, match=r"differing: min_score, pictures in run\.json"):
        main(without)
    assert main([*without, "--no-pictures", "--min-score", "0.2"]).inputs == 0


def test_results_of_other_heads_are_not_mixed(
    save_head: SaveHead, heads: list[str], pictures: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    main([*heads, str(pictures), "--output", out])
    with pytest.raises(ValueError, match="another run"):
        main([*heads, str(pictures), "--output", out, "--size", "64"])
    save_head("det", seed=5)
    with pytest.raises(ValueError, match="--overwrite"):
        main([*heads, str(pictures), "--output", out])
    assert main([*heads, str(pictures), "--output", out, "--overwrite"]).inputs == 3


def test_videos_frame_by_frame(heads: list[str], tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", frames=5)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    films = [str(tmp_path / "broken.mp4"), str(tmp_path / "film.mp4")]
    summary = main([*heads, *films, "--output", str(out), "--batch", "2"])
    assert (summary.inputs, summary.pictures, list(summary.failed)) == (1, 5, ["broken.mp4"])
    found = lines(out / "det" / "predictions.jsonl")
    assert [(x["frame"], x["seconds"]) for x in found] == [(k, pytest.approx(k / 10)) for k in range(5)]
    assert len(list((out / "seg" / "labels" / "film").glob("*.png"))) == 5
    drawn = list(VideoReader(out / "pictures" / "film.mp4"))
    assert len(drawn) == 5 and drawn[0][1].shape == (48, 64, 3)
    images = json.loads((out / "det" / "coco.json").read_text())["images"]
    assert images[3]["file_name"] == "film.mp4/000003" and images[3]["video"] == "film.mp4"


def test_a_video_that_breaks_off_leaves_nothing_half_done(
    heads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_film(tmp_path / "film.mp4")
    frames = VideoReader.__iter__

    def breaking(self: VideoReader):
        for k, frame in enumerate(frames(self)):
            if k == 2:
                raise ValueError("breaks off")
            yield frame

    monkeypatch.setattr(VideoReader, "__iter__", breaking)
    out = tmp_path / "out"
    summary = main([*heads, str(tmp_path / "film.mp4"), "--output", str(out)])
    assert list(summary.failed) == ["film.mp4"]
    assert not lines(out / "det" / "predictions.jsonl")
    assert not list((out / "pictures").glob("*"))


def test_a_video_that_cannot_be_drawn_fails_alone(
    heads: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its frames wait to be written when the first one fails; the pictures behind it were blamed for them."""
    write_film(tmp_path / "film.mp4")

    def cannot(*_: object) -> None:
        raise RuntimeError("no encoder for this size")

    monkeypatch.setattr(VideoWriter, "add", cannot)
    summary = main([*heads[:2], str(tmp_path / "film.mp4"), str(pictures), "--output", str(tmp_path / "out")])
    assert summary.inputs == 3 and list(summary.failed) == ["film.mp4"]


def test_a_damaged_video_is_predicted_as_far_as_it_decodes(
    heads: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Zeros over a stretch in the middle: the frames in front of it and behind it are there, and the log says it."""
    path = tmp_path / "film.mp4"
    noise = np.random.default_rng(0)
    with VideoWriter(path, Fraction(10)) as film:
        for _ in range(40):
            film.add(noise.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    middle = content.find(b"mdat") + (len(content) // 2)
    content[middle : middle + 6000] = bytes(6000)
    path.write_bytes(content)
    reader = VideoReader(path)
    there = len(list(reader))
    assert 0 < there < 40 and reader.damaged
    logger = logging.getLogger("d2_frozen")
    logger.addHandler(caplog.handler)  # Detectron2's setup_logger keeps its lines from the root logger
    try:
        summary = main([*heads[:2], str(path), "--output", str(tmp_path / "out")])
    finally:
        logger.removeHandler(caplog.handler)
    assert (summary.failed, summary.inputs) == ({}, 1)
    frames = [line["frame"] for line in lines(tmp_path / "out" / "det" / "predictions.jsonl")]
    assert frames == list(range(there))
    assert f"film.mp4 is cut or damaged: {there} frames are predicted" in caplog.text


def test_results_inside_the_folder_of_inputs_are_no_inputs(
    heads: list[str], pictures: Path, tmp_path: Path
) -> None:
    command = [*heads[:2], str(pictures), "--output", str(pictures / "predictions")]
    assert main(command).inputs == 3
    assert main(command).inputs == 0
    assert main([*command, "--overwrite"]).inputs == 3
    assert len(lines(pictures / "predictions" / "det" / "predictions.jsonl")) == 3
    # Given by themselves, results are pictures like others.
    again = main([*heads[:2], str(pictures / "predictions/pictures"), "--output", str(tmp_path / "o")])
    assert again.inputs == 3
    with pytest.raises(ValueError, match="both an input and the folder for results"):
        main([*heads[:2], str(pictures), "--output", str(pictures)])


def test_pictures_cut_out_of_a_video_do_not_share_its_folder_of_results(tmp_path: Path) -> None:
    for name in ("film.mp4", "film/000001.png", "b.jpg", "b.png", "b.jpg.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    stems = {item.name: item.stem for item in find_items([tmp_path])}
    assert stems["film.mp4"] == "film.mp4" and stems["film/000001.png"] == "film/000001"
    assert len(set(stems.values())) == 5


def test_pictures_of_any_shape_and_none_of_16_bits(heads: list[str], tmp_path: Path) -> None:
    """A side that the resize would round to nothing keeps a pixel; 16 bits would be nearly all white."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.full((3000, 3, 3), 90, np.uint8)).save(folder / "tall.png")
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((40, 40), 200, np.uint16)).save(folder / "shallow.png")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(folder / "float.tif")
    summary = main([*heads, str(folder), "--output", str(tmp_path / "out")])
    assert summary.inputs == 2 and sorted(summary.failed) == ["deep.png", "float.tif"]
    assert "more than 8 bits" in summary.failed["deep.png"]
    assert "floating point" in summary.failed["float.tif"]


def test_a_picture_too_long_for_jpeg_is_drawn_smaller(heads: list[str], tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 66000, 3), 90, np.uint8)).save(tmp_path / "long.png")
    main(["--heads", heads[2], str(tmp_path / "long.png"), "--output", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out/pictures/long.jpg").size == (65500, 7)
    assert Image.open(tmp_path / "out/seg/labels/long.png").size == (66000, 8)


def test_a_folder_whose_run_json_is_something_else(heads: list[str], pictures: Path, tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "precious"
    for folder in (out, outside):
        folder.mkdir()
    command = [*heads[:2], str(pictures / "a.png"), "--output", str(out)]
    (out / "run.json").write_text("{half")
    with pytest.raises(ValueError, match="run.json is not what a prediction run writes"):
        main(command)
    (out / "run.json").write_text(json.dumps({"heads": {str(outside): {}, "../precious": {}, "..": {}}}))
    assert main([*command, "--overwrite"]).inputs == 1
    assert outside.is_dir()


def test_options_are_for_the_heads_that_have_them(heads: list[str], tmp_path: Path) -> None:
    options = ["TEST.SLIDING_WINDOW.SIZE", "32"]
    detection, segmentation = load_heads(heads[1:], options=options)
    assert "SLIDING_WINDOW" not in detection.cfg.TEST and segmentation.cfg.TEST.SLIDING_WINDOW.SIZE == 32
    with pytest.raises(
        ValueError, match=r"no head has the config key TEST.SLIDING_WINDOW.SIZES; did you mean"
    ):
        load_heads(heads[1:], options=["TEST.SLIDING_WINDOW.SIZES", "32"])
    with pytest.raises(ValueError, match="KEY VALUE pairs"):
        load_heads(heads[1:], options=["SEED"])


@pytest.mark.parametrize("flags", [["--batch", "-3"], ["--readers", "0"]])
def test_counts_that_would_predict_nothing_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--heads", "det.pth", "a.jpg", "--output", "out", *flags])


def test_devices_and_names_that_cannot_be(heads: list[str]) -> None:
    with pytest.raises(ValueError, match="'abacus' is not known"):
        load_heads(heads[1:], device="abacus")
    with pytest.raises(ValueError, match="torch sees [0-9]+ GPUs"):
        load_heads(heads[1:], device="cuda:99")
    for name in ("..", "pictures"):
        with pytest.raises(ValueError, match="cannot be called"):
            load_heads([f"{name}={heads[1]}"])


def test_a_head_trained_on_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four GPUs there, of one here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    trained_on = ["cuda:3", "cuda:0", "cuda", "cpu"]
    assert [device_here(one) for one in trained_on] == ["cuda", "cuda:0", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {device_here(one) for one in trained_on} == {"cpu"}


def test_odd_sides_are_padded_for_the_codec(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "odd.mp4", Fraction(30000, 1001)) as film:
        film.add(np.full((47, 63, 3), 200, np.uint8))
    reader = VideoReader(tmp_path / "odd.mp4")
    ((_, frame),) = list(reader)
    assert frame.shape == (48, 64, 3) and abs(float(reader.rate) - 29.97) < 0.01
    assert abs(int(frame[47, 63, 0]) - 200) < 6


def test_inputs_of_equal_names_get_distinct_ones(tmp_path: Path) -> None:
    for name in ("x/a.jpg", "y/a.jpg", "x/a.png", "x/.hidden.jpg", "x/notes.txt", "x/film.MP4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "z").mkdir()
    (tmp_path / "z/link").symlink_to(tmp_path / "x")
    assert [item.name for item in find_items([tmp_path / "z"])] == [
        "link/a.jpg",
        "link/a.png",
        "link/film.MP4",
    ]
    items = find_items([tmp_path / "x", tmp_path / "y", tmp_path / "x/a.jpg"])
    assert [item.name for item in items] == ["a.jpg", "a.png", "film.MP4", "y/a.jpg"]
    assert [item.stem for item in items] == ["a.jpg", "a.png", "film", "y/a"]  # two files are called a
    assert [item.is_video for item in items] == [False, False, True, False]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_items(["nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures"):
        find_items([tmp_path / "empty"])


def test_inputs_may_follow_the_heads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = parse(
        ["--heads", "det.pth", "s=seg.pkl", "photos", "b.jpg", "--output", "out", "--options", "SEED=1", "c"]
    )
    assert (args.heads, args.inputs, args.options) == (
        ["det.pth", "s=seg.pkl"],
        ["photos", "b.jpg", "c"],
        ["SEED=1"],
    )
    with pytest.raises(SystemExit):
        parse(["--heads", "photos", "--output", "out"])
    assert "no checkpoint" in capsys.readouterr().err
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(SystemExit):
        parse(["--heads", str(tmp_path), "--output", "out"])
    assert f"Do you mean {tmp_path}/model_final.pth?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--heads", "det.pth", "--output", "out"])


def test_an_output_that_is_a_file(heads: list[str], pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--output cannot be a folder for results: File exists: .*/file"):
        main([*heads, str(pictures), "--output", str(tmp_path / "file")])


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "d2_frozen.predict",
        "--heads",
        "no.pth",
        ".",
        "--output",
        str(tmp_path / "o"),
    ]
    (tmp_path / "a.jpg").touch()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 1
        and "error: no weights at no.pth" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_what_a_failed_batch_computed_is_freed_before_its_pictures_are_tried_alone() -> None:
    """Two pictures that a GPU has no room for may fit one after the other, but not beside the remains of both."""
    left: list[weakref.ref] = []
    alone: list[bool] = []

    class Full:
        picture_heads = ["a head"]

        def compact(self, pictures: list[np.ndarray]) -> list[dict]:
            if len(pictures) > 1:
                maps = np.zeros(3)
                left.append(weakref.ref(maps))
                raise RuntimeError("CUDA out of memory")
            alone.append(left[0]() is None)
            return [{}]

    class Nowhere:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments, **more: None

    run = PredictionRun(Full(), Nowhere(), Settings(batch=2, pictures=False))  # type: ignore[arg-type]
    run._write = lambda *arguments: None  # type: ignore[method-assign]
    for name in "ab":
        run._take(Item(Path(name), name, name, False), lambda: np.zeros((4, 4, 3), np.uint8))
    assert alone == [True, True]


def test_one_run_at_a_time_writes_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object, **asked: str) -> None:
        raise InUseError(asked["advice"])

    with monkeypatch.context() as patch:
        patch.setattr("d2_frozen.prediction.outputs.claimed", taken)
        with pytest.raises(InUseError, match="choose another --output"):
            OutputFolder(tmp_path, [], {})
    first = OutputFolder(tmp_path, [], {})
    assert (tmp_path / CLAIM_FILE).exists()
    first.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(
    heads: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing can be tidied up then."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    command = [*heads, str(pictures), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "finish", full)
        patch.setattr(OutputFolder, "collect", full)
        with pytest.raises(
            OutputError, match="results cannot be written: .*No space left.*start again to go on"
        ):
            main(command)
    assert not (tmp_path / "out" / CLAIM_FILE).exists()
    whole = [*heads, str(pictures), "--output", str(tmp_path / "whole")]
    assert not main(command).failed and not main(whole).failed
    for head in ("det", "seg"):
        found, expected = (
            lines(tmp_path / folder / head / "predictions.jsonl") for folder in ("out", "whole")
        )
        assert sorted(map(str, found)) == sorted(map(str, expected))
