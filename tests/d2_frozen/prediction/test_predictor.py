"""One pass feeds every head, and changes no result."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import DETECTION, write_config

from d2_frozen import tasks
from d2_frozen.backbone import frozen_parts
from d2_frozen.backbone.timm_backbone import create_timm_backbone
from d2_frozen.backbone.weights import save_weights
from d2_frozen.data import build_test_loader
from d2_frozen.engine import CheckpointMismatchError, FrozenCheckpointer
from d2_frozen.prediction import Predictor, load_heads
from d2_frozen.prediction.inputs import read_picture
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

SaveHead = Callable[..., Path]


def calls_of(predictor: Predictor, name: str) -> list[tuple[int, ...]]:
    """Shapes of the image tensors that reach the network of a head, from now on."""
    (part,) = frozen_parts(next(h.model for h in predictor.heads if h.name == name)).values()
    seen: list[tuple[int, ...]] = []
    compute = part._compute

    def watched(images: torch.Tensor, *dtype: torch.dtype) -> dict[str, torch.Tensor]:
        seen.append(tuple(images.shape))
        return compute(images, *dtype)

    part._compute = watched
    return seen


def picture(h: int = 48, w: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (h, w, 3), dtype=np.uint8)


def same(a: dict, b: dict) -> bool:
    if "sem_seg" in a:
        return torch.equal(a["sem_seg"], b["sem_seg"])
    first, second = a["instances"], b["instances"]
    return torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor) and torch.equal(
        first.scores, second.scores
    )


def test_two_heads_hold_one_backbone_and_a_picture_passes_it_once(save_head: SaveHead) -> None:
    predictor = Predictor([save_head("det"), save_head("seg")])
    det, seg = (next(iter(frozen_parts(head.model).values())) for head in predictor.heads)
    assert det is seg
    seen = calls_of(predictor, "det")
    (found,) = predictor([picture()])
    assert seen == [(1, 3, 64, 64)]  # 48 x 64, padded to multiples of 32
    assert (predictor.memory.passes, predictor.memory.reused) == (1, 1)
    assert found["det"]["instances"].image_size == (48, 64)
    assert found["seg"]["sem_seg"].shape == (3, 48, 64)


def test_results_are_those_of_each_head_alone(save_head: SaveHead) -> None:
    files = [save_head("det"), save_head("seg")]
    images = [picture(), picture(64, 48), picture()]
    together = Predictor(files)(images)
    for file in files:
        alone = Predictor([file])(images)
        for i in range(3):
            assert same(alone[i][file.stem], together[i][file.stem])


def test_pictures_of_one_size_go_together_others_apart(save_head: SaveHead) -> None:
    predictor = Predictor([save_head("det"), save_head("seg")])
    seen = calls_of(predictor, "seg")
    predictor([picture(), picture(32, 64), picture()])
    assert seen == [(2, 3, 64, 64), (1, 3, 32, 64)]


def test_heads_of_other_test_sizes_have_a_pass_each_until_a_size_is_given(save_head: SaveHead) -> None:
    files = [save_head("det"), save_head("seg", short_edge=32)]
    predictor = Predictor(files)
    assert [[head.name for head in group] for group in predictor.plan(48, 64)] == [["det"], ["seg"]]
    assert "--size" in predictor.describe(48, 64)
    predictor([picture()])
    assert (predictor.memory.passes, predictor.memory.reused) == (2, 0)
    forced = Predictor(files, size=64)
    assert [[head.name for head in group] for group in forced.plan(48, 64)] == [["det", "seg"]]
    forced([picture()])
    assert (forced.memory.passes, forced.memory.reused) == (1, 1)


def test_a_given_size_replaces_the_padding_to_a_square(save_head: SaveHead) -> None:
    files, options = [save_head("det"), save_head("seg")], ["INPUT.SCALE_CROP.TEST_RESIZE", "square"]
    predictor = Predictor(files, options=options)  # the segmentation head has the key, and no use for it
    assert len(predictor.plan(32, 64)) == 2
    assert len(Predictor(files, options=options, size=64).plan(32, 64)) == 1


def test_heads_of_other_weights_have_backbones_of_their_own(save_head: SaveHead) -> None:
    # Random weights follow SEED: another seed is a backbone of the same name with other weights.
    predictor = Predictor([save_head("det", seed=1), save_head("seg", seed=2)])
    assert len(predictor.plan(48, 64)) == 2
    predictor([picture()])
    assert (predictor.memory.passes, predictor.memory.reused) == (2, 0)


def test_a_head_on_a_backbone_it_was_not_trained_on_is_refused(save_head: SaveHead) -> None:
    with pytest.raises(CheckpointMismatchError):
        load_heads([save_head("det", seed=1)], options=["SEED", "2"])


@pytest.mark.parametrize("key", ["SAVE_FULL_MODEL", "FREEZE"])
def test_a_file_with_its_backbone_inside_needs_no_other(tmp_path: Path, key: str) -> None:
    weights = tmp_path / "backbone.safetensors"
    save_weights(create_timm_backbone("swinv2_pico_window8_256").network.state_dict(), weights)
    own = {"FROZEN": {key: True}} if key == "SAVE_FULL_MODEL" else {"BACKBONE": {key: "none"}}
    changes = {"MODEL": {"TIMM": {"PRETRAINED": str(weights)}, **own}}
    cfg = tasks.read_config(write_config(tmp_path / "whole.yaml", DETECTION, changes, {"SEED": 2}))
    names = tasks.Classes(["nut"], [1])
    tasks.task_of(cfg).prediction(cfg, names)
    model = build_model(cfg)
    facts = {"config": cfg.dump(), "classes": names.names, "class_ids": names.ids}
    full = cfg.MODEL.FROZEN.SAVE_FULL_MODEL
    FrozenCheckpointer(model, str(tmp_path), extra=facts, save_full_model=full).save("whole")
    weights.unlink()
    loaded = Predictor([tmp_path / "whole.pth"]).heads[0].model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_detection_head_finds_what_evaluation_finds(save_head: SaveHead, pictures: Path) -> None:
    predictor = Predictor([save_head("det")])
    file = str(pictures / "b.png")
    MetadataCatalog.get("one_picture").set(thing_classes=["nut", "bolt"])
    record = {"file_name": file, "height": 64, "width": 48, "image_id": 1, "annotations": []}
    DatasetCatalog.register("one_picture", lambda: [record])
    try:
        cfg = predictor.heads[0].cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        (batch,) = build_test_loader(cfg, "one_picture")
        with torch.no_grad():
            (expected,) = predictor.heads[0].model(batch)
    finally:
        DatasetCatalog.remove("one_picture")
        MetadataCatalog.remove("one_picture")
    (found,) = predictor([read_picture(Path(file))])
    assert len(expected["instances"]) > 0 and same(found["det"], expected)


def test_a_bgr_head_gets_its_channels_turned(save_head: SaveHead) -> None:
    file = save_head("det")
    image = picture()
    rgb = Predictor([file])([image])[0]["det"]
    options = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"]
    # With the backbone's own input turned back, the result is the same.
    turned = Predictor([file], options=[*options, "MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]"])
    (part,) = frozen_parts(turned.heads[0].model).values()
    compute = part._compute
    part._compute = lambda images, *dtype: compute(images.flip(1), *dtype)
    assert same(turned([image])[0]["det"], rgb)


def test_class_names_come_with_the_file(save_head: SaveHead) -> None:
    (head,) = load_heads([save_head("det")])
    assert head.classes == tasks.Classes(["nut", "bolt"], [3, 7])
    assert head.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


def test_files_without_names_need_a_config_with_the_count(save_head: SaveHead, tmp_path: Path) -> None:
    file = save_head("det", facts=False)
    with pytest.raises(FileNotFoundError, match="config.yaml"):
        load_heads([file])
    with pytest.raises(ValueError, match="NUM_CLASSES is -1"):
        load_heads([file], [tmp_path / "det.yaml"])
    (head,) = load_heads([file], [tmp_path / "det.yaml"], options=["MODEL.ROI_HEADS.NUM_CLASSES", "2"])
    assert head.classes is None and head.prediction.classes == tasks.Classes(["1", "2"], [1, 2])
    (tmp_path / "config.yaml").write_text(head.cfg.dump())
    assert load_heads([file])[0].name == "det"


def test_classes_of_known_data_are_known_without_it(save_head: SaveHead, tmp_path: Path) -> None:
    """As of the model zoo's files: they name no classes, but their config names COCO."""
    file = save_head("det", facts=False)
    trained_on = ["DATASETS.TRAIN", "('coco_2017_train',)"]
    with pytest.raises(CheckpointMismatchError, match="cls_score"):  # of 2 classes, not 80
        load_heads(
            [file], [tmp_path / "det.yaml"], options=[*trained_on, "MODEL.ROI_HEADS.NUM_CLASSES", "80"]
        )
    cfg = tasks.read_config(tmp_path / "det.yaml", [*trained_on, "MODEL.ROI_HEADS.NUM_CLASSES", "80"])
    classes = tasks.task_of(cfg).classes(cfg)
    assert classes is not None and (classes.names[0], classes.ids[0]) == ("person", 1)
    assert (classes.names[79], classes.ids[79]) == ("toothbrush", 90)


def test_a_config_inside_a_file_may_not_run_code_or_read_files(save_head: SaveHead) -> None:
    file = save_head("det")
    content = torch.load(file, weights_only=True)
    for config in ("a: !!python/object/apply:os.getcwd []", "_BASE_: /etc/hostname"):
        torch.save({**content, "config": config}, file)
        with pytest.raises(ValueError, match="config"):
            load_heads([file])


def test_names_of_heads_are_distinct(save_head: SaveHead, tmp_path: Path) -> None:
    file = save_head("det")
    final = file.rename(tmp_path / "model_final.pth")
    heads = load_heads([final, f"parts={final}", final])
    assert [head.name for head in heads] == [tmp_path.name, "parts", f"{tmp_path.name}_2"]
    with pytest.raises(ValueError, match="2 heads, but 1 config"):
        load_heads([final, final], ["a.yaml"])


def test_a_head_of_a_class_that_is_not_imported_is_named(save_head: SaveHead) -> None:
    with pytest.raises(ValueError, match=r"^det: .*MyHeads"):
        load_heads([save_head("det")], options=["MODEL.ROI_HEADS.NAME", "MyHeads"])


def test_a_config_inside_a_file_with_keys_of_somebody_elses_project(save_head: SaveHead) -> None:
    file = save_head("det")
    content = torch.load(file, weights_only=True)
    content["config"] = content["config"].replace("MODEL:", "MODEL:\n  MY_HEAD: {WIDTH: 8}", 1)
    torch.save(content, file)
    with pytest.raises(
        ValueError, match=rf"{file} has a key that is not known here: (?!/).*MY_HEAD.*imported"
    ):
        load_heads([file])


def test_large_pictures_get_smaller_scores_and_labels_of_full_size(save_head: SaveHead) -> None:
    (head,) = load_heads([save_head("seg")])
    assert head.prediction.output_size(4000, 6000) == (4000, 6000)  # 3 classes: 72 M scores
    h, w = head.prediction.output_size(16000, 20000)
    assert 3 * h * w <= 1 << 28 and abs(h / w - 0.8) < 0.01


def test_compact_labels_are_those_of_the_scores_and_never_made_smaller(
    save_head: SaveHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scores have room for a quarter of the pixels, labels are still those of every pixel."""
    predictor = Predictor([save_head("det"), save_head("seg")])
    (whole,) = predictor([picture()])
    monkeypatch.setattr("seg_app.prediction._MAX_SCORES", 3 * 48 * 64 // 4)
    assert predictor([picture()])[0]["seg"]["sem_seg"].shape == (3, 24, 32)
    (compact,) = predictor.compact([picture()])
    assert np.array_equal(compact["seg"]["labels"], whole["seg"]["sem_seg"].argmax(0).numpy())
    assert same(compact["det"], whole["det"])


def test_drawing_keeps_the_size(save_head: SaveHead) -> None:
    predictor = Predictor([save_head("det"), save_head("seg")])
    image = picture()
    drawn = predictor.draw(image, predictor([image])[0], min_score=0.0)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8 and not np.array_equal(drawn, image)


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "lying.jpg", exif=exif)
    assert read_picture(tmp_path / "lying.jpg").shape == (20, 10, 3)


def test_who_builds_a_predictor_keeps_the_draws_of_its_own_program(save_head: SaveHead) -> None:
    file = save_head("det")

    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.random_sample(), torch.rand(1).item()

    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    expected = draws()
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    Predictor([file])
    assert draws() == expected


def test_threads_take_turns_and_get_their_own_results(save_head: SaveHead) -> None:
    predictor = Predictor([save_head("det"), save_head("seg")])
    images = [picture(32, 32 + 8 * k) for k in range(4)]
    alone = [predictor([image])[0] for image in images]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda k: predictor([images[k % 4]])[0], range(16)))
    assert all(same(found[name], alone[k % 4][name]) for k, found in enumerate(together) for name in found)


def test_a_pickled_or_copied_predictor_predicts_the_same(save_head: SaveHead) -> None:
    predictor = Predictor([save_head("det"), save_head("seg")])
    (truth,) = predictor([picture()])
    for other in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        (found,) = other([picture()])
        assert all(same(found[name], truth[name]) for name in truth)
        assert len({id(part) for head in other.heads for part in frozen_parts(head.model).values()}) == 1
        assert not {id(head.model) for head in other.heads} & {id(head.model) for head in predictor.heads}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (picture(), r"a list of pictures, predictor\(\[picture\]\)"),
        ("photo.jpg", r"a list of pictures"),
        ([picture(), None], "number 1 is a NoneType"),
        ([Image.new("RGB", (8, 8))], r"number 0 is a Image.*image\.convert"),
        (["photo.jpg"], r"number 0 is a str.*read_image\(path"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], r"number 0 is a Tensor.*permute"),
        ([picture()[:, :, 0]], r"number 0 is uint8 of shape \(48, 64\)"),
        ([picture(), picture() / 255], "number 1 is float64"),
    ],
)
def test_what_is_no_picture_is_named(save_head: SaveHead, wrong: object, message: str) -> None:
    predictor = Predictor([save_head("det")])
    with pytest.raises((TypeError, ValueError), match=message):
        predictor(wrong)  # type: ignore[arg-type]
    assert predictor.memory.passes == 0
