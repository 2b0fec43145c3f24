"""The whole model: sizes, labels, what is frozen, what the messages say."""

from __future__ import annotations

import pytest
import torch

from d2_frozen import add_frozen_config
from d2_frozen.data.label_values import LABEL_VALUES
from d2_frozen.summary import parts_table
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Instances, PolygonMasks
from seg_app.models import add_mask_former_config

HEADS = ["Mask2FormerHead", "UPerNetHead", "LinearSegHead", "SemSegFPNHead"]


class ThreeConvs(Backbone):
    """Maps of strides 4..32, one strided convolution each."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, 8 << i, 4 << i, stride=4 << i) for i in range(4))

    def forward(self, images):
        return {f"res{i + 2}": conv(images) for i, conv in enumerate(self.convs)}

    def output_shape(self):
        return {f"res{i + 2}": ShapeSpec(channels=8 << i, stride=4 << i) for i in range(4)}


def build_convs_for_segmentor_tests(cfg, input_shape):
    return ThreeConvs()


def config(*pairs):
    if "build_convs_for_segmentor_tests" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(build_convs_for_segmentor_tests)
    cfg = add_mask_former_config(add_frozen_config(get_cfg()))
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "FrozenSegmentor"),
            *("MODEL.BACKBONE.NAME", "build_frozen_backbone", "MODEL.NECK.NAME", "none"),
            *(
                "MODEL.FROZEN.BOTTOM_UP",
                "build_convs_for_segmentor_tests",
                "MODEL.PIXEL_STD",
                [57.0, 57.0, 57.0],
            ),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64),
            *("MODEL.SEM_SEG_HEAD.MASK_DIM", 16, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1),
            *("MODEL.MASK_FORMER.HIDDEN_DIM", 64, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 8),
            *("MODEL.MASK_FORMER.NHEADS", 4, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 32),
            *("MODEL.MASK_FORMER.DEC_LAYERS", 3, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64),
            *pairs,
        ]
    )
    return cfg


def model_of(*pairs):
    torch.manual_seed(0)
    norm = ("MODEL.SEM_SEG_HEAD.NORM", "LN") if "LinearSegHead" in pairs else ()
    return build_model(config(*norm, *pairs))


def sample(h: int, w: int, labels=None, **more):
    torch.manual_seed(h * 1000 + w)
    image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    return {"image": image, **({} if labels is None else {"sem_seg": labels}), **more}


@pytest.mark.parametrize("head", HEADS)
def test_batch_of_different_sizes(head: str) -> None:
    model = model_of("MODEL.SEM_SEG_HEAD.NAME", head)
    batch = [
        sample(50, 70, torch.randint(0, 5, (50, 70))),
        sample(33, 97, torch.full((33, 97), 255), height=20, width=31),
        sample(1, 1, torch.zeros(1, 1, dtype=torch.uint8)),
    ]
    losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    model.eval()
    with torch.no_grad():
        results = model(batch)
    assert [tuple(r["sem_seg"].shape) for r in results] == [(5, 50, 70), (5, 20, 31), (5, 1, 1)]
    assert all(r["sem_seg"].isfinite().all() for r in results)


@pytest.mark.parametrize("head", ["Mask2FormerHead", "UPerNetHead", "LinearSegHead"])
@pytest.mark.parametrize("h, w", [(1, 1), (31, 33), (4000, 1), (2, 4000)])
def test_any_image_size(head: str, h: int, w: int) -> None:
    model = model_of("MODEL.SEM_SEG_HEAD.NAME", head, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2).eval()
    with torch.no_grad():
        (result,) = model([sample(h, w)])
    assert result["sem_seg"].shape == (2, h, w) and result["sem_seg"].isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_nothing_but_ignored_pixels(head: str) -> None:
    model = model_of("MODEL.SEM_SEG_HEAD.NAME", head)
    losses = model([sample(32, 32, torch.full((32, 32), 255, dtype=torch.uint8))])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", ["Mask2FormerHead", "LinearSegHead"])
def test_more_than_255_classes(head: str) -> None:
    pairs = ("MODEL.SEM_SEG_HEAD.NAME", head, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1000)
    with pytest.raises(ValueError, match="IGNORE_VALUE 255"):
        model_of(*pairs)
    model = model_of(*pairs, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 65535)
    labels = torch.full((32, 32), 65535, dtype=torch.int32)
    labels[:16, :16], labels[16:, 16:] = 255, 999
    losses = model([sample(32, 32, labels.to(torch.uint16))])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_equal_whoever_counted_the_labels(head: str) -> None:
    model = model_of("MODEL.SEM_SEG_HEAD.NAME", head)
    batch = [sample(h, w, torch.randint(0, 5, (h, w))) for h, w in ((50, 70), (33, 97))]
    counted = [{**one, LABEL_VALUES: one["sem_seg"].unique().tolist()} for one in batch]
    losses = []
    for given in (batch, counted):
        torch.manual_seed(1)
        losses.append({name: loss.item() for name, loss in model(given).items()})
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"label values \[9\] are no classes"):
        model([{**batch[0], LABEL_VALUES: [0, 9, 255]}])


def test_a_step_changes_the_head_and_not_one_bit_of_the_backbone() -> None:
    model = model_of()
    frozen = {name: t.clone() for name, t in model.backbone.state_dict().items()}
    before = {name: t.clone() for name, t in model.sem_seg_head.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sum(model([sample(64, 64, torch.randint(0, 5, (64, 64)))]).values()).backward()
    optimizer.step()
    assert all(torch.equal(frozen[name], t) for name, t in model.backbone.state_dict().items())
    moved = [name for name, t in model.sem_seg_head.state_dict().items() if not torch.equal(before[name], t)]
    assert len(moved) > 0.9 * len(before)
    table = parts_table(model)
    assert "sem_seg_head.pixel_decoder" in table and "frozen" in table


def test_it_learns_two_halves() -> None:
    """Left is dark, right is bright: after a few steps, every pixel but the border has its class."""
    model = model_of("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2)
    image = torch.zeros(3, 64, 64)
    image[:, :, 32:] = 255
    labels = (image[0] > 0).long()
    batch = [{"image": image, "sem_seg": labels}]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()
    with torch.no_grad():
        guess = model.eval()(batch)[0]["sem_seg"].argmax(0)
    assert (guess == labels).float().mean() > 0.9


def test_losses_of_every_layer_or_only_of_the_last() -> None:
    batch = [sample(32, 32, torch.zeros(32, 32, dtype=torch.long))]
    names = {"loss_ce", "loss_mask", "loss_dice"}
    earlier = {f"{name}_{i}" for name in names for i in (0, 1)}
    assert set(model_of()(batch)) == names | earlier
    assert set(model_of("MODEL.MASK_FORMER.DEEP_SUPERVISION", False)(batch)) == names


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 1),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 3, "MODEL.MASK_FORMER.HIDDEN_DIM", 32),
    ],
)
def test_with_few_layers_all_that_trains_gets_a_gradient(options: tuple) -> None:
    """DistributedDataParallel ends with an error at the second iteration where a parameter gets none."""
    model = build_model(config(*options)).train()
    labels = torch.randint(0, 5, (40, 56))
    sum(model([sample(40, 56, labels)]).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_instances_as_targets_equal_a_label_map() -> None:
    labels = torch.full((40, 48), 255)
    labels[:, :20], labels[10:20, 30:] = 3, 1
    instances = Instances((40, 48))
    instances.gt_classes = torch.tensor([1, 3])
    instances.gt_masks = torch.stack([labels == 1, labels == 3])
    model = model_of()
    results = []
    for more in ({"sem_seg": labels}, {"instances": instances}):
        torch.manual_seed(6)
        results.append(model([{**sample(40, 48), **more}]))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    instances.gt_masks = PolygonMasks([[[0, 0, 9, 0, 9, 9]], [[0, 0, 5, 0, 5, 5]]])
    with pytest.raises(ValueError, match="gt_masks are polygons.*INPUT.MASK_FORMAT to bitmask"):
        model([{**sample(40, 48), "instances": instances}])


def test_instances_come_with_the_scores() -> None:
    model = model_of("MODEL.MASK_FORMER.TEST.INSTANCE_ON", True, "TEST.DETECTIONS_PER_IMAGE", 7).eval()
    with torch.no_grad():
        (result,) = model([sample(40, 50, height=30, width=20)])
    assert result["sem_seg"].shape == (5, 30, 20)
    assert len(result["instances"]) == 7 and result["instances"].pred_masks.shape == (7, 30, 20)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("resize_first", [False, True])
def test_score_maps_are_the_results_row_by_row(head, resize_first, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE"
    model = model_of("MODEL.SEM_SEG_HEAD.NAME", head, key, resize_first).eval()
    batch = [sample(50, 70), sample(33, 97, height=60, width=31)]
    with torch.no_grad():
        whole = [result["sem_seg"] for result in model(batch)]
        monkeypatch.setattr("seg_app.models.score_maps._NUMBERS_AT_ONCE", 1)
        for scores, expected in zip(model.score_maps(batch), whole):
            assert torch.allclose(scores.all(), expected, atol=1e-5)


def test_checkpoint_with_the_names_of_the_first_version(tmp_path) -> None:
    """MaskFormer's: the pixel decoder had no prefix, the queries another name."""
    a, b = model_of(), model_of()
    for p in a.sem_seg_head.parameters():
        torch.nn.init.normal_(p, std=0.1)
    old = {
        name.replace("pixel_decoder.", "").replace("query_feat", "static_query"): tensor
        for name, tensor in a.state_dict().items()
    }
    torch.save({"model": old}, tmp_path / "old.pth")
    DetectionCheckpointer(b).load(str(tmp_path / "old.pth"))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("head", ["Mask2FormerHead", "LinearSegHead"])
@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.full((32, 32), 7), r"a\.png: label values \[7\] are no classes.*NUM_CLASSES 5"),
        (torch.full((32, 32), -1), r"a\.png: label values \[-1\]"),
        (torch.zeros(32, 30, dtype=torch.long), r"a\.png: the label map is of size \(32, 30\)"),
        (torch.zeros(32, 32, 3, dtype=torch.long), r"a\.png: the label map is of size \(32, 32, 3\)"),
        (None, r"a\.png: training needs labels"),
    ],
)
def test_bad_labels_are_named(head: str, labels, message: str) -> None:
    model = model_of("MODEL.SEM_SEG_HEAD.NAME", head)
    with pytest.raises(ValueError, match=message):
        model([sample(32, 32, labels, file_name="a.png")])


@pytest.mark.parametrize(
    "pair, message",
    [
        (("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"), "PIXEL_DECODER_NAME.*MSDeformAttn"),
        (("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True), "PANOPTIC_ON.*needs? Mask2Former"),
        (("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2"]), "asks for p2; the backbone gives res2, res3"),
        (
            ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res6"]),
            r"ENCODER_IN_FEATURES is \['res6'\]",
        ),
        (("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res3", "res4", "res5"]), "for every stride from 4 to 8"),
        (("MODEL.MASK_FORMER.NHEADS", 3), "no multiple of its 3 heads"),
        (("MODEL.BACKBONE.NAME", "build_convs_for_segmentor_tests"), "no part of the backbone is frozen"),
        (("MODEL.MASK_FORMER.DEC_LAYERS", 0), "DEC_LAYERS is 0"),
        (("MODEL.SEM_SEG_HEAD.NAME", "LinearSegHead", "MODEL.SEM_SEG_HEAD.NORM", "GN"), "res2 has 8.*LN"),
    ],
)
def test_configs_that_cannot_work_are_named(pair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(*pair)


def test_defaults_are_those_for_ade20k() -> None:
    cfg = add_mask_former_config(get_cfg())
    m, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    assert (m.NUM_OBJECT_QUERIES, m.TRAIN_NUM_POINTS, m.DEC_LAYERS, head.TRANSFORMER_ENC_LAYERS) == (
        100,
        12544,
        10,
        6,
    )
    assert (m.CLASS_WEIGHT, m.MASK_WEIGHT, m.DICE_WEIGHT, m.NO_OBJECT_WEIGHT) == (2.0, 5.0, 5.0, 0.1)
    assert (head.NUM_CLASSES, head.IGNORE_VALUE, head.COMMON_STRIDE, head.CONVS_DIM) == (150, 255, 4, 256)
