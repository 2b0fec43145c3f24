"""Files that were downloaded -> lists that can be trained on: every file is opened and three of its frames decoded.

    python -m video_app.prepare kinetics --csv train.csv --videos DIR --output DIR     # the official csv, one per split
    python -m video_app.prepare folder --videos DIR --output DIR                       # DIR/CLASS/video.mp4
    python -m video_app.prepare list --list train.txt --videos DIR --output DIR        # check a list that exists

Out, under --output, for the split NAME (the name of the csv, the list, or --name): NAME.txt ("path label", paths
relative to --videos), classes.txt, NAME_bad.txt (path, tab, label, tab, why), NAME_missing.txt (of the csv),
NAME_checked.jsonl (what was checked, with its size and time of change: an interrupted call goes on from there; another
--reader or --timeout looks at bad files again).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from d2_frozen.cpus import usable_cpus
from d2_frozen.data.register import read_class_list
from video_app.clips.decoder import BadClip, ClipDecoder, VideoReading
from video_app.clips.sampling import SamplingPlan
from video_app.data.lists import (
    folder_classes,
    folder_list,
    read_kinetics_csv,
    read_list,
    videos_below,
    write_lines,
    write_list,
)
from video_app.data.register import classes_beside

# Beginning, middle and end: a cut file fails at the end.
_LOOK = SamplingPlan("uniform", frames=3)


def prepare(
    pairs: Sequence[tuple[str, int]],
    root: str,
    output: str | Path,
    name: str,
    reading: VideoReading,
    workers: int = 4,
) -> dict[str, str]:
    """Check the videos and write ``output/NAME.txt`` with the good ones, in the order given.

    Args:
        pairs: (path relative to ``root``, label).
        workers: decoding processes.
    Returns:
        {path: why} of the bad ones, which stand in ``NAME_bad.txt`` too.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    journal = output / f"{name}_checked.jsonl"
    how = {"reader": reading.reader, "timeout_s": reading.timeout_s}
    checked = _read_journal(journal, root, how)
    todo = [path for path, _ in pairs if path not in checked]
    with open(journal, "a", encoding="utf-8") as file:
        results = _check(todo, root, reading, max(1, workers))
        # A line every half minute where it goes into a file.
        pause = 0.5 if sys.stderr.isatty() else 30.0
        progress = {"unit": "video", "file": sys.stderr, "mininterval": pause, "maxinterval": pause}
        for result in tqdm(results, total=len(todo), disable=not todo, **progress):
            checked[result["path"]] = result = {**result, **how}
            file.write(json.dumps(result) + "\n")
            file.flush()
    bad = {path: checked[path]["error"] for path, _ in pairs if checked[path]["error"]}
    write_list(output / f"{name}.txt", [(path, label) for path, label in pairs if path not in bad])
    label_of = dict(pairs)
    lines = [f"{path}\t{label_of[path]}\t{why}" for path, why in bad.items()]
    write_lines(output / f"{name}_bad.txt", lines)
    return bad


def _check(paths: Sequence[str], root: str, reading: VideoReading, workers: int) -> Iterator[dict[str, Any]]:
    """In the order in which they are done. Threads suffice: the work is in the decoding processes."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    for path in paths:
        todo.put(path)

    def work() -> None:
        decoder = ClipDecoder(reading)
        try:
            while not stop.is_set():
                done.put(_look(decoder, root, todo.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as err:  # for the thread that waits
            done.put(err)
        finally:
            decoder.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(paths)))]
    for thread in threads:
        thread.start()
    try:
        for _ in paths:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _look(decoder: ClipDecoder, root: str, path: str) -> dict[str, Any]:
    place = os.path.join(root, path)
    result: dict[str, Any] = {"path": path, "error": "", **_identity(place)}
    try:
        clip = decoder.read(place, _LOOK)
    except BadClip as err:
        from d2_frozen.data.loader import require_reachable  # with torch, which is not needed otherwise

        require_reachable(place)
        return {**result, "error": " ".join(str(err).split())}
    about = {"frames": clip.held, "fps": round(clip.fps, 3), "size": list(clip.frames.shape[2:4])}
    return {**result, **about, **({"note": clip.fault} if clip.fault else {})}


def _identity(place: str) -> dict[str, int]:
    """What changes when a file is downloaded again."""
    try:
        status = os.stat(place)
    except OSError:
        return {"bytes": -1, "changed_ns": -1}
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def _read_journal(journal: Path, root: str, how: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was checked and is the same file still, bad ones only if they were read in this way.

    A line that a killed run left half is dropped.
    """
    checked: dict[str, dict[str, Any]] = {}
    if not journal.is_file():
        return checked
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        checked[result["path"]] = result
    if not journal.read_text(encoding="utf-8").endswith("\n"):
        write_lines(journal, [json.dumps(result) for result in checked.values()])
    return {
        path: result
        for path, result in checked.items()
        if _identity(os.path.join(root, path)) == {key: result[key] for key in ("bytes", "changed_ns")}
        and (not result["error"] or how.items() <= result.items())
    }


def kinetics_pairs(
    csv_file: str, videos: str, classes_file: Path
) -> tuple[list[tuple[str, int]], list[str], list[str]]:
    """Lines of the csv whose file is there.

    Args:
        classes_file: if it exists, its classes count, so that all splits agree.
    Returns:
        (path, label) pairs; the class names; the names of clips without a file.
    Raises:
        ValueError: a class of the csv that the class file lacks.
    """
    clips = read_kinetics_csv(csv_file)
    classes = common_classes(sorted({clip.class_name for clip in clips}), csv_file, classes_file)
    label_of = {name: label for label, name in enumerate(classes)}
    # Downloaders differ in folders (per split, per class) but not in stems.
    place_of: dict[str, list[str]] = {}
    for video in videos_below(videos):
        path = os.path.relpath(video, videos)
        place_of.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    pairs, missing = [], []
    for clip in clips:
        stem = next((stem for stem in clip.stems if stem in place_of), None)
        if stem is None:
            missing.append(clip.stems[0])
        else:
            pairs.append((_of_class(place_of[stem], clip.class_name), label_of[clip.class_name]))
    return pairs, classes, missing


def common_classes(named: list[str], place: str, classes_file: Path) -> list[str]:
    """The classes of all splits, in the order of labels: those of the class file if it exists, else those of this one.

    Args:
        named: classes that a split has.
        place: where it has them, for the message.
    Raises:
        ValueError: a class that the class file lacks.
    """
    if not classes_file.is_file():
        return named
    classes = read_class_list(str(classes_file.absolute()), str(classes_file)) or []
    unknown = sorted(set(named) - set(classes))
    if unknown:
        raise ValueError(
            f"{place} has the class {unknown[0]!r}, which {classes_file} lacks; prepare the training split first, "
            "or delete that file."
        )
    return classes


def _of_class(paths: list[str], class_name: str) -> str:
    """The one in a folder of this class, if several splits or classes share a stem."""
    spelled = (class_name, class_name.replace(" ", "_"))
    return min(paths, key=lambda path: (os.path.basename(os.path.dirname(path)) not in spelled, path))


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    output = Path(args.output)
    classes_file = output / "classes.txt"
    classes: list[str] | None = None
    missing: list[str] | None = None
    try:
        if args.kind == "kinetics":
            pairs, classes, missing = kinetics_pairs(args.csv, args.videos, classes_file)
        elif args.kind == "folder":
            # A class that no video of this split shows would move the labels of those behind it.
            classes = common_classes(folder_classes(args.videos), args.videos, classes_file)
            pairs = folder_list(args.videos, classes)
        else:
            pairs = read_list(args.list)
            classes = classes_beside(args.list)
            if classes is not None and common_classes(classes, args.list, classes_file) != classes:
                raise ValueError(
                    f"{classes_file} has other classes than {args.list}; choose another --output."
                )
        reading = VideoReading(args.reader, short_side_px=64, timeout_s=args.timeout)
        given = getattr(args, "csv", None) or getattr(args, "list", None)
        name = args.name or Path(given or "videos").stem
        if given and (output / f"{name}.txt").resolve() == Path(given).resolve():
            raise ValueError(f"{given} would be written over; choose another --output or --name.")
        if not pairs:
            raise ValueError(f"no video of the list is under {args.videos}")
        bad = prepare(pairs, args.videos, output, name, reading, args.workers)
    except (ValueError, OSError, RuntimeError) as err:
        sys.exit(f"prepare: {err}")
    if classes is not None:
        write_lines(classes_file, classes)
    if missing is not None:
        write_lines(output / f"{name}_missing.txt", missing)
    absent = "" if missing is None else f", {len(missing)} of the csv missing"
    print(f"{len(pairs) - len(bad)} videos in {output / name}.txt; {len(bad)} bad{absent}.")
    if all(path in bad for path, _ in pairs):
        sys.exit(f"prepare: none of the videos can be read; {output / name}_bad.txt says why.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m video_app.prepare", description="Check videos, write lists."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in (
        ("kinetics", "a csv of the official release"),
        ("folder", "one folder per class"),
        ("list", "a 'path label' list"),
    ):
        command = kinds.add_parser(kind, help=text)
        if kind != "folder":
            command.add_argument("--csv" if kind == "kinetics" else "--list", required=True, help="the file")
        command.add_argument("--videos", required=True, help="folder of the videos, searched at any depth")
        command.add_argument("--output", required=True, help="folder for the lists")
        command.add_argument(
            "--name", default="", help="name of the split (default: of the csv or list; else videos)"
        )
        command.add_argument("--workers", type=int, default=usable_cpus(), help="decoding processes")
        command.add_argument("--reader", default="auto", help="as VIDEO.READER")
        command.add_argument(
            "--timeout", type=float, default=30.0, help="seconds for one file and one reader"
        )
    return parser


if __name__ == "__main__":
    main()
