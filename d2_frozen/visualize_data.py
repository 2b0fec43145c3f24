"""What does a config train on? Its labels, and samples as the model gets them, as pictures, before any training.

    python -m d2_frozen.visualize_data --config-file my_parts.yaml [KEY VALUE ...]

Checks the data as a training would, and writes to OUTPUT_DIR/data, or --output-dir,

    labelled_NAME.jpg   images spread over each dataset, with what is labelled on them
    training.jpg        samples after augmentation; with a SEED in the config those that its training begins with
    facts.txt           what is printed: classes, sizes, and for detection how the anchors fit
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from d2_frozen import tasks
from d2_frozen.data.written import file_name_of
from d2_frozen.detection.pictures import write_sheet
from d2_frozen.files import write_text
from d2_frozen.train_net import read_config
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger


def visualize(cfg: CfgNode, folder: Path, pictures: int, samples: int) -> str:
    """Write the sheets and the facts of a config into a folder.

    Args:
        cfg: what ``read_config`` gives; it stays as it is.
        pictures: on each sheet, at most.
        samples: training samples for the facts, at least as many as pictures.
    Returns:
        The facts, with the paths of the sheets.
    Raises:
        ValueError, OSError: as a training would find the data.
    """
    cfg = cfg.clone()
    cfg.defrost()
    task = tasks.task_of(cfg)
    # A loader without processes of its own: what is drawn is the same.
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = max(cfg.SEED, 0)
    task.prepare_datasets(cfg, train=True)
    view = task.data_view(cfg)
    told = []
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        told.append(view.dataset_facts(name))
        sheet = write_sheet(folder / f"labelled_{file_name_of(name)}.jpg", view.labelled(name, pictures))
        told.append(f"pictures: {sheet}" if sheet else "no pictures")
    if cfg.DATASETS.TRAIN:
        start = time.perf_counter()
        drawn = _first_samples(cfg, max(pictures, samples))
        seconds = (time.perf_counter() - start) / len(drawn)
        told.append(view.sample_facts(drawn))
        told.append(f"reading them took {seconds:.3f} s each, in one process")
        sheet = write_sheet(
            folder / "training.jpg", [one for sample in drawn[:pictures] for one in view.sample(sample)]
        )
        told.append(f"pictures: {sheet}")
    text = "\n\n".join(told)
    write_text(folder / "facts.txt", text + "\n")
    return text


def _first_samples(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """Those that a training begins with, in whole batches: ``count`` or a few more."""
    samples: list[dict[str, Any]] = []
    for batch in tasks.task_of(cfg).trainer().build_train_loader(cfg):
        samples += batch
        if len(samples) >= count:
            break
    return samples


def main(arguments: list[str] | None = None) -> None:
    """Raises: SystemExit: with a message, where config or data are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.visualize_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--output-dir", default="", metavar="DIR", help="instead of OUTPUT_DIR/data")
    parser.add_argument("--pictures", type=int, default=12, help="on each sheet (default: 12)")
    parser.add_argument("--samples", type=int, default=48, help="for the facts (default: 48)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    args = parser.parse_args(arguments)
    if args.pictures < 1 or args.samples < 1:
        parser.error("--pictures and --samples are 1 or more")
    setup_logger(name="d2_frozen")
    try:
        cfg = read_config(args.config_file, args.opts)
        folder = Path(args.output_dir or Path(cfg.OUTPUT_DIR, "data")).expanduser()
        print(visualize(cfg, folder, args.pictures, args.samples))
    except KeyError as err:  # an unknown dataset or key; str() of it would be in quotes
        sys.exit(f"error: {err.args[0]}")
    except (ValueError, OSError, AssertionError) as err:
        sys.exit(f"error: {err}")


if __name__ == "__main__":
    main()
