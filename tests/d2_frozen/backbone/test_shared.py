"""When the answer of a frozen backbone is used again, and when not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_frozen.backbone import FrozenBackbone, PassMemory, share_equal_backbones
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone


class Trunk(Backbone):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        nn.init.constant_(self.conv.weight, value)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"res2": self.conv(images)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=2, stride=1)}


class Model(nn.Module):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = FrozenBackbone(Trunk(value))
        self.head = nn.Linear(1, 1)


def test_equal_images_are_answered_from_memory_until_it_forgets() -> None:
    frozen = FrozenBackbone(Trunk())
    images = torch.rand(2, 3, 4, 4)
    memory = PassMemory()
    with memory.on([frozen]):
        first = frozen(images)
        again = frozen(images.clone())
        frozen(images[:1])
    with memory.on([frozen]):
        frozen(images)
        assert frozen.inner.calls == 2 and (memory.passes, memory.reused) == (2, 2)
        memory.forget()
        frozen(images)
    assert again["res2"] is first["res2"] and frozen.inner.calls == 3
    frozen(images)  # the memory is off
    assert frozen.inner.calls == 4 and memory.passes == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_map_that_was_written_into_is_not_handed_on(mode: type) -> None:
    frozen = FrozenBackbone(Trunk())
    with mode(), PassMemory().on([frozen]):
        images = torch.ones(1, 3, 2, 2)
        for _ in range(3):
            maps = frozen(images)
            assert (maps["res2"] == 3).all()
            maps["res2"].zero_()


def test_autocast_has_its_own_answer() -> None:
    frozen = FrozenBackbone(Trunk())
    images = torch.ones(1, 3, 2, 2)
    with PassMemory().on([frozen]):
        assert frozen(images)["res2"].dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert frozen(images)["res2"].dtype == torch.bfloat16


def test_models_with_equal_backbones_hold_the_same_one_under_their_old_names() -> None:
    models = [Model(1.0), Model(2.0), Model(1.0), nn.Linear(1, 1)]
    names = list(models[2].state_dict())
    groups = share_equal_backbones(models, ["same"] * 4)
    assert groups == [[0, 2], [1], [3]]
    assert models[0].backbone.bottom_up is models[2].backbone.bottom_up
    assert models[0].backbone.bottom_up is not models[1].backbone.bottom_up
    assert list(models[2].state_dict()) == names


def test_other_settings_keep_backbones_apart() -> None:
    models = [Model(), Model()]
    assert share_equal_backbones(models, ["window 8", "window 16"]) == [[0], [1]]
    assert models[0].backbone.bottom_up is not models[1].backbone.bottom_up


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_images_that_were_written_into_are_others(mode: type) -> None:
    """A buffer that is filled anew for each picture is equal to itself, but not to what it was."""
    frozen = FrozenBackbone(Trunk())
    with mode(), PassMemory().on([frozen]):
        images = torch.ones(1, 3, 2, 2)
        frozen(images)
        images.fill_(2)
        assert (frozen(images)["res2"] == 6).all()


def test_one_memory_at_a_time() -> None:
    frozen = FrozenBackbone(Trunk())
    with PassMemory().on([frozen]):
        with pytest.raises(RuntimeError, match="PassMemory is on for the backbone Trunk already"):
            PassMemory().on([frozen]).__enter__()
        assert (frozen(torch.ones(1, 3, 2, 2))["res2"] == 3).all()
