"""The generated labelled world: textured shapes with boxes, masks and classes, for quickstart and tests.

    python -m d2_frozen.data.shapes --output DIR --train 600 --val 100 --seed 0

Out, under DIR: {train,val}.json (COCO instances), {train,val}/*.jpg, labels/{train,val}/*.png (semantic label
maps: 0 is background, else 1 + class id), labels/classes.txt, manifest.json.
A picture depends on (seed, split, index, size) only. What is drawn stands in ``shapes_render.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from d2_frozen.claims import CLAIM_FILE, claimed, holds_files
from d2_frozen.data.mask_outline import mask_to_polygons
from d2_frozen.data.shapes_render import CLASSES, Scene, render
from d2_frozen.files import write_bytes

# Part of the manifest: a change of what is drawn or written makes older folders count as different.
GENERATOR = "d2_frozen.data.shapes 5"
MANIFEST = "manifest.json"
_JPEG_QUALITY = 92


def generate(output: str | Path, train: int = 600, val: int = 100, seed: int = 0, size: int = 256) -> bool:
    """Write the world to ``output``, unless the same one is already complete there.

    Files are replaced one by one, each atomically; the manifest says "complete" last. An interrupted call is
    repeated by the next one, and a folder made with other parameters is rewritten.

    Args:
        output: folder, made if missing.
        train, val: numbers of pictures.
        seed: any integer.
        size: long side of a picture in pixels, at least 64.
    Returns:
        True if it wrote, False if nothing was to do.
    Raises:
        ValueError: counts or size out of range.
        FileExistsError: ``output`` holds something else.
    """
    if min(train, val) < 0 or train + val == 0 or size < 64:
        raise ValueError(
            f"train={train}, val={val}, size={size}: counts are >= 0 with one above, size is >= 64 px."
        )
    root = Path(output)
    parameters = {"generator": GENERATOR, "train": train, "val": val, "seed": seed, "size": size}
    if is_complete(root, parameters):
        return False
    root.mkdir(parents=True, exist_ok=True)
    _require_ours(root)
    with claimed(root / CLAIM_FILE, wait=True):
        if is_complete(root, parameters):  # by another process meanwhile
            return False
        _require_ours(root)
        _write_manifest(root, parameters, complete=False, sizes={})
        sizes = _write_bytes(
            root, root / "labels" / "classes.txt", "\n".join(("background", *CLASSES)).encode() + b"\n"
        )
        for split, count in (("train", train), ("val", val)):
            sizes |= _write_split(root, split, count, seed, size)
        _remove_leftovers(root, keep=set(sizes))
        _write_manifest(root, parameters, complete=True, sizes=sizes)
    return True


def is_complete(root: str | Path, parameters: dict[str, object]) -> bool:
    """Does ``root`` hold every file of a finished set with these parameters?"""
    manifest = _read_manifest(Path(root))
    if not manifest or not manifest.get("complete") or manifest.get("parameters") != parameters:
        return False
    files = ((Path(root) / name, size) for name, size in manifest["bytes"].items())
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """COCO annotations of one picture; pycocotools rasterises its polygons to the visible pixels."""
    annotations = []
    for instance, class_id in enumerate(scene.classes):
        mask = scene.instances == instance + 1
        ys, xs = np.nonzero(mask)
        x0, y0 = int(xs.min()), int(ys.min())
        annotations.append(
            {
                "id": first_id + instance,
                "image_id": image_id,
                "category_id": class_id + 1,
                "iscrowd": 0,
                "bbox": [x0, y0, int(xs.max()) + 1 - x0, int(ys.max()) + 1 - y0],
                "area": int(mask.sum()),
                "segmentation": mask_to_polygons(mask),
            }
        )
    return annotations


def _write_split(root: Path, split: str, count: int, seed: int, size: int) -> dict[str, int]:
    images: list[dict] = []
    annotations: list[dict] = []
    sizes: dict[str, int] = {}
    to_label = np.array([0, *range(1, len(CLASSES) + 1)], dtype=np.uint8)
    for index in range(count):
        scene = render(seed, split, index, size)
        height, width = scene.instances.shape
        name = f"{index:06d}"
        jpeg = _encode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        class_of = np.array([0, *(class_id + 1 for class_id in scene.classes)])
        labels = to_label[class_of[scene.instances]]
        sizes |= _write_bytes(root, root / split / f"{name}.jpg", jpeg)
        sizes |= _write_bytes(root, root / "labels" / split / f"{name}.png", _encode(".png", labels))
        images.append({"id": index + 1, "file_name": f"{name}.jpg", "width": width, "height": height})
        annotations += coco_annotations(scene, index + 1, len(annotations) + 1)
    document = {
        "info": {"description": f"{GENERATOR}, seed {seed}, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)
        ],
    }
    return sizes | _write_bytes(
        root, root / f"{split}.json", json.dumps(document, separators=(",", ":")).encode()
    )


def _encode(extension: str, pixels: np.ndarray, options: list[int] | None = None) -> bytes:
    done, data = cv2.imencode(extension, np.ascontiguousarray(pixels), options or [])
    assert done
    return data.tobytes()


def _write_bytes(root: Path, path: Path, data: bytes) -> dict[str, int]:
    """Write atomically; returns {path relative to root: bytes} for the manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data, durable=False)
    return {path.relative_to(root).as_posix(): len(data)}


def _require_ours(root: Path) -> None:
    """Refuse a folder that holds other people's files."""
    if _read_manifest(root) is None and holds_files(root):
        raise FileExistsError(
            f"{root} is not empty and was not written by {GENERATOR}; give a new or empty folder."
        )


def _read_manifest(root: Path) -> dict | None:
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    ours = str(manifest.get("parameters", {}).get("generator", "")).startswith("d2_frozen.data.shapes")
    return manifest if ours else None


def _write_manifest(root: Path, parameters: dict[str, object], complete: bool, sizes: dict[str, int]) -> None:
    manifest = {"parameters": parameters, "complete": complete, "bytes": sizes}
    _write_bytes(root, root / MANIFEST, json.dumps(manifest, indent=1).encode())


def _remove_leftovers(root: Path, keep: set[str]) -> None:
    """Delete pictures of an earlier, larger set and partial files of a killed run."""
    for folder, suffix in (("train", "jpg"), ("val", "jpg"), ("labels/train", "png"), ("labels/val", "png")):
        for path in [*(root / folder).glob(f"[0-9]*.{suffix}"), *(root / folder).glob(".*.partial")]:
            if path.relative_to(root).as_posix() not in keep:
                path.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.data.shapes",
        description="Generate a small labelled world: COCO json, pictures, semantic label maps.",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=600, help="training pictures (default: 600)")
    parser.add_argument("--val", type=int, default=100, help="held-out pictures (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=256, help="long side in pixels (default: 256)")
    args = parser.parse_args(arguments)
    try:
        wrote = generate(args.output, args.train, args.val, args.seed, args.size)
    except (ValueError, FileExistsError) as err:
        parser.error(str(err))
    state = "written to" if wrote else "already complete in"
    print(f"{args.train} training and {args.val} held-out pictures {state} {args.output}")


if __name__ == "__main__":
    main()
