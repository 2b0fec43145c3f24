"""What the model makes of views, of bad records, of its labels, and of a backbone that must stay as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2_frozen import tasks
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from video_app.models import FrozenVideoClassifier
from video_app.models.classifier import mean_over_views


class FrameMeans(Backbone):
    """The three channel means of a frame, as a map of one cell; counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.sizes.append(tuple(images.shape))
        return {"res5": images.mean(dim=(2, 3), keepdim=True)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res5": ShapeSpec(channels=3, stride=32)}

    @property
    def size_divisibility(self) -> int:
        return 32


class MeanIsLogit(nn.Module):
    """Logits of three classes: the means over the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return self.scale * maps["res5"].mean(dim=(1, 3, 4))


def toy(**options: Any) -> FrozenVideoClassifier:
    arguments = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, "features": ["res5"], **options}
    return FrozenVideoClassifier(backbone=FrameMeans(), head=MeanIsLogit(), **arguments)


def grey(values: list[list[int]], frames: int = 4, side: int = 32) -> Tensor:
    """Views of one colour each: (V, frames, 3, side, side)."""
    colours = torch.tensor(values, dtype=torch.uint8)[:, None, :, None, None]
    return colours.expand(-1, frames, -1, side, side).contiguous()


def config(*options: Any) -> CfgNode:
    values = ["MODEL.DEVICE", "cpu", "MODEL.VIDEO_HEAD.NUM_CLASSES", 3, "VIDEO.CROP_SIZE", 64]
    values += ["VIDEO.NUM_FRAMES", 2, "MODEL.VIDEO_HEAD.NUM_BLOCKS", 1, *options]
    return tasks.read_config("configs/Base-Frozen-Video.yaml", values)


def test_scores_are_the_mean_of_the_views_probabilities() -> None:
    """Two views: the probabilities are averaged, not the logits."""
    views = [[0, 0, 3], [0, 2, 0]]
    scores = toy().eval()([{"video": grey(views)}])[0]["scores"]
    expected = sum(torch.tensor(v, dtype=torch.float32).softmax(0) for v in views) / 2
    assert scores.dtype == torch.float32 and torch.allclose(scores, expected, atol=1e-6)
    assert torch.allclose(mean_over_views([torch.zeros(2, 4), torch.zeros(1, 4)]), torch.full((4,), 0.25))


def test_frames_pass_in_parts_and_results_stay() -> None:
    views = torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    whole, parts, single = (toy(frames_per_pass=n).eval() for n in (128, 5, 2))
    scores = [model([{"video": views}])[0]["scores"] for model in (whole, parts, single)]
    assert torch.allclose(scores[0], scores[1]) and torch.allclose(scores[0], scores[2])
    assert [size[0] for size in whole.backbone.sizes] == [12]
    assert [size[0] for size in parts.backbone.sizes] == [4, 4, 4]
    assert [size[0] for size in single.backbone.sizes] == [2] * 6


def test_frames_are_padded_to_what_the_backbone_divides() -> None:
    model = toy().eval()
    model([{"video": grey([[1, 2, 3]], side=40)}])
    assert model.backbone.sizes == [(4, 3, 64, 64)]


def test_a_bad_record_has_no_scores() -> None:
    out = toy().eval()([{"bad": "broken"}, {"video": grey([[1, 2, 3]])}])
    assert out[0] == {"scores": None} and out[1]["scores"].shape == (3,)


def test_label_smoothing_in_closed_form() -> None:
    """Equal logits: log 3, whatever the smoothing. Else (1 - s) * CE(label) + s * the mean of CE over the classes."""
    one = {"video": grey([[2, 2, 2]]), "label": 1}
    assert toy(label_smoothing=0.3).train()([one])["loss_cls"].item() == pytest.approx(
        torch.log(torch.tensor(3.0)).item()
    )
    one = {"video": grey([[0, 1, 3]]), "label": 1}
    logs = torch.tensor([0.0, 1.0, 3.0]).log_softmax(0)
    expected = -0.7 * logs[1] - 0.3 * logs.mean()
    assert toy(label_smoothing=0.3).train()([one])["loss_cls"].item() == pytest.approx(expected.item())


def test_every_view_of_a_training_sample_has_its_label() -> None:
    model = toy().train()
    both = model([{"video": grey([[0, 1, 3], [3, 0, 0]]), "label": 1}])["loss_cls"]
    single = [model([{"video": grey([v]), "label": 1}])["loss_cls"] for v in ([0, 1, 3], [3, 0, 0])]
    assert both.item() == pytest.approx(sum(one.item() for one in single) / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_moves_the_head_and_no_bit_of_the_backbone(precision: str) -> None:
    torch.manual_seed(0)
    model = build_model(config("MODEL.FROZEN.PRECISION", precision)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    videos = torch.randint(0, 256, (2, 1, 2, 3, 64, 64), dtype=torch.uint8)
    model([{"video": video, "label": k} for k, video in enumerate(videos)])["loss_cls"].backward()
    optimizer.step()
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(key.startswith("head.") for key in moved)
    assert "backbone.final_norm.weight" in before  # the norm is a part of what is frozen


def test_full_fine_tuning_trains_the_final_norm_too() -> None:
    model = build_model(config("MODEL.BACKBONE.FREEZE", "none")).train()
    videos = torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8)
    model([{"video": videos, "label": 2}])["loss_cls"].backward()
    assert model.frozen_backbone is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.final_norm.parameters())


def test_the_last_map_is_normalised_by_the_networks_own_norm() -> None:
    model = build_model(config())
    maps = model.maps(torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8))
    cells = maps["res5"].movedim(2, -1)
    norm = model.backbone.final_norm
    standard = (cells - norm.bias) / norm.weight
    assert list(maps) == ["res5"] and maps["res5"].shape == (1, 2, 256, 2, 2)
    assert torch.allclose(standard.mean(-1), torch.zeros(1), atol=1e-4)
    assert torch.allclose(standard.std(-1, unbiased=False), torch.ones(1), atol=1e-2)


def test_a_plain_vit_and_a_network_without_norm() -> None:
    for name, feature, stride in (("vit_tiny_patch16_224", "plain", 16), ("resnet18", "res5", 32)):
        model = build_model(config("MODEL.TIMM.NAME", name, "MODEL.VIDEO_HEAD.WIDTH", 64)).eval()
        views = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
        assert model([{"video": views}])[0]["scores"].shape == (3,)
        assert model.features == [feature]
        assert model.head.positions.size == (2, 64 // stride, 64 // stride)


def test_weights_of_other_clips_fit_with_their_native_size() -> None:
    """Trained on 2 frames of 64 px, tested on 5 frames of 96 px: the tables stay those of training."""
    trained = build_model(config())
    other = ["VIDEO.NUM_FRAMES", 5, "VIDEO.CROP_SIZE", 96]
    tested = build_model(config(*other, "MODEL.VIDEO_HEAD.POSITIONS", (2, 2, 2))).eval()
    tested.load_state_dict(trained.state_dict())
    views = torch.randint(0, 256, (1, 5, 3, 96, 96), dtype=torch.uint8)
    assert tested([{"video": views}])[0]["scores"].shape == (3,)
    assert build_model(config(*other)).head.positions.size == (5, 3, 3)
    with pytest.raises(ValueError, match="POSITIONS"):
        build_model(config("MODEL.VIDEO_HEAD.POSITIONS", (2, -1, 2)))


def test_several_maps_and_a_neck() -> None:
    views = torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8)
    two = build_model(config("MODEL.VIDEO_HEAD.IN_FEATURES", ["res4", "res5"], "MODEL.VIDEO_HEAD.WIDTH", 64))
    assert two.eval()([{"video": views}])[0]["scores"].shape == (3,)
    options = ["MODEL.BACKBONE.NAME", "build_frozen_backbone", "MODEL.FPN.NORM", "GN"]
    options += [
        "MODEL.FPN.IN_FEATURES",
        ["res2", "res3", "res4", "res5"],
        "MODEL.VIDEO_HEAD.IN_FEATURES",
        ["p5"],
    ]
    neck = build_model(config(*options, "MODEL.BIFPN.NUM_LAYERS", 1))
    assert neck.eval()([{"video": views}])[0]["scores"].shape == (3,)
    assert neck.frozen_backbone is not None


def test_freezing_must_freeze() -> None:
    with pytest.raises(ValueError, match="no part of the backbone is frozen"):
        toy(freeze="all")
    with pytest.raises(ValueError, match="FRAMES_PER_PASS is 0"):
        toy(frames_per_pass=0)
    with pytest.raises(ValueError, match="LABEL_SMOOTHING"):
        toy(label_smoothing=1.0)
