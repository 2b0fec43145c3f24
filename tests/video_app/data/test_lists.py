"""Lists say what they say, and preparing them finds every bad file once."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from d2_frozen.data import BadDataError, build_train_loader, loader, register_from_config
from d2_frozen.data.loader import SampleError
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from video_app.clips.bad_clips import read_bad_clips
from video_app.clips.mapper import ClipMapper
from video_app.config import add_video_config
from video_app.data import builtin, load_video_folder, load_video_list
from video_app.data.lists import folder_list, read_kinetics_csv, read_list, videos_below
from video_app.data.prepare import prepare_datasets
from video_app.prepare import main


@pytest.fixture
def cfg() -> CfgNode:
    return add_video_config(get_cfg())


def test_paths_may_hold_blanks(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# a remark\na b/c d.mp4 3\n\nx.mp4\t10\n")
    assert read_list(tmp_path / "list.txt") == [("a b/c d.mp4", 3), ("x.mp4", 10)]
    for wrong in ("a.mp4\n", "a.mp4 -1\n", "a.mp4 dog\n", "7\n", ""):
        (tmp_path / "wrong.txt").write_text(wrong)
        with pytest.raises(ValueError, match="path label"):
            read_list(tmp_path / "wrong.txt")


def test_entries_of_the_register(cfg: CfgNode, tmp_path: Path, video: Path) -> None:
    for name in ("run/a b.mp4", "jump/c.mp4", "jump/deep/d.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, tmp_path / "videos" / name)
    (tmp_path / "list.txt").write_text("run/a b.mp4 1\njump/c.mp4 0\n")
    cfg.DATASETS.REGISTER = [
        {"name": "t_video_list", "type": "video_list", "list": str(tmp_path / "list.txt")}
        | {"root": str(tmp_path / "videos"), "classes": ["jump", "run"]},
        {"name": "t_video_folder", "type": "video_folder", "root": str(tmp_path / "videos")},
    ]
    register_from_config(cfg, used=["t_video_list", "t_video_folder"])
    listed, found = DatasetCatalog.get("t_video_list"), DatasetCatalog.get("t_video_folder")
    root = str(tmp_path / "videos")
    assert listed[0] == {
        "file_name": f"{root}/run/a b.mp4",
        "label": 1,
        "video_id": 0,
        "image_id": "run/a b.mp4",
    }
    assert [(r["file_name"][len(root) + 1 :], r["label"]) for r in found] == [
        *[("jump/c.mp4", 0), ("jump/deep/d.mp4", 0)],
        ("run/a b.mp4", 1),
    ]
    for name in ("t_video_list", "t_video_folder"):
        assert MetadataCatalog.get(name).classes == ["jump", "run"]
        assert MetadataCatalog.get(name).evaluator_type == "video"


def test_a_folder_that_lacks_a_class_is_told_how_to_name_it(cfg: CfgNode, tmp_path: Path) -> None:
    for name in ("train/jump/a.mp4", "train/run/b.mp4", "val/run/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    parts = ("train", "val")
    entries = [
        {"name": f"t_lacks_{part}", "type": "video_folder", "root": str(tmp_path / part)} for part in parts
    ]
    cfg.DATASETS.REGISTER = entries
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("t_lacks_train",), ("t_lacks_val",)
    with pytest.raises(BadDataError, match=r"give its entry all of them: classes: \[jump, run\]"):
        prepare_datasets(cfg)


def test_wrong_labels_and_roots_are_told(tmp_path: Path, video: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{video} 2\n")
    assert load_video_list(str(tmp_path / "list.txt"))[0]["label"] == 2
    (tmp_path / "classes.txt").write_text("jump\nrun\n")
    with pytest.raises(ValueError, match="label 2, but there are 2 classes"):
        load_video_list(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("nowhere.mp4 1\n")
    with pytest.raises(FileNotFoundError, match="relative to root"):
        load_video_list(str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="no subfolders"):
        load_video_folder(str(tmp_path))


def test_a_root_one_folder_too_high(tmp_path: Path, video: Path) -> None:
    """The parts of a dataset would become its classes, and a training of telling train from val begin."""
    for part in ("train", "val"):
        (tmp_path / part / "jump").mkdir(parents=True)
        (tmp_path / part / "jump" / "a.mp4").symlink_to(video)
    with pytest.raises(ValueError, match=r"has the folders train, val, which are parts .* e\.g\. .*/train"):
        load_video_folder(str(tmp_path))
    assert [r["label"] for r in load_video_folder(str(tmp_path), classes=["train", "val"])] == [0, 1]
    assert len(load_video_folder(str(tmp_path / "train"))) == 1
    with pytest.raises(SystemExit, match="parts of a dataset, no classes"):
        main(["folder", "--videos", str(tmp_path), "--output", str(tmp_path / "lists")])


def test_the_mapper_reads_the_config(cfg: CfgNode, tmp_path: Path, video: Path) -> None:
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.merge_from_list(["VIDEO.NUM_FRAMES", 2, "VIDEO.CROP_SIZE", 32, "VIDEO.SHORT_SIDE", 40])
    cfg.merge_from_list(["VIDEO.READER", "pyav", "INPUT.FORMAT", "RGB"])
    record = {"file_name": str(video), "label": 0, "video_id": 0}
    for is_train, views in ((True, 1), (False, 12)):
        mapper = ClipMapper.from_config(cfg, is_train)
        sample = mapper(record)
        assert sample is not None and sample["video"].shape == (views, 2, 3, 32, 32)
        mapper.decoder.close()
    cfg.VIDEO.TRAIN_CROP = "corner"
    with pytest.raises(ValueError, match="VIDEO.TRAIN_CROP"):
        ClipMapper.from_config(cfg, True)


def test_the_training_loader_replaces_bad_files(cfg: CfgNode, tmp_path: Path, video: Path) -> None:
    """The loader of d2_frozen serves videos, with equal batches from workers, and without broken files."""
    (tmp_path / "broken.mp4").write_text("not a video")
    (tmp_path / "list.txt").write_text(f"{video} 0\nbroken.mp4 1\n")
    cfg.DATASETS.REGISTER = [{"name": "t_loader", "type": "video_list", "list": str(tmp_path / "list.txt")}]
    cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN, cfg.SEED = str(tmp_path), ["t_loader"], 1
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.merge_from_list(
        ["VIDEO.NUM_FRAMES", 2, "VIDEO.CROP_SIZE", 16, "VIDEO.SHORT_SIDE", 20, "SOLVER.IMS_PER_BATCH", 4]
    )
    register_from_config(cfg)
    batches = []
    for workers in (0, 1):
        cfg.DATALOADER.NUM_WORKERS = workers
        mapper = ClipMapper.from_config(cfg, True)
        batches.append(next(iter(build_train_loader(cfg, mapper=mapper))))
        mapper.decoder.close()
    for alone, worked in zip(*batches):
        assert alone["label"] == worked["label"] == 0 and torch.equal(alone["video"], worked["video"])
    assert list(read_bad_clips(tmp_path / "bad_clips.txt")) == [str(tmp_path / "broken.mp4")]


def test_a_set_without_one_good_video_says_why(cfg: CfgNode, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    records = [{"file_name": str(tmp_path / "a.mp4"), "label": 0, "video_id": 0, "image_id": "a.mp4"}]
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "SEED", 0, "DATALOADER.NUM_WORKERS", 0])
    loader = build_train_loader(cfg, mapper=ClipMapper.from_config(cfg, True), dataset=records)
    with pytest.raises(SampleError, match=r"a.mp4: .*the file is empty.*bad_clips.txt lists all"):
        next(iter(loader))


CSV = """label,youtube_id,time_start,time_end,split
riding a bike,AbCdEfGhIjK,12,22,train
abseiling,-_xYz012345,0,10,train
abseiling,gone0000000,5,15,train
riding a bike,broken00000,1,11,train
"""


def test_kinetics_is_prepared_and_resumed(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names as two downloaders write them; one file is missing, one is broken."""
    videos, output = tmp_path / "videos", tmp_path / "lists"
    (tmp_path / "train.csv").write_text(CSV)
    (videos / "riding a bike").mkdir(parents=True)
    shutil.copy(video, videos / "riding a bike/AbCdEfGhIjK_000012_000022.mp4")
    shutil.copy(video, videos / "-_xYz012345.mp4")
    (videos / "broken00000_000001_000011.mp4").write_text("not a video")
    command = [
        "kinetics",
        "--csv",
        str(tmp_path / "train.csv"),
        "--videos",
        str(videos),
        "--output",
        str(output),
    ]
    command += ["--workers", "2", "--reader", "pyav"]
    main(command)
    assert "2 videos" in (said := capsys.readouterr().out) and "1 bad, 1 of the csv missing" in said
    assert (output / "classes.txt").read_text() == "abseiling\nriding a bike\n"
    assert read_list(output / "train.txt") == [
        ("riding a bike/AbCdEfGhIjK_000012_000022.mp4", 1),
        ("-_xYz012345.mp4", 0),
    ]
    assert "Invalid data" in (output / "train_bad.txt").read_text()
    assert (output / "train_missing.txt").read_text() == "gone0000000_000005_000015\n"
    # Killed in the middle of a line: what is whole counts, and only a file that changed is looked at again.
    journal = output / "train_checked.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines) + '\n{"path": "half')
    shutil.copy(video, videos / "broken00000_000001_000011.mp4")
    seen: list[str] = []
    look = __import__("video_app.prepare", fromlist=["_look"])._look
    monkeypatch.setattr("video_app.prepare._look", lambda d, r, path: seen.append(path) or look(d, r, path))
    main(command)
    assert seen == ["broken00000_000001_000011.mp4"]
    assert len(read_list(output / "train.txt")) == 3
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_csv_without_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\n")
    with pytest.raises(ValueError, match="no column label"):
        read_kinetics_csv(tmp_path / "test.csv")


def test_kinetics_has_a_name(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out under DETECTRON2_DATASETS as `prepare` leaves it."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {})
    builtin.register_builtin(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="video_app.prepare kinetics --csv val.csv"):
        DatasetCatalog.get("kinetics400_val")
    folder = tmp_path / "kinetics400"
    (folder / "videos/jump").mkdir(parents=True)
    shutil.copy(video, folder / "videos/jump/a.mp4")
    (folder / "val.txt").write_text("jump/a.mp4 1\n")
    (folder / "classes.txt").write_text("run\njump\n")
    (record,) = DatasetCatalog.get("kinetics400_val")
    assert (record["file_name"], record["label"]) == (str(folder / "videos/jump/a.mp4"), 1)
    assert MetadataCatalog.get("kinetics400_val").classes == ["run", "jump"]


def test_a_mark_that_windows_puts_in_front_is_no_part_of_a_name(tmp_path: Path, video: Path) -> None:
    for name, text in {
        "list.txt": f"{video} 1\r\n",
        "classes.txt": "jump\r\nrun\r\n",
        "k.csv": CSV,
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (record,) = load_video_list(str(tmp_path / "list.txt"), name="t_marked")
    assert record["file_name"] == str(video) and MetadataCatalog.get("t_marked").classes == ["jump", "run"]
    assert len(read_kinetics_csv(tmp_path / "k.csv")) == 4


def test_thumbnails_beside_videos_are_no_frames(tmp_path: Path) -> None:
    """A folder of pictures is a video, but not where videos lie beside them; animated pictures are videos."""
    for name in ("run/part/a.mp4", "run/part/a.jpg", "run/b/1.jpg", "run/b/2.jpg", "run/c.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert folder_list(tmp_path, ["run"]) == [("run/b", 0), ("run/c.gif", 0), ("run/part/a.mp4", 0)]


def test_labels_of_all_prepared_splits_agree(tmp_path: Path, video: Path) -> None:
    """The held-out part lacks the first class; its labels are those of training all the same."""
    for name in ("train/jump/a.mp4", "train/run/b.mp4", "val/run/c.mp4", "other/swim/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, tmp_path / name)

    def prepare(split: str) -> None:
        where = ["--videos", str(tmp_path / split), "--output", str(tmp_path / "lists"), "--name", split]
        main(["folder", *where, "--workers", "1", "--reader", "pyav"])

    prepare("train")
    prepare("val")
    assert read_list(tmp_path / "lists/val.txt") == [("run/c.mp4", 1)]
    assert (tmp_path / "lists/classes.txt").read_text() == "jump\nrun\n"
    with pytest.raises(SystemExit, match="'swim'"):
        prepare("other")


def test_a_checked_list_keeps_its_class_names(tmp_path: Path, video: Path) -> None:
    for folder, classes in (("mine", "jump\nrun\n"), ("yours", "run\njump\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "list.txt").write_text(f"{video.name} 1\n")
        (tmp_path / folder / "classes.txt").write_text(classes)

    def prepare(folder: str) -> None:
        where = ["--videos", str(video.parent), "--output", str(tmp_path / "out")]
        main(["list", "--list", str(tmp_path / folder / "list.txt"), *where, "--workers", "1"])

    prepare("mine")
    assert (tmp_path / "out/classes.txt").read_text() == "jump\nrun\n"
    with pytest.raises(SystemExit, match="other classes"):
        prepare("yours")


def test_a_list_is_not_written_over_the_one_that_is_checked(tmp_path: Path, video: Path) -> None:
    """Its bad videos would lose their labels."""
    shutil.copy(video, tmp_path / "a.mp4")
    (tmp_path / "bad.mp4").touch()
    text = "# mine\na.mp4 0\nbad.mp4 3\n"
    (tmp_path / "train.txt").write_text(text)
    call = ["list", "--list", str(tmp_path / "train.txt"), "--videos", str(tmp_path), "--workers", "1"]
    with pytest.raises(SystemExit, match="would be written over; choose another --output or --name"):
        main([*call, "--output", str(tmp_path)])
    assert (tmp_path / "train.txt").read_text() == text
    main([*call, "--output", str(tmp_path), "--name", "good"])
    assert (tmp_path / "good.txt").read_text() == "a.mp4 0\n"
    assert (tmp_path / "good_bad.txt").read_text().startswith("bad.mp4\t3\t")


def test_what_took_too_long_is_looked_at_again_with_more_time(tmp_path: Path, video: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{video.name} 0\n")
    call = ["list", "--list", str(tmp_path / "list.txt"), "--videos", str(video.parent), "--workers", "1"]
    call += ["--output", str(tmp_path / "out")]
    known = {"bytes": video.stat().st_size, "changed_ns": video.stat().st_mtime_ns}
    how = {"reader": "auto", "timeout_s": 1.0}
    (tmp_path / "out").mkdir()
    journal = tmp_path / "out/list_checked.jsonl"
    journal.write_text(
        json.dumps({"path": video.name, "error": "took longer than 1 s", **known, **how}) + "\n"
    )
    with pytest.raises(SystemExit, match="none of the videos can be read"):
        main([*call, "--timeout", "1"])
    main([*call, "--timeout", "60"])
    assert (tmp_path / "out/list.txt").read_text() == f"{video.name} 0\n"


def test_folders_may_be_links(tmp_path: Path) -> None:
    for name in ("real/a.mp4", "frames/v1/0.jpg", "here/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "here/videos").symlink_to(tmp_path / "real")
    (tmp_path / "here/pictures").symlink_to(tmp_path / "frames")
    (tmp_path / "here/up").symlink_to(tmp_path)  # would have no end
    found = sorted(path.removeprefix(str(tmp_path)) for path in videos_below(tmp_path / "here"))
    assert found == ["/here/pictures/v1", "/here/videos/a.mp4"]


@pytest.mark.parametrize("train", [True, False])
def test_numbers_of_a_test_list_without_the_highest_class(
    cfg: CfgNode, tmp_path: Path, video: Path, train: bool
) -> None:
    for name, labels in (("t_ten", (0, 9)), ("t_nine", (0, 8))):
        (tmp_path / f"{name}.txt").write_text("".join(f"{video} {label}\n" for label in labels))
    entries = [
        {"name": f"{name}_{train}", "type": "video_list", "list": str(tmp_path / f"{name}.txt")}
        for name in ("t_ten", "t_nine")
    ]
    cfg.DATASETS.REGISTER, cfg.DATALOADER.ASPECT_RATIO_GROUPING = entries, False
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"t_ten_{train}",), (f"t_nine_{train}",)
    cfg.MODEL.VIDEO_HEAD.NUM_CLASSES = -1
    trained = cfg.clone()
    prepare_datasets(cfg, train=train)
    assert cfg.MODEL.VIDEO_HEAD.NUM_CLASSES == 10
    # From config.yaml of a run, on a machine without the training list.
    trained.MODEL.VIDEO_HEAD.NUM_CLASSES, trained.DATASETS.TRAIN = 10, ()
    prepare_datasets(trained, train=False)
    assert trained.MODEL.VIDEO_HEAD.NUM_CLASSES == 10


def test_a_bad_list_in_a_folder_that_cannot_be(tmp_path: Path) -> None:
    """OUTPUT_DIR of a head that was trained on another machine."""
    (tmp_path / "file").touch()
    assert read_bad_clips(tmp_path / "file" / "bad_clips.txt") == {}


def test_preparing_nothing_but_bad_files_fails(tmp_path: Path) -> None:
    (tmp_path / "videos/run").mkdir(parents=True)
    (tmp_path / "videos/run/a.mp4").touch()
    where = ["--videos", str(tmp_path / "videos"), "--output", str(tmp_path / "lists")]
    with pytest.raises(SystemExit, match="none of the videos can be read.*videos_bad.txt says why"):
        main(["folder", *where, "--workers", "1"])
    assert "the file is empty" in (tmp_path / "lists/videos_bad.txt").read_text()


def test_preparing_notes_no_video_as_bad_while_the_file_server_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed on the list of bad ones."""
    (tmp_path / "videos/run").mkdir(parents=True)
    (tmp_path / "videos/run/a.mp4").touch()
    where = ["--videos", str(tmp_path / "videos"), "--output", str(tmp_path / "lists")]

    def away(path: str, mode: str) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(loader, "open", away, raising=False)
    with pytest.raises(SystemExit, match="Input/output error.*a.mp4"):
        main(["folder", *where, "--workers", "1"])
    assert (tmp_path / "lists/videos_checked.jsonl").read_text() == ""
